// The block that runs and its threads. One block runs at a time, its threads take turns on one thread of the host: each
// runs until it has to wait for others.
#pragma once
#include <cstdint>
#include <vector>

#include "fiber.h"
#include "launch.h"
#include "warp.h"

namespace quaver::emulator {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarp;

enum class State : uint8_t { kReady, kAtCollective, kAtBarrier, kLeft };

struct Thread {
  Context context;
  State state;
  uint3 index;
  Location location;  // where it waits
  // At a barrier; the barrier's result replaces the predicate.
  Vote vote;
  int predicate;
  // At a warp collective.
  Finisher finisher;
  uint32_t mask;
  Lane lane;
};

struct Block {
  std::vector<Thread> threads;
  uint3 index;
  uint32_t serial = 0;             // of all blocks since the last reset, from 1
  uint32_t first_of_launch = 1;    // the serial of the launch's first block
  uint32_t phase = 0;              // barriers passed
  uint32_t warp_phase[kMaxWarps];  // __syncwarps passed
  uint32_t ready[kMaxWarps];       // lanes that can run
  uint32_t ready_warps = 0;
  bool stopped = false;
};
extern Block block;

extern Thread* running;
inline int number_of(const Thread& thread) { return int(&thread - block.threads.data()); }

enum class Order { kForward, kReverse, kRandom };
// Restarts the random order from `seed`.
void set_order(Order order, uint64_t seed);

// Accesses are checked: a kernel's own code runs, not host code and not the emulator.
extern bool in_kernel;
// The emulator works on a thread's behalf. Its own code is not instrumented, but the linker keeps one copy of a
// standard template, and that may be the one of a kernel file.
struct OutsideKernel {
  OutsideKernel() { in_kernel = false; }
  ~OutsideKernel() { in_kernel = true; }
  OutsideKernel(const OutsideKernel&) = delete;
  OutsideKernel& operator=(const OutsideKernel&) = delete;
};

void make_ready(Thread& thread);
// Lets others run until somebody makes the running thread ready again.
void wait(State state);
// Ends the launch at once: nothing that the running thread could do next has a meaning.
[[noreturn]] void stop();

struct Statistics {
  uint64_t launches, blocks, switches, barriers, collectives, accesses;
};
extern Statistics statistics;

}  // namespace quaver::emulator
