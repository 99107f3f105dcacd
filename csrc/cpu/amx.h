// The tiles of AMX: 16 rows of 64 bytes each, and the product of two of them whose 32 bits are pairs of bf16. Included
// once per instruction set. The instructions are written out: as intrinsics they would want the whole file compiled for
// AMX.
#pragma once
#include "cpu/simd.h"

#if defined(__AVX512F__)
namespace {

constexpr int kTile = 16;  // rows of a tile, and its 32-bit columns

// What ldtilecfg reads. A tile that is not used has no rows and no bytes.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

QUAVER_INLINE void load_tile_config(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
QUAVER_INLINE void release_tiles() { asm volatile("tilerelease"); }

#define QUAVER_TILE_LOAD(tile, from, stride_bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(stride_bytes) : "memory")
#define QUAVER_TILE_STORE(tile, to, stride_bytes) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(stride_bytes) : "memory")
#define QUAVER_TILE_ZERO(tile) asm volatile("tilezero %tmm" #tile)
#define QUAVER_TILE_PRODUCT(c, a, b) asm volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #c)

}  // namespace
#endif
