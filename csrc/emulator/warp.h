// Barriers and warp-wide functions as kernels call them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>

#include "location.h"

namespace quaver::emulator {

constexpr int kWarp = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

extern __attribute__((visibility("hidden"))) const int lane_index asm("quaver_emulator_lane_index");

enum class Vote { kNone, kAll, kAny, kCount };
int block_barrier(Vote vote, bool predicate, Location location);

// One lane's part of a warp collective. The pointers lead into the stacks of the lanes.
struct Lane {
  const void* in;
  void* out;
  size_t bytes;
  int source;
};
// Called once for all lanes of the mask, by the last of them to arrive; lanes[i] is valid where bit i of the mask is
// set. Finishers belong in warp.cpp: compiled with the kernels, their accesses to other threads' stacks would be
// faults.
using Finisher = void (*)(const Lane* lanes, uint32_t mask, Location location);
void warp_collective(Finisher finisher, uint32_t mask, const Lane& lane, Location location);

void finish_sync(const Lane* lanes, uint32_t mask, Location location);
void finish_shuffle(const Lane* lanes, uint32_t mask, Location location);
void finish_ballot(const Lane* lanes, uint32_t mask, Location location);
template <class T, class Operation>
void finish_reduce(const Lane* lanes, uint32_t mask, Location location);
template <class T>
struct Minimum {
  T operator()(T a, T b) const { return b < a ? b : a; }
};
template <class T>
struct Maximum {
  T operator()(T a, T b) const { return a < b ? b : a; }
};

// A source outside the lane's own segment of `width` lanes gives the lane its own value, as on a GPU.
template <class T>
T shuffle(uint32_t mask, T value, int source, bool in_segment, Location location) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 4 or 8 bytes");
  T result;
  warp_collective(finish_shuffle, mask, {&value, &result, sizeof(T), in_segment ? source : lane_index}, location);
  return result;
}

inline uint32_t ballot(uint32_t mask, int predicate, Location location) {
  const uint32_t vote = predicate != 0;
  uint32_t votes;
  warp_collective(finish_ballot, mask, {&vote, &votes, sizeof votes, 0}, location);
  return votes;
}

template <class Operation, class T>
T reduce(uint32_t mask, T value, Location location) {
  T result;
  warp_collective(finish_reduce<T, Operation>, mask, {&value, &result, sizeof(T), 0}, location);
  return result;
}

}  // namespace quaver::emulator

// The last parameter of every function here: the line that calls it.
#define QUAVER_CALLER quaver::emulator::Location location = quaver::emulator::Location::here()

// ---- the block ------------------------------------------------------------------------------------------------------
inline void __syncthreads(QUAVER_CALLER) {
  quaver::emulator::block_barrier(quaver::emulator::Vote::kNone, false, location);
}
inline int __syncthreads_and(int predicate, QUAVER_CALLER) {
  return quaver::emulator::block_barrier(quaver::emulator::Vote::kAll, predicate != 0, location);
}
inline int __syncthreads_or(int predicate, QUAVER_CALLER) {
  return quaver::emulator::block_barrier(quaver::emulator::Vote::kAny, predicate != 0, location);
}
inline int __syncthreads_count(int predicate, QUAVER_CALLER) {
  return quaver::emulator::block_barrier(quaver::emulator::Vote::kCount, predicate != 0, location);
}

// ---- the warp -------------------------------------------------------------------------------------------------------
inline void __syncwarp(unsigned mask = quaver::emulator::kFullMask, QUAVER_CALLER) {
  quaver::emulator::warp_collective(quaver::emulator::finish_sync, mask, {}, location);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = quaver::emulator::kWarp, QUAVER_CALLER) {
  const int first = quaver::emulator::lane_index & ~(width - 1);
  return quaver::emulator::shuffle(mask, value, first | (source & (width - 1)), true, location);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = quaver::emulator::kWarp, QUAVER_CALLER) {
  const int lane = quaver::emulator::lane_index, first = lane & ~(width - 1), source = lane - int(delta);
  return quaver::emulator::shuffle(mask, value, source, source >= first, location);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = quaver::emulator::kWarp, QUAVER_CALLER) {
  const int lane = quaver::emulator::lane_index, last = lane | (width - 1), source = lane + int(delta);
  return quaver::emulator::shuffle(mask, value, source, source <= last, location);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = quaver::emulator::kWarp, QUAVER_CALLER) {
  const int lane = quaver::emulator::lane_index, last = lane | (width - 1), source = lane ^ flip;
  return quaver::emulator::shuffle(mask, value, source, source <= last, location);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, QUAVER_CALLER) {
  return quaver::emulator::ballot(mask, predicate, location);
}
inline int __any_sync(unsigned mask, int predicate, QUAVER_CALLER) {
  return quaver::emulator::ballot(mask, predicate, location) != 0;
}
inline int __all_sync(unsigned mask, int predicate, QUAVER_CALLER) {
  return quaver::emulator::ballot(mask, !predicate, location) == 0;
}

#define QUAVER_REDUCE(name, type, operation)                                 \
  inline type name(unsigned mask, type value, QUAVER_CALLER) {               \
    return quaver::emulator::reduce<operation<type>>(mask, value, location); \
  }
QUAVER_REDUCE(__reduce_add_sync, unsigned, std::plus)
QUAVER_REDUCE(__reduce_min_sync, unsigned, quaver::emulator::Minimum)
QUAVER_REDUCE(__reduce_min_sync, int, quaver::emulator::Minimum)
QUAVER_REDUCE(__reduce_max_sync, unsigned, quaver::emulator::Maximum)
QUAVER_REDUCE(__reduce_max_sync, int, quaver::emulator::Maximum)
QUAVER_REDUCE(__reduce_and_sync, unsigned, std::bit_and)
QUAVER_REDUCE(__reduce_or_sync, unsigned, std::bit_or)
QUAVER_REDUCE(__reduce_xor_sync, unsigned, std::bit_xor)
#undef QUAVER_REDUCE
inline int __reduce_add_sync(unsigned mask, int value, QUAVER_CALLER) {
  return int(__reduce_add_sync(mask, unsigned(value), location));  // wraps around
}
#undef QUAVER_CALLER
