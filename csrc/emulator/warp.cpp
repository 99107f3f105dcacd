// Warp collectives: all lanes of a mask meet, the last to arrive does the work of all.
#include <algorithm>
#include <cstring>
#include <string>

#include "block.h"
#include "report.h"
#include "traffic.h"

namespace quaver::emulator {

namespace {

bool has_arrived(const Thread& other, const Thread& thread) {
  return other.state == State::kAtCollective && other.finisher == thread.finisher && other.mask == thread.mask &&
         other.location == thread.location;
}

template <class F>
void for_lanes(uint32_t mask, F&& f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

}  // namespace

void warp_collective(Finisher finisher, uint32_t mask, const Lane& lane, Location location) {
  const OutsideKernel outside;
  Thread& thread = *running;
  const int number = number_of(thread), warp = number / kWarp, lane_number = number % kWarp;
  Thread* const threads = &block.threads[size_t(warp * kWarp)];
  // A block whose size is no multiple of 32 ends in a warp that lacks its last lanes.
  const int lanes = int(block.threads.size()) - warp * kWarp;
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if (!(mask >> lane_number & 1)) {
    report(Fault::kWrongMask, location, format("lane %d is not in its own mask %08x", lane_number, mask));
    stop();
  }
  thread.finisher = finisher;
  thread.mask = mask;
  thread.lane = lane;
  thread.location = location;
  thread.state = State::kAtCollective;
  bool complete = true;
  for_lanes(mask, [&](int i) { complete = complete && has_arrived(threads[i], thread); });
  if (!complete) return wait(State::kAtCollective);

  statistics.collectives++;
  if (__builtin_popcount(mask) == std::min(lanes, kWarp)) count_meeting(warp);
  Lane parts[kWarp];
  for_lanes(mask, [&](int i) { parts[i] = threads[i].lane; });
  finisher(parts, mask, location);
  // Of the collectives only __syncwarp orders memory.
  if (finisher == finish_sync) block.warp_phase[warp]++;
  for_lanes(mask & ~(1u << lane_number), [&](int i) { make_ready(threads[i]); });
  thread.state = State::kReady;
}

void finish_sync(const Lane*, uint32_t, Location) {}

void finish_shuffle(const Lane* lanes, uint32_t mask, Location location) {
  for_lanes(mask, [&](int i) {
    const int source = lanes[i].source;
    if (mask >> source & 1) {
      std::memcpy(lanes[i].out, lanes[source].in, lanes[i].bytes);
    } else {
      std::memset(lanes[i].out, 0xff, lanes[i].bytes);
      report(Fault::kInactiveLane, location,
             format("lane %d reads lane %d, which mask %08x leaves out", i, source, mask));
    }
  });
}

void finish_ballot(const Lane* lanes, uint32_t mask, Location) {
  uint32_t votes = 0;
  for_lanes(mask, [&](int i) { votes |= *static_cast<const uint32_t*>(lanes[i].in) << i; });
  for_lanes(mask, [&](int i) { *static_cast<uint32_t*>(lanes[i].out) = votes; });
}

template <class T, class Operation>
void finish_reduce(const Lane* lanes, uint32_t mask, Location) {
  T result = *static_cast<const T*>(lanes[__builtin_ctz(mask)].in);
  for_lanes(mask & (mask - 1), [&](int i) { result = Operation()(result, *static_cast<const T*>(lanes[i].in)); });
  for_lanes(mask, [&](int i) { *static_cast<T*>(lanes[i].out) = result; });
}
template void finish_reduce<unsigned, std::plus<unsigned>>(const Lane*, uint32_t, Location);
template void finish_reduce<unsigned, std::bit_and<unsigned>>(const Lane*, uint32_t, Location);
template void finish_reduce<unsigned, std::bit_or<unsigned>>(const Lane*, uint32_t, Location);
template void finish_reduce<unsigned, std::bit_xor<unsigned>>(const Lane*, uint32_t, Location);
template void finish_reduce<unsigned, Minimum<unsigned>>(const Lane*, uint32_t, Location);
template void finish_reduce<unsigned, Maximum<unsigned>>(const Lane*, uint32_t, Location);
template void finish_reduce<int, Minimum<int>>(const Lane*, uint32_t, Location);
template void finish_reduce<int, Maximum<int>>(const Lane*, uint32_t, Location);

}  // namespace quaver::emulator
