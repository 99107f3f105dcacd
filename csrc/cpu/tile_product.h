// Products of small matrices that lie in the L1 and L2 caches, for attention: rows in blocks, columns in vectors.
#pragma once
#include <type_traits>

#include "cpu/ahead.h"
#include "cpu/products.h"
#include "cpu/tile_product_amx.h"

namespace {

using quaver::cpu::Ahead;

// Rows of these matrices are allocated in blocks of so many, columns in as many elements: every tile below divides it.
constexpr int64_t kBlock = 16;

QUAVER_INLINE int64_t in_blocks(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// The rows of a tile with V vectors: as many accumulators as hide the latency of a multiply-add beside the operands.
#if defined(__AVX512F__)
constexpr int kTileRows[] = {16, 8, 8, 4};
#else
constexpr int kTileRows[] = {8, 4, 4, 2};
#endif

// c [R, V vectors] = (kAdd: +) the sum over k of A(i, k) B(k). Element (i, k) of A lies at i * a_stride + k for kByRow,
// else at k * a_stride + i.
template <class P, bool kByRow, bool kAdd, int R, int V, class T = typename P::Element>
QUAVER_INLINE void tile_product(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
                                int64_t c_stride, Ahead& ahead) {
  Vector<T> sum[R][V] = {};
  for (int64_t k = 0; k < depth;) {
    for (const int64_t end = k + Ahead::kEach < depth ? k + Ahead::kEach : depth; k < end; k++) {
      Vector<T> column[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) column[v] = load<Vector<T>>(b + v * kLanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) {
        const Vector<T> row = P::broadcast(kByRow ? a + i * a_stride : a + i);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[i][v] = P::add_product(row, column[v], sum[i][v]);
      }
      a += kByRow ? 1 : a_stride;
      b += b_stride;
    }
    ahead.go();
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      T* to = c + i * c_stride + v * kLanes<T>;
      store(to, kAdd ? sum[i][v] + load<Vector<T>>(to) : sum[i][v]);
    }
  }
}

template <class P, bool kByRow, bool kAdd, int V, class T = typename P::Element>
void column_of_tiles(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
                     int64_t c_stride, Ahead& ahead) {
  constexpr int kRows = kTileRows[V - 1];
  for (int64_t i = 0; i < rows; i += kRows) {
    tile_product<P, kByRow, kAdd, kRows, V>(depth, a + i * (kByRow ? a_stride : 1), a_stride, b, b_stride,
                                            c + i * c_stride, c_stride, ahead);
  }
}

// The vectors of the next tile where `left` are left of a row. Six are three and three, five are three and two: four
// and one would be slower.
QUAVER_INLINE int vectors_of_tile(int64_t left) { return left > 6 || left == 4 ? 4 : left > 4 ? 3 : int(left); }

// How often multiply_tiles calls ahead.go().
template <class P, class T = typename P::Element>
QUAVER_INLINE int64_t steps_of(int64_t rows, int64_t columns, int64_t depth) {
#if defined(__AVX512F__)
  if (std::is_same_v<P, TiledPairs>) return rows / kTile * ((columns + 63) / 64) * ((depth + kTile - 1) / kTile);
#endif
  int64_t tiles = 0;
  for (int64_t left = columns / kLanes<T>; left > 0; left -= vectors_of_tile(left)) {
    // By constants, for shifts in the place of divisions.
    const int vectors = vectors_of_tile(left);
    tiles += vectors == 4   ? rows / kTileRows[3]
             : vectors == 3 ? rows / kTileRows[2]
             : vectors == 2 ? rows / kTileRows[1]
                            : rows / kTileRows[0];
  }
  return tiles * ((depth + Ahead::kEach - 1) / Ahead::kEach);
}

// c [rows, columns] = (kAdd: +) A B, rows and columns in blocks.
template <class P, bool kByRow, bool kAdd, class T = typename P::Element>
QUAVER_INLINE void multiply_tiles(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride,
                                  const T* b, int64_t b_stride, T* c, int64_t c_stride, Ahead& ahead) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<P, TiledPairs>) {
    return multiply_amx_tiles<kByRow, kAdd>(rows, columns, depth, a, a_stride, b, b_stride, c, c_stride, ahead);
  }
#endif
  for (int64_t left = columns / kLanes<T>; left > 0;) {
    const int vectors = vectors_of_tile(left);
    switch (vectors) {
      case 4:
        column_of_tiles<P, kByRow, kAdd, 4>(rows, depth, a, a_stride, b, b_stride, c, c_stride, ahead);
        break;
      case 3:
        column_of_tiles<P, kByRow, kAdd, 3>(rows, depth, a, a_stride, b, b_stride, c, c_stride, ahead);
        break;
      case 2:
        column_of_tiles<P, kByRow, kAdd, 2>(rows, depth, a, a_stride, b, b_stride, c, c_stride, ahead);
        break;
      default:
        column_of_tiles<P, kByRow, kAdd, 1>(rows, depth, a, a_stride, b, b_stride, c, c_stride, ahead);
    }
    left -= vectors;
    b += vectors * kLanes<T>;
    c += vectors * kLanes<T>;
  }
}

}  // namespace
