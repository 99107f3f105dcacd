// What products of few rows by dot products share: nothing is packed, each row of the weights is read once.
#pragma once
#include "cpu/dot_loops.h"
#include "cpu/gemm_operands.h"

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

// The distance of rows of inputs of `depth`: no multiple of 4 KiB.
inline int64_t dot_stride(int64_t depth) { return round_up(depth, 16) + 16; }

// The inputs once, as Ts.
template <class T>
void widen_rows(T* to, int64_t stride, const Matrix<T>& a, int64_t rows, int64_t depth) {
  for (int64_t m = 0; m < rows; m++) {
    if (a.widen) {
      a.widen->widen(to + m * stride, a.data, m * a.stride, depth);
    } else {
      std::copy_n(reinterpret_cast<const T*>(a.data) + m * a.stride, depth, to + m * stride);
    }
  }
}

// Writes columns n .. n + height - 1 of the rows of c, from totals [height, rows].
template <class T>
void store_dots(const Result<T>& c, const T* totals, int64_t n, int64_t height, int64_t rows) {
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

// body(n, height, sums, totals) for tiles of `columns` rows of weights of `depth`: sums [height, rows, lanes] are 0,
// and room for their totals [height, rows].
template <class T, class Body>
void for_dot_tiles(int64_t rows, int64_t columns, int64_t depth, Body&& body) {
  const int64_t lanes = dot_loops_of<T>().lanes, grain = kGrain / std::max<int64_t>(1, kDotTileRows * depth);
  torch::stable::parallel_for(
      0, ceil_div(columns, kDotTileRows), std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
        T* sums = workspace<T>(Use::kPanel, kDotTileRows * rows * (lanes + 1));
        for (int64_t n = begin * kDotTileRows; n < std::min(columns, end * kDotTileRows); n += kDotTileRows) {
          const int64_t height = std::min(kDotTileRows, columns - n);
          std::fill_n(sums, height * rows * lanes, T(0));
          body(n, height, sums, sums + kDotTileRows * rows * lanes);
        }
      });
}

}  // namespace quaver::cpu
