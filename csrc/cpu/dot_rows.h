// A product of few rows with perturbed weights: dot products, in one pass over the weights that makes their noise.
#pragma once
#include "cpu/dot_loops.h"
#include "cpu/perturbed_weight.h"

namespace quaver::cpu {

template <class T>
const DotLoopsOf<T>& dot_loops_of();
template <>
inline const DotLoopsOf<float>& dot_loops_of<float>() {
  return dot_loops().f32;
}
template <>
inline const DotLoopsOf<double>& dot_loops_of<double>() {
  return dot_loops().f64;
}

// Rows of weights at a time: with 256 columns of them and of 16 inputs, the L1 cache holds what is made and read.
constexpr int64_t kDotTileRows = 8;

// C [rows, N] = A [rows, K] W'^T + bias.
template <class T>
void dot_rows(int64_t rows, const Matrix<T>& a, const PerturbedWeight<T>& weight, const Result<T>& c) {
  const auto& loops = dot_loops_of<T>();
  const int64_t columns = weight.place.rows, depth = weight.place.columns;
  if (rows == 0 || columns == 0) return;
  // The inputs once, widened, their rows no multiple of 4 KiB apart.
  const int64_t stride = round_up(depth, 16) + 16;
  T* inputs = workspace<T>(Use::kPackedA, rows * stride);
  for (int64_t m = 0; m < rows; m++) {
    if (a.widen) {
      a.widen->widen(inputs + m * stride, a.data, m * a.stride, depth);
    } else {
      std::copy_n(reinterpret_cast<const T*>(a.data) + m * a.stride, depth, inputs + m * stride);
    }
  }
  // A tile of noise at a time where rows begin with a group of it, else whole rows.
  const int64_t step = std::max<int64_t>(1, std::min(depth, weight.aligned() ? kTile : kLongRun));
  const auto tiles = [&](int64_t begin, int64_t end) {
    T* made = workspace<T>(Use::kRows, kDotTileRows * step);
    T* sums = workspace<T>(Use::kPanel, kDotTileRows * rows * (loops.lanes + 1));
    T* totals = sums + kDotTileRows * rows * loops.lanes;
    for (int64_t n = begin * kDotTileRows; n < std::min(columns, end * kDotTileRows); n += kDotTileRows) {
      const int64_t height = std::min(kDotTileRows, columns - n);
      std::fill_n(sums, height * rows * loops.lanes, T(0));
      for (int64_t k = 0; k < depth; k += step) {
        const int64_t length = std::min(step, depth - k);
        weight.make(made, n, height, k, length);
        loops.add(sums, made, length, height, inputs + k, stride, rows, length);
      }
      loops.total(totals, sums, height * rows);
      for (int64_t m = 0; m < rows; m++) {
        T line[kDotTileRows];
        for (int64_t i = 0; i < height; i++) line[i] = totals[i * rows + m] + (c.bias ? c.bias[n + i] : T(0));
        if (c.narrow) {
          c.narrow->store(c.to, m * c.stride + n, line, height);
        } else {
          std::copy_n(line, height, static_cast<T*>(c.to) + m * c.stride + n);
        }
      }
    }
  };
  const int64_t count = ceil_div(columns, kDotTileRows);
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kDotTileRows * depth)),
                              tiles);
}

}  // namespace quaver::cpu
