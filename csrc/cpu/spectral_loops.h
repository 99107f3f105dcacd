// The inner loops of spectral_linear beside its products, compiled once per instruction set. Matrices are rows of
// `columns` elements, `stride` apart.
#pragma once
#include <cstdint>

#include "cpu/simd_level.h"

namespace quaver::cpu {

template <class T>
struct SpectralLoopsOf {
  // to[k * width + i] = from[k * width + i] * scales[k]
  void (*scale_panel)(T* to, const T* from, const T* scales, int64_t width, int64_t depth);
  // x[i][j] *= factors[j]
  void (*scale_columns)(T* x, int64_t stride, const T* factors, int64_t rows, int64_t columns);
  // sum[i][j] += x[i][j] * factors[j]
  void (*add_scaled_columns)(T* sum, int64_t sum_stride, const T* x, int64_t stride, const T* factors, int64_t rows,
                             int64_t columns);
  // sum[i][j] += x[i][j] * factors[i]
  void (*add_scaled_rows)(T* sum, int64_t sum_stride, const T* x, int64_t stride, const T* factors, int64_t rows,
                          int64_t columns);
  // to[i][j] = base[i][j] + x[i][j] * factors[i]; without factors those are 1. base and x have the same stride.
  void (*shift_rows)(T* to, int64_t to_stride, const T* base, const T* x, int64_t stride, const T* factors,
                     int64_t rows, int64_t columns);
  // sums[j] = sum_i x[i][j] * y[i][j]
  void (*column_dots)(T* sums, const T* x, int64_t stride, const T* y, int64_t y_stride, int64_t rows, int64_t columns);
  // sum_j x[j] * y[j], in float64 and in a fixed order
  double (*dot)(const T* x, const T* y, int64_t count);
  // to[j][i] = from[i][j]
  void (*transpose)(T* to, int64_t to_stride, const T* from, int64_t stride, int64_t rows, int64_t columns);
  // sums[m][e] += sum_f up[f][e] * scales[f][m][e % period], in the order of f: factors of up are `factor` apart, rows
  // of sums sums_stride, a multiple of 64 bytes as the period is.
  void (*add_factors)(T* sums, int64_t sums_stride, const T* up, int64_t factor, int64_t factors, const T* scales,
                      int64_t period, int64_t rows, int64_t elements);
  // cosines[i] = cos(angles[i]), then angles[i] = sin(angles[i])
  void (*turn)(T* cosines, T* angles, int64_t count);
};

struct SpectralLoops {
  SpectralLoopsOf<float> f32;
  SpectralLoopsOf<double> f64;
  // Pairs of bf16 along the depth (PairLoops), of a panel of floats: element (k, i) is from(2 k, i) * scales[2 k] in
  // the low half and its odd neighbour in the high one, a zero where singles is odd; without scales those are 1.
  void (*pair_panel)(float* to, const float* from, const float* scales, int64_t width, int64_t singles);
  // add_factors of pairs of bf16. Null at the levels that never have the instruction.
  decltype(SpectralLoopsOf<float>::add_factors) add_pair_factors;
  // Pieces of `bytes` side by side: that of factor f in row i goes from `from + f * factor + i * row` to
  // `to + i * to_row + f * bytes`.
  void (*gather)(char* to, int64_t to_row, const char* from, int64_t factor, int64_t row, int64_t bytes,
                 int64_t factors, int64_t rows);
};

QUAVER_LOOPS(SpectralLoops, spectral_loops)

}  // namespace quaver::cpu
