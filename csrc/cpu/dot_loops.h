// Dot products of a few rows with many, compiled once per instruction set: what a product with few rows comes down to
// where both operands are contiguous along the depth, so that neither is packed.
#pragma once
#include <cstdint>

#include "cpu/simd_level.h"

namespace quaver::cpu {

template <class T>
struct DotLoopsOf {
  // Partial sums that a dot product is kept in: element k is added to number k % lanes.
  int lanes;
  // sums[(i * x_rows + m) * lanes + ..] += those of w[i * w_stride ..] times x[m * x_stride ..], each of depth
  // elements.
  void (*add)(T* sums, const T* w, int64_t w_stride, int64_t w_rows, const T* x, int64_t x_stride, int64_t x_rows,
              int64_t depth);
  // out[i] = the sum of sums[i * lanes ..], in an order of its own.
  void (*total)(T* out, const T* sums, int64_t count);
};

struct DotLoops {
  DotLoopsOf<float> f32;
  DotLoopsOf<double> f64;
};

QUAVER_LOOPS(DotLoops, dot_loops)

}  // namespace quaver::cpu
