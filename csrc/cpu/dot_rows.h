// A product of few rows with perturbed weights: dot products, in one pass over the weights that makes their noise.
#pragma once
#include "cpu/dot_products.h"
#include "cpu/perturbed_weight.h"

namespace quaver::cpu {

// C [rows, N] = A [rows, K] W'^T + bias.
template <class T>
void dot_rows(int64_t rows, const Matrix<T>& a, const PerturbedWeight<T>& weight, const Result<T>& c) {
  const auto& loops = dot_loops_of<T>();
  const int64_t columns = weight.place.rows, depth = weight.place.columns;
  if (rows == 0 || columns == 0) return;
  const int64_t stride = dot_stride(depth);
  T* inputs = workspace<T>(Use::kPackedA, rows * stride);
  widen_rows(inputs, stride, a, rows, depth);
  // A tile of noise at a time where rows begin with a group of it, else whole rows.
  const int64_t step = std::max<int64_t>(1, std::min(depth, weight.aligned() ? kTile : kLongRun));
  for_dot_tiles<T>(rows, columns, depth, [&](int64_t n, int64_t height, T* sums, T* totals) {
    T* made = workspace<T>(Use::kRows, kDotTileRows * step);
    for (int64_t k = 0; k < depth; k += step) {
      const int64_t length = std::min(step, depth - k);
      weight.make(made, n, height, k, length);
      loops.add(sums, made, length, height, inputs + k, stride, rows, length);
    }
    loops.total(totals, sums, height * rows);
    store_dots(c, totals, n, height, rows);
  });
}

}  // namespace quaver::cpu
