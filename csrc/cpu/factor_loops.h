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

// Samples at a time: as many as there are rows of sums in the registers of v4.
constexpr int64_t kSamplesTogether = 8;

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

template <class T>
struct FactorLoopsOf {
  // Rows of a tile of sum() and dots(), those of a panel of A; and of add_side(). Floats beside each other in sums of
  // dots().
  int rows, side_rows, lanes;
  // to[b][i][j] = (accumulate: +) sum_f c[b][f] M_f[i][j]; of up to `rows` rows.
  void (*sum)(const SampleTiles<T>& to, const LeftBlock<T>& a, const T* b, int64_t rows, const FactorSizes<T>& sizes,
              bool accumulate);
  // dots[f][b][..] += sum_ij M_f[i][j] g[i][b][j], in `lanes` parts; of up to `rows` rows, g [rows, samples, width].
  void (*dots)(T* dots, const LeftBlock<T>& a, const T* b, const T* g, int64_t rows, const FactorSizes<T>& sizes);
  // side[f rank + r][j] += sum_i a(f rank + r, i) sum_b c[b][f] g[i][b][j]: of up to side_rows rows of g. a(s, i) lies
  // at s * stride + i where it is by_row, else at i * stride + s.
  void (*add_side)(T* side, const LeftBlock<T>& a, const T* g, int64_t rows, const FactorSizes<T>& sizes);
};

struct FactorLoops {
  FactorLoopsOf<float> f32;
  FactorLoopsOf<double> f64;
};

QUAVER_LOOPS(FactorLoops, factor_loops)

}  // namespace quaver::cpu
