#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>

#include "copies.h"
#include "memory.h"
#include "report.h"
#include "traffic.h"

#define QUAVER_BUILTIN __attribute__((visibility("hidden")))
QUAVER_BUILTIN uint3 thread_index asm("quaver_emulator_thread_index");
QUAVER_BUILTIN uint3 block_index asm("quaver_emulator_block_index");
QUAVER_BUILTIN dim3 block_size asm("quaver_emulator_block_size");
QUAVER_BUILTIN dim3 grid_size asm("quaver_emulator_grid_size");
QUAVER_BUILTIN int current_lane asm("quaver_emulator_lane_index");
#undef QUAVER_BUILTIN

namespace quaver::emulator {

Block block;
Thread* running = nullptr;
bool in_kernel = false;
Statistics statistics = {};

namespace {

Context scheduler;
Order order = Order::kForward;
std::mt19937_64 generator;
Body kernel_body;
const void* kernel_call;

void run_thread() {
  kernel_body(kernel_call);
  wait(State::kLeft);
  std::abort();  // nobody resumes a thread that has left
}

void resume(Thread& thread) {
  running = &thread;
  thread_index = thread.index;
  current_lane = number_of(thread) % kWarp;
  statistics.switches++;
  in_kernel = true;
  switch_to(scheduler, thread.context);
  in_kernel = false;
}

int pick_bit(uint32_t bits) {
  if (order == Order::kForward) return __builtin_ctz(bits);
  if (order == Order::kReverse) return kWarp - 1 - __builtin_clz(bits);
  for (int skip = int(generator() % uint64_t(__builtin_popcount(bits))); skip > 0; skip--) bits &= bits - 1;
  return __builtin_ctz(bits);
}

// Each ready lane of one warp has a turn, then a warp is chosen again: in order a warp goes as far as it can before the
// next one starts, at random any warp may be ahead of any other.
void run_ready_threads() {
  while (block.ready_warps && !block.stopped) {
    const int warp = pick_bit(block.ready_warps);
    uint32_t lanes = block.ready[warp];
    block.ready[warp] = 0;
    block.ready_warps &= ~(1u << warp);
    while (lanes && !block.stopped) {
      const int lane = pick_bit(lanes);
      lanes &= ~(1u << lane);
      resume(block.threads[size_t(warp * kWarp + lane)]);
    }
  }
}

void count_block() {
  for (int first = 0; first < int(block.threads.size()); first += kWarp) count_meeting(first / kWarp);
}

// All that have not left wait at a barrier.
void release_barrier(int waiting) {
  const int left = int(block.threads.size()) - waiting;
  const Thread* first = nullptr;
  int votes = 0;
  for (const Thread& thread : block.threads) {
    if (thread.state != State::kAtBarrier) continue;
    votes += thread.predicate;
    if (!first) first = &thread;
    if (!(thread.location == first->location && thread.vote == first->vote)) {
      report(Fault::kDivergentBarrier, thread.location,
             format("thread %d waits here, thread %d at %s", number_of(thread), number_of(*first),
                    to_string(first->location).c_str()));
    }
  }
  if (left) {
    report(Fault::kEarlyExit, first->location,
           format("%d of %zu threads left the kernel before this barrier", left, block.threads.size()));
  }
  block.phase++;
  statistics.barriers++;
  count_block();
  for (Thread& thread : block.threads) {
    if (thread.state != State::kAtBarrier) continue;
    if (thread.vote == Vote::kCount) thread.predicate = votes;
    if (thread.vote == Vote::kAll) thread.predicate = votes == waiting;
    if (thread.vote == Vote::kAny) thread.predicate = votes > 0;
    make_ready(thread);
  }
}

std::string describe(const Thread& thread) {
  switch (thread.state) {
    case State::kLeft:
      return format("thread %d has left the kernel", number_of(thread));
    case State::kAtBarrier:
      return format("thread %d waits at the barrier %s", number_of(thread), to_string(thread.location).c_str());
    default:
      return format("thread %d waits at %s with mask %08x", number_of(thread), to_string(thread.location).c_str(),
                    thread.mask);
  }
}

// Nobody can run. Each lane that waits in a warp collective says for whom.
void report_deadlock() {
  for (const Thread& thread : block.threads) {
    if (thread.state != State::kAtCollective) continue;
    const Thread* const warp = &thread - number_of(thread) % kWarp;
    for (uint32_t lanes = thread.mask; lanes; lanes &= lanes - 1) {
      const Thread& other = warp[__builtin_ctz(lanes)];
      const bool same_place = other.state == State::kAtCollective && other.location == thread.location;
      if (same_place && other.mask == thread.mask) continue;
      report(same_place ? Fault::kWrongMask : Fault::kDeadlock, thread.location,
             format("thread %d waits with mask %08x, but ", number_of(thread), thread.mask) + describe(other));
      break;
    }
  }
}

void start_block(uint64_t number) {
  block.index = {unsigned(number % grid_size.x), unsigned(number / grid_size.x % grid_size.y),
                 unsigned(number / (uint64_t(grid_size.x) * grid_size.y))};
  block_index = block.index;
  block.serial++;
  block.phase = 0;
  block.ready_warps = 0;
  std::fill(block.warp_phase, block.warp_phase + kMaxWarps, 0);
  std::fill(block.ready, block.ready + kMaxWarps, 0);
  start_shared_memory();
  start_copies();
  statistics.blocks++;
  for (Thread& thread : block.threads) {
    const unsigned i = unsigned(number_of(thread));
    thread.index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    prepare(thread.context, stack_of(int(i)), run_thread);
    make_ready(thread);
  }
}

void run_block(uint64_t number) {
  start_block(number);
  for (;;) {
    run_ready_threads();
    if (block.stopped) return;
    int left = 0, at_barrier = 0;
    for (const Thread& thread : block.threads) {
      left += thread.state == State::kLeft;
      at_barrier += thread.state == State::kAtBarrier;
    }
    if (left == int(block.threads.size())) return count_block();
    if (left + at_barrier < int(block.threads.size())) {
      report_deadlock();
      block.stopped = true;
      return;
    }
    release_barrier(at_barrier);
  }
}

// The limits of compute capability 8.0 to 9.0; shared memory as on 9.0.
void check_limits(dim3 grid, dim3 size, size_t shared_bytes) {
  constexpr unsigned kMaxGridX = 0x7fffffffu, kMaxGridYZ = 65535, kMaxBlockZ = 64;
  constexpr size_t kMaxShared = 227 << 10;
  const uint64_t threads = uint64_t(size.x) * size.y * size.z;
  if (threads == 0 || threads > kMaxThreads || size.z > kMaxBlockZ || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ || shared_bytes > kMaxShared) {
    throw std::runtime_error(format(
        "quaver: expected at most %d threads in a block, its z at most %u, a grid of at most (%u, %u, %u) and at "
        "most %zu bytes of shared memory; got block (%u, %u, %u), grid (%u, %u, %u) and %zu bytes",
        kMaxThreads, kMaxBlockZ, kMaxGridX, kMaxGridYZ, kMaxGridYZ, kMaxShared, size.x, size.y, size.z, grid.x, grid.y,
        grid.z, shared_bytes));
  }
}

}  // namespace

void set_order(Order order_, uint64_t seed) {
  order = order_;
  generator.seed(seed);
}

void make_ready(Thread& thread) {
  const int number = number_of(thread);
  thread.state = State::kReady;
  block.ready[number / kWarp] |= 1u << number % kWarp;
  block.ready_warps |= 1u << number / kWarp;
}

void wait(State state) {
  Thread& thread = *running;
  thread.state = state;
  switch_to(thread.context, scheduler);
}

void stop() {
  block.stopped = true;
  wait(State::kLeft);
  std::abort();  // a stopped block resumes nobody
}

int block_barrier(Vote vote, bool predicate, Location location) {
  Thread& thread = *running;
  thread.vote = vote;
  thread.predicate = predicate;
  thread.location = location;
  wait(State::kAtBarrier);
  return thread.predicate;
}

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, Body body, const void* call, size_t call_bytes) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (blocks == 0) return;
  check_limits(grid, size, shared_bytes);
  kernel_body = body;
  kernel_call = call;
  grid_size = grid;
  block_size = size;
  block.threads.resize(size_t(size.x) * size.y * size.z);
  block.first_of_launch = block.serial + 1;
  block.stopped = false;
  start_launch(shared_bytes, call, call_bytes);
  statistics.launches++;
  std::vector<uint64_t> numbers(blocks);
  std::iota(numbers.begin(), numbers.end(), uint64_t(0));
  if (order == Order::kReverse) std::reverse(numbers.begin(), numbers.end());
  if (order == Order::kRandom) std::shuffle(numbers.begin(), numbers.end(), generator);
  for (const uint64_t number : numbers) {
    run_block(number);
    if (block.stopped) break;
  }
}

}  // namespace quaver::emulator
