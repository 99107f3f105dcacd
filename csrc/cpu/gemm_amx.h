// The product of pairs of bf16 by AMX: two by two tiles of C held in registers. Included once per instruction set.
//
// A panel of A holds 16 rows: element (i, k) at k / 16 * 256 + i * 16 + k % 16, a tile for every 16 of depth, the last
// one filled up with zeros. A panel of B is that of the other kernels, 32 columns wide.
#pragma once
#include <algorithm>

#include "cpu/amx.h"
#include "cpu/gemm_loops.h"
#include "cpu/gemm_pack.h"

#if defined(__AVX512F__)
namespace {

// A panel of B of this depth, 32 KiB, stays in the L1 cache beside the tiles of A that pass: a step of 16 reads 4 KiB
// in the 64 cycles of its products, more than L2 delivers.
constexpr int kTileDepth = 256;

// Tiles 0 .. 3 are C's (0 1 above 2 3), 4 and 5 A's, 6 and 7 B's.
// For `above` rows in the upper tiles and `below` in the lower ones.
QUAVER_INLINE void configure_tiles(int above, int below) {
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) {
    const int rows = tile >= 6 ? kTile : tile < 2 || tile == 4 ? above : below;
    config.rows[tile] = uint8_t(rows);
    config.row_bytes[tile] = rows ? 64 : 0;
  }
  load_tile_config(config);
}

// Where the tiles of A lie: rows `stride` bytes apart, 16 of depth `step` floats after the last, the lower tile `below`
// floats after the upper.
struct TileRows {
  const float* data;
  int64_t stride, step, below;
};

// c, two tiles wide and one or two high, = what `addend` says plus the product; `bias` is 32 wide.
template <bool kTwo>
void multiply_quarters(int64_t steps, const TileRows& a, const float* b, const TileRows* a_tail, const float* b_tail,
                       float* c, int64_t stride, const float* bias, Addend addend) {
  constexpr int64_t kBytes = 4, kWide = 2 * kTile;
  if (addend == kNothing) {
    QUAVER_TILE_ZERO(0);
    QUAVER_TILE_ZERO(1);
    if (kTwo) {
      QUAVER_TILE_ZERO(2);
      QUAVER_TILE_ZERO(3);
    }
  } else {
    const float* from = addend == kBias ? bias : c;
    const int64_t from_stride = addend == kBias ? 0 : stride;  // every row is the bias
    QUAVER_TILE_LOAD(0, from, from_stride * kBytes);
    QUAVER_TILE_LOAD(1, from + kTile, from_stride * kBytes);
    if (kTwo) {
      QUAVER_TILE_LOAD(2, from + kTile * from_stride, from_stride * kBytes);
      QUAVER_TILE_LOAD(3, from + kTile * from_stride + kTile, from_stride * kBytes);
    }
  }
  const auto step = [](const float* of_a, const TileRows& rows, const float* of_b) {
    QUAVER_TILE_LOAD(6, of_b, kWide * kBytes);
    QUAVER_TILE_LOAD(4, of_a, rows.stride);
    QUAVER_TILE_PRODUCT(0, 4, 6);
    QUAVER_TILE_LOAD(7, of_b + kTile, kWide * kBytes);
    QUAVER_TILE_PRODUCT(1, 4, 7);
    if (kTwo) {
      QUAVER_TILE_LOAD(5, of_a + rows.below, rows.stride);
      QUAVER_TILE_PRODUCT(2, 5, 6);
      QUAVER_TILE_PRODUCT(3, 5, 7);
    }
  };
  for (int64_t s = 0; s < steps; s++) step(a.data + s * a.step, a, b + s * kTile * kWide);
  if (a_tail) step(a_tail->data, *a_tail, b_tail);
  QUAVER_TILE_STORE(0, c, stride * kBytes);
  QUAVER_TILE_STORE(1, c + kTile, stride * kBytes);
  if (kTwo) {
    QUAVER_TILE_STORE(2, c + kTile * stride, stride * kBytes);
    QUAVER_TILE_STORE(3, c + kTile * stride + kTile, stride * kBytes);
  }
}

// The last depth % 16 of `rows` rows, zeros beside them.
QUAVER_INLINE void copy_tail(float* to, const TileRows& a, int64_t steps, int rows, int64_t tail) {
  std::memset(to, 0, size_t(rows) * kTile * sizeof(float));
  for (int i = 0; i < rows; i++) {
    const float* group = a.data + steps * a.step + i / kTile * a.below;
    std::memcpy(to + i * kTile, group + i % kTile * (a.stride / 4), size_t(tail) * sizeof(float));
  }
}

