// The products of tile_product.h by AMX, for pairs of bf16.
#pragma once
#include "cpu/ahead.h"
#include "cpu/amx.h"
#include "cpu/products.h"
#include "cpu/transpose.h"

#if defined(__AVX512F__)
namespace {

// Tiles 0 .. 3 are C's, side by side; 4 is A's and 5 B's; 6 and 7 are theirs for the last depth % 16.
QUAVER_INLINE void configure_product(int tail) {
  TileConfig config;
  for (int tile = 0; tile < (tail ? 8 : 6); tile++) {
    config.rows[tile] = uint8_t(tile == 7 ? tail : kTile);
    config.row_bytes[tile] = uint16_t(tile == 6 ? 4 * tail : 64);
  }
  load_tile_config(config);
}

// A step of depth: tiles 0 .. V - 1 += A, which tile `a_tile` gets, times V tiles of B.
#define QUAVER_STEP(a_tile, b_tile, a, a_bytes, b, b_bytes) \
  do {                                                      \
    QUAVER_TILE_LOAD(a_tile, a, a_bytes);                   \
    QUAVER_TILE_LOAD(b_tile, b, b_bytes);                   \
    QUAVER_TILE_PRODUCT(0, a_tile, b_tile);                 \
    if (V > 1) {                                            \
      QUAVER_TILE_LOAD(b_tile, (b) + kTile, b_bytes);       \
      QUAVER_TILE_PRODUCT(1, a_tile, b_tile);               \
    }                                                       \
    if (V > 2) {                                            \
      QUAVER_TILE_LOAD(b_tile, (b) + 2 * kTile, b_bytes);   \
      QUAVER_TILE_PRODUCT(2, a_tile, b_tile);               \
    }                                                       \
    if (V > 3) {                                            \
      QUAVER_TILE_LOAD(b_tile, (b) + 3 * kTile, b_bytes);   \
      QUAVER_TILE_PRODUCT(3, a_tile, b_tile);               \
    }                                                       \
  } while (false)

// c [16, V tiles] = (kAdd: +) A B, as in tile_product().
template <bool kByRow, bool kAdd, int V>
QUAVER_INLINE void tiles_product(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                 float* c, int64_t c_stride, quaver::cpu::Ahead& ahead) {
  constexpr int64_t kBytes = 4;
  const int64_t c_bytes = c_stride * kBytes, b_bytes = b_stride * kBytes, a_bytes = kByRow ? a_stride * kBytes : 64;
  if (kAdd) {
    QUAVER_TILE_LOAD(0, c, c_bytes);
    if (V > 1) QUAVER_TILE_LOAD(1, c + kTile, c_bytes);
    if (V > 2) QUAVER_TILE_LOAD(2, c + 2 * kTile, c_bytes);
    if (V > 3) QUAVER_TILE_LOAD(3, c + 3 * kTile, c_bytes);
  } else {
    QUAVER_TILE_ZERO(0);
    if (V > 1) QUAVER_TILE_ZERO(1);
    if (V > 2) QUAVER_TILE_ZERO(2);
    if (V > 3) QUAVER_TILE_ZERO(3);
  }
  alignas(64) float block[kTile * kTile];
  const auto rows_of = [&](int64_t k) __attribute__((always_inline)) {
    if (kByRow) return a + k;
    transpose_tile(a + k * a_stride, a_stride, block, kTile);
    return static_cast<const float*>(block);
  };
  int64_t k = 0;
  for (; k + kTile <= depth; k += kTile) {
    const float* rows = rows_of(k);
    QUAVER_STEP(4, 5, rows, a_bytes, b + k * b_stride, b_bytes);
    ahead.go();
  }
  if (k < depth) {
    const float* rows = rows_of(k);
    QUAVER_STEP(6, 7, rows, a_bytes, b + k * b_stride, b_bytes);
    ahead.go();
  }
  QUAVER_TILE_STORE(0, c, c_bytes);
  if (V > 1) QUAVER_TILE_STORE(1, c + kTile, c_bytes);
  if (V > 2) QUAVER_TILE_STORE(2, c + 2 * kTile, c_bytes);
  if (V > 3) QUAVER_TILE_STORE(3, c + 3 * kTile, c_bytes);
}
#undef QUAVER_STEP

// multiply_tiles() for pairs. Where A is not by row, 16 steps of depth are read at once, to the next multiple of 16.
template <bool kByRow, bool kAdd>
void multiply_amx_tiles(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const float* b,
                        int64_t b_stride, float* c, int64_t c_stride, quaver::cpu::Ahead& ahead) {
  configure_product(int(depth % kTile));
  for (int64_t left = columns / kTile; left > 0; left -= 4, b += 4 * kTile, c += 4 * kTile) {
    for (int64_t i = 0; i < rows; i += kTile) {
      const float* of_a = a + i * (kByRow ? a_stride : 1);
      float* to = c + i * c_stride;
      if (left >= 4) {
        tiles_product<kByRow, kAdd, 4>(depth, of_a, a_stride, b, b_stride, to, c_stride, ahead);
      } else if (left == 3) {
        tiles_product<kByRow, kAdd, 3>(depth, of_a, a_stride, b, b_stride, to, c_stride, ahead);
      } else if (left == 2) {
        tiles_product<kByRow, kAdd, 2>(depth, of_a, a_stride, b, b_stride, to, c_stride, ahead);
      } else {
        tiles_product<kByRow, kAdd, 1>(depth, of_a, a_stride, b, b_stride, to, c_stride, ahead);
      }
    }
  }
}

}  // namespace
#endif
