// The micro-kernel of the GEMM: a tile of C in registers. Included once per instruction set.
#pragma once
#include "cpu/products.h"

namespace {

// The tile: kRows broadcast values of A times kVectors vectors of B. As many accumulators as the registers hold beside
// the operands: 8 x 3 of 32, 6 x 2 of 16. kDepth: a panel of B of that depth stays in the L1 cache (48 x 192 floats are
// 36 KiB), and sums in blocks of it have 0.7 of the error of blocks of 384, at the same speed (Zen 5: 0.97 to 1.04 of
// it in float32, up to 1.15 in bf16; Sapphire Rapids: 1.02 to 1.05 times as long, and as blocks of 448 at that depth,
// which had errors of more than twice eager's). kAhead: where a panel of B is more than the L1 cache, it is fetched so
// many steps ahead, and C at the start of a tile (1024^3 on Sapphire Rapids: 0.83 -> 0.89 of MKL's rate).
#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3, kDepth = 192, kAhead = 8;
#else
constexpr int kRows = 6, kVectors = 2, kDepth = 192, kAhead = 0;
#endif
template <class T>
constexpr int kColumns = kVectors * kLanes<T>;
constexpr int kMaxColumns = kColumns<float>;

enum Addend { kNothing, kBias, kResult };

// c [R, V vectors] = the product of R rows of A and the first columns of B, whose rows are kStep elements apart, plus
// nothing, a bias for each column, or c. Element (i, k) of A lies at i * a_stride + k for kByRow, else at k * a_stride
// + i. The addend comes last: sums that begin at zero are smaller, and so are their roundings (a third of the error at
// a depth of 1300).
template <class P, bool kByRow, int R, int V, int kStep = kColumns<typename P::Element>, class T = typename P::Element>
void multiply_tile(int64_t depth, const T* a, int64_t a_stride, const T* b, T* c, int64_t stride, const T* bias,
                   Addend addend) {
  using Lanes = Vector<T>;
  Lanes sum[R][V] = {};
  if (kAhead > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) __builtin_prefetch(c + i * stride + v * kLanes<T>);
    }
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k++) {
    Lanes column[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) column[v] = load<Lanes>(b + v * kLanes<T>);
    if (kAhead > 0) {
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) __builtin_prefetch(b + kAhead * kStep + v * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const Lanes row = P::broadcast(kByRow ? a + i * a_stride : a + i);
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) sum[i][v] = P::add_product(row, column[v], sum[i][v]);
    }
    a += kByRow ? 1 : a_stride;
    b += kStep;
  }
#define QUAVER_EACH_SUM \
  _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) _Pragma("GCC unroll 3") for (int v = 0; v < V; v++)
  if (addend == kResult) {
    QUAVER_EACH_SUM sum[i][v] += load<Lanes>(c + i * stride + v * kLanes<T>);
  } else if (addend == kBias) {
    QUAVER_EACH_SUM sum[i][v] += load<Lanes>(bias + v * kLanes<T>);
  }
  QUAVER_EACH_SUM store(c + i * stride + v * kLanes<T>, sum[i][v]);
#undef QUAVER_EACH_SUM
}

template <class T>
using Tile = void (*)(int64_t depth, const T* a, int64_t a_stride, const T* b, T* c, int64_t stride, const T* bias,
                      Addend addend);

// kTiles<P, kByRow, V, kStep>[r - 1] multiplies r rows and V vectors of columns: fewer than kVectors at the right edge,
// where the whole panel would take up to three times as long.
template <class P, bool kByRow, int V, int kStep = kColumns<typename P::Element>>
constexpr Tile<typename P::Element> kTiles[] = {
    multiply_tile<P, kByRow, 1, V, kStep>, multiply_tile<P, kByRow, 2, V, kStep>, multiply_tile<P, kByRow, 3, V, kStep>,
    multiply_tile<P, kByRow, 4, V, kStep>, multiply_tile<P, kByRow, 5, V, kStep>, multiply_tile<P, kByRow, 6, V, kStep>,
#if defined(__AVX512F__)
    multiply_tile<P, kByRow, 7, V, kStep>, multiply_tile<P, kByRow, 8, V, kStep>,
#endif
};
static_assert(sizeof(kTiles<Plain<float>, true, 1>) / sizeof(Tile<float>) == kRows,
              "one kernel for each number of rows");

// The kernels for a number of vectors, 1 to kVectors.
template <class P, bool kByRow>
QUAVER_INLINE const Tile<typename P::Element>* tiles_of(int vectors) {
  if (vectors == 1) return kTiles<P, kByRow, 1>;
  return vectors < kVectors ? kTiles<P, kByRow, 2> : kTiles<P, kByRow, kVectors>;
}

}  // namespace
