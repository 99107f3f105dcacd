// The C interface, for ctypes (tests/emulation.py).
#include <cstdint>
#include <string>

#include "block.h"
#include "copies.h"
#include "memory.h"
#include "regions.h"
#include "report.h"
#include "traffic.h"

#define QUAVER_EXPORT extern "C" __attribute__((visibility("default")))

namespace emulator = quaver::emulator;

// order: 0 forward, 1 reverse, 2 random from `seed`. copies: 0 as early, 1 as late as they can, 2 at random.
QUAVER_EXPORT void quaver_emulator_configure(int order, int copies, uint64_t seed) {
  emulator::set_order(static_cast<emulator::Order>(order), seed);
  emulator::set_moment(static_cast<emulator::Moment>(copies), unsigned(seed));
}

// Forgets regions, reports and statistics.
QUAVER_EXPORT void quaver_emulator_reset() {
  emulator::clear_regions();
  emulator::clear_reports();
  emulator::statistics = {};
  emulator::block.serial = 0;
}

// Use: 0 input, 1 output, 2 updated.
QUAVER_EXPORT void quaver_emulator_region(void* begin, uint64_t bytes, const char* name, int use) {
  emulator::register_region(begin, bytes, name, static_cast<emulator::Use>(use));
}

// One line a fault; valid until the next call.
QUAVER_EXPORT const char* quaver_emulator_errors() {
  static std::string text;
  text = emulator::all_reports();
  return text.c_str();
}

// launches, blocks, switches between threads, block barriers, warp collectives, checked accesses
QUAVER_EXPORT void quaver_emulator_statistics(uint64_t (&out)[6]) {
  const emulator::Statistics& s = emulator::statistics;
  const uint64_t values[] = {s.launches, s.blocks, s.switches, s.barriers, s.collectives, s.accesses};
  for (int i = 0; i < 6; i++) out[i] = values[i];
}

// 1: forgets what was counted and counts what kernels move from now on. 0: stops.
QUAVER_EXPORT void quaver_emulator_count(int wanted) {
  if (wanted) {
    emulator::start_counting();
  } else {
    emulator::stop_counting();
  }
}

// Bytes read and written of the regions that begin in these bytes.
QUAVER_EXPORT void quaver_emulator_moved(const void* begin, uint64_t bytes, uint64_t (&out)[2]) {
  const emulator::Moved moved = emulator::moved_by(begin, bytes);
  out[0] = moved.read;
  out[1] = moved.written;
}

// See traffic.h; valid until the next call.
QUAVER_EXPORT const char* quaver_emulator_traffic() {
  static std::string text;
  text = emulator::all_traffic();
  return text.c_str();
}