void multiply_amx(int64_t rows, int64_t columns, int64_t depth, const quaver::cpu::LeftBlock<float>& a, const float* b,
                  int64_t b_panel, float* c, int64_t stride, const float* bias, bool accumulate) {
  constexpr int kHigh = 2 * kTile, kWide = 2 * kTile;
  const Addend addend = accumulate ? kResult : bias ? kBias : kNothing;
  const int64_t steps = depth / kTile, tail = depth % kTile;
  alignas(64) float edge[kHigh * kWide], edge_bias[kWide], a_tail[kHigh * kTile], b_tail[kTile * kWide];
  int configured = 0;
  for (int64_t j = 0; j < columns; j += kWide, b += b_panel) {
    const int wide = int(std::min<int64_t>(kWide, columns - j));
    if (tail) {
      std::memset(b_tail, 0, sizeof b_tail);
      std::memcpy(b_tail, b + steps * kTile * kWide, size_t(tail) * kWide * sizeof(float));
    }
    const float* of_bias = addend == kBias ? bias + j : nullptr;
    if (of_bias && wide < kWide) {
      std::memset(edge_bias, 0, sizeof edge_bias);
      std::memcpy(edge_bias, of_bias, size_t(wide) * sizeof(float));
      of_bias = edge_bias;
    }
    for (int64_t i = 0; i < rows; i += kHigh) {
      const int high = int(std::min<int64_t>(kHigh, rows - i));
      if (high != configured) configure_tiles(std::min(high, kTile), std::max(0, high - kTile));
      configured = high;
      const float* of_a = a.data + i / kTile * a.panel;
      const TileRows in_place =
          a.by_row ? TileRows{of_a, a.stride * 4, kTile, a.panel} : TileRows{of_a, kTile * 4, kTile * kTile, a.panel};
      const TileRows copied{a_tail, kTile * 4, 0, kTile * kTile};
      if (tail) copy_tail(a_tail, in_place, steps, high, tail);
      float* to = c + i * stride + j;
      const bool whole = wide == kWide;
      if (!whole && accumulate) {
        for (int r = 0; r < high; r++) std::memcpy(edge + r * kWide, to + r * stride, size_t(wide) * sizeof(float));
      }
      const auto kernel = high > kTile ? multiply_quarters<true> : multiply_quarters<false>;
      kernel(steps, in_place, b, tail ? &copied : nullptr, b_tail, whole ? to : edge, whole ? stride : kWide, of_bias,
             addend);
      if (whole) continue;
      for (int r = 0; r < high; r++) std::memcpy(to + r * stride, edge + r * kWide, size_t(wide) * sizeof(float));
    }
  }
  release_tiles();
}

void pack_rows_amx(float* to, int64_t width, const float* from, int64_t stride, int64_t count, int64_t depth) {
  if (width != kTile) return pack_rows(to, width, from, stride, count, depth);
  for (int64_t k = 0; k < depth; k += kTile, to += kTile * kTile) {
    const int64_t there = std::min<int64_t>(kTile, depth - k);
    for (int64_t i = 0; i < count; i++) {
      if (there < kTile) std::memset(to + i * kTile, 0, kTile * sizeof(float));
      std::memcpy(to + i * kTile, from + i * stride + k, size_t(there) * sizeof(float));
    }
  }
}

// Depth comes in multiples of 16 but for the last.
void pack_columns_amx(float* to, int64_t panel, int64_t width, const float* from, int64_t stride, int64_t count,
                      int64_t depth) {
  if (width != kTile) {
    for (int64_t k = 0; k < depth; k++) {
      copy_columns<float, 2 * kTile>(to + k * 2 * kTile, panel, from + k * stride, count);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kTile, to += panel) {
    const int64_t rows = std::min<int64_t>(kTile, count - i);
    for (int64_t k = 0; k < depth; k += kTile) {
      const int64_t there = std::min<int64_t>(kTile, depth - k);
      float block[kTile][kTile] = {};  // of the depth, then of the rows
      for (int64_t d = 0; d < there; d++) {
        std::memcpy(block[d], from + (k + d) * stride + i, size_t(rows) * sizeof(float));
      }
      pack_rows(to + k * kTile, kTile, block[0], kTile, kTile, kTile);
    }
  }
}

constexpr quaver::cpu::PairLoops amx_loops = {
    {kTile, 2 * kTile, kTileDepth, pack_rows_amx, pack_columns_amx, multiply_amx}, zip};

}  // namespace
#endif
