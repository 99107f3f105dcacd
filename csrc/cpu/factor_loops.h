// The inner loops of sums over factors, compiled once per instruction set. A factor's product M_f = A_f B_f, of A
// [rows, factors * rank] and B [factors * rank, columns], is made a tile at a time in the L1 cache and used there for
// several samples, each with coefficients c [samples, factors]: rank multiply-adds an element for all of them and one
// for each, where samples one by one take rank for each.
//
// Panels of B, and what is made, have rows of `width` elements, of which the first `columns` count; those beside them
// up to a whole vector must be zeros for dots().
#pragma once
#include <cstdint>

#include "cpu/gemm_loops.h"

namespace quaver::cpu {

// Samples at a time, at most: what is made of them stays in the L2 cache (64 x 512, 448 x 448, R 1536, 2 threads: 8 128
// ms, 16 91, 32 99, 64 109).
constexpr int64_t kSamplesTogether = 16;

// The sizes of a call. Rows of coefficients are `stride` apart.
template <class T>
struct FactorSizes {
  int64_t columns, factors, rank, samples;
  const T* coefficients;
  int64_t stride;
};

// Where results of several samples go: rows `stride` apart, those of the next sample `sample`.
template <class T>
struct SampleTiles {
  T* data;
  int64_t stride, sample;
};

// Sums of products of factors. The operands are elements of T, or pairs of bf16 along the rank (PairLoops), which must
// be even then: rows of A, in place, and panels of B.
template <class T>
struct FactorSumLoops {
  // Rows of a tile, those of a panel of A.
  int rows;
  // to[b][i][j] = (accumulate: +) sum_f c[b][f] M_f[i][j]; of up to `rows` rows. sums: room for [samples, rows, width].
  void (*sum)(const SampleTiles<T>& to, T* sums, const LeftBlock<T>& a, const T* b, int64_t rows,
              const FactorSizes<T>& sizes, bool accumulate);
};

template <class T>
struct FactorLoopsOf {
  FactorSumLoops<T> sums;
  // dots[f][b][..] += sum_ij M_f[i][j] g[i][b][j], in `lanes` parts; of up to sums.rows rows, g [rows, samples, width].
  void (*dots)(T* dots, const LeftBlock<T>& a, const T* b, const T* g, int64_t rows, const FactorSizes<T>& sizes);
  int lanes;
  // side[f rank + r][j] += sum_i a(f rank + r, i) sum_b c[b][f] g[i][b][j]: of up to side_rows rows of g. a(s, i) lies
  // at s * stride + i where it is by_row, else at i * stride + s.
  void (*add_side)(T* side, const LeftBlock<T>& a, const T* g, int64_t rows, const FactorSizes<T>& sizes);
  int side_rows;
};

struct FactorLoops {
  FactorLoopsOf<float> f32;
  FactorLoopsOf<double> f64;
  // Null at the levels that never have the instructions: for has_bf16() and for has_amx() only.
  FactorSumLoops<float> bf16, amx;
};

QUAVER_LOOPS(FactorLoops, factor_loops)

}  // namespace quaver::cpu
