// The noise stream as loops over elements, compiled once per instruction set. No torch header here, by design: an
// inline function shared by files with different -march would survive as one copy, perhaps the AVX-512 one.
#pragma once
#include <cstdint>

#include "common/philox.h"
#include "cpu/simd_level.h"

namespace quaver::cpu {

struct PhiloxLoops {
  // out[i] = element first + i of the source: float32, for domains kNormal, kRademacher and kUniform (plus 256 or not).
  void (*fill)(float* out, int64_t count, const Source& source, uint64_t first);
  // out[i] = word (word + i) % 4 of block + (word + i) / 4, in [0, 2^32).
  void (*words)(int64_t* out, int64_t count, const Source& source, uint64_t block, int word);
  // out[i] = the 63-bit key of element first + i: its words 2 (first + i) and 2 (first + i) + 1, less the last bit.
  void (*keys)(int64_t* out, int64_t count, const Source& source, uint64_t first);
};

QUAVER_LOOPS(PhiloxLoops, philox_loops)

// Callers make noise a tile at a time, in a buffer that stays in the L1 cache beside what it is applied to: W + sigma
// eps at 16.7 M elements, one core: 0.41 ns an element with 256, 0.43 with 512, 0.50 with 1024.
constexpr int64_t kTile = 256;

}  // namespace quaver::cpu
