// Products of spectral_linear by tokens: x to the factors, scaled as it leaves the registers, then one tile of sums for
// both the factors and the weight. And W + Delta, whose tile multiplies the factors scaled on their way to tensor
// cores.
#pragma once
#include "cuda/gemm.cuh"
#include "cuda/noise.cuh"

namespace quaver::gpu {

constexpr int kSpectralThreads = 256;  // of kernels without tiles

// c of a row and of a column of the factors, whose columns are `rank` to a factor.
template <class C>
struct Coefficients {
  const C* values;        // [.., factors]; null: 1
  int64_t factors, rows;  // rows: that share theirs
  uint32_t rank;

  __device__ C at(int64_t row, int64_t column) const {
    return values ? values[row / rows * factors + uint32_t(column) / rank] : C(1);
  }
};

// gain_n: [N], or one for all (stride 0).
template <class C>
struct Gain {
  const C* values;  // null: 1
  int64_t stride;

  __device__ C operator[](int64_t n) const { return values ? values[n * stride] : C(1); }
  __device__ DepthFactors<C> along_depth(int64_t depth) const { return {values, stride, depth}; }
};

// The steps that a block of one of `splits` takes of `steps`.
struct Share {
  int64_t first, last;
  __device__ Share(int64_t steps, int64_t split, int64_t splits) {
    const int64_t each = (steps + splits - 1) / splits;
    first = min(steps, split * each);
    last = min(steps, first + each);
  }
};

// Which tile a block has: x goes through the members' tiles of rows, y through those of columns, z through the splits.
template <class S>
struct TilePlace {
  int64_t member, row, column;
  __device__ explicit TilePlace(int64_t rows) {
    const int64_t tiles = (rows + S::kRows - 1) / S::kRows;
    member = blockIdx.x / tiles;
    row = blockIdx.x % tiles * S::kRows;
    column = int64_t(blockIdx.y) * S::kColumns;
  }
};

// Sums [splits, members, rows, columns] of a product whose depth is split.
template <class C>
struct Parts {
  C* data;  // null: it is not
  int64_t splits;

  // of [members * rows, columns], for one of `splits`
  __device__ C* of(int64_t split, int64_t size) const { return data + split * size; }
};

template <class C>
__device__ void store_part(C* to, int64_t at, C first, C second, bool has_second) {
  to[at] = first;
  if (has_second) to[at + 1] = second;
}

// ---- x down^T ------------------------------------------------------------------------------------------------------
// Where x down^T goes, [rows, R]: as it is, and times the coefficients. R is even, as the number of factors is, so that
// a pair always has its second; the bounds that say so are left because without them float32 takes two registers more.
template <class T>
struct Projected {
  Target<T> plain, scaled;  // of data null: not asked for
  Coefficients<compute_t<T>> coefficients;
  Parts<compute_t<T>> parts;

  __device__ void store(int64_t row, int64_t column, int64_t columns, compute_t<T> first, compute_t<T> second,
                        bool has_second) const {
    const int64_t at = row * columns + column;
    if (plain.data) plain.store_pair(at, first, second, has_second);
    if (!scaled.data) return;
    first = multiply(first, coefficients.at(row, column));
    if (has_second) second = multiply(second, coefficients.at(row, column + 1));
    scaled.store_pair(at, first, second, has_second);
  }
};

template <class T, class S>
__global__ void __launch_bounds__(kGemmThreads) project_kernel(Projected<T> result, Operand<T> x, Operand<T> down) {
  using C = compute_t<T>;
  using Product = Gemm<T, S, false, false>;
  QUAVER_DYNAMIC_SHARED(typename Product::Buffers, buffers);
  const TilePlace<S> place(x.rows);
  const Share share(Product::steps(x), blockIdx.z, result.parts.splits);
  Sums<T, S> sums;
  Product::accumulate(sums, *buffers, x, down, 0, place.row, place.column, share.first, share.last);
  sums.for_pairs([&](int row_, int column_, C& first, C& second) {
    const int64_t row = place.row + row_, column = place.column + column_;
    if (row >= x.rows || column >= down.rows) return;
    const bool has_second = column + 1 < down.rows;
    if (result.parts.data) {
      store_part(result.parts.of(blockIdx.z, x.rows * down.rows), row * down.rows + column, first, second, has_second);
    } else {
      result.store(row, column, down.rows, first, second, has_second);
    }
  });
}

// ---- the factors' part, then the weight's --------------------------------------------------------------------------
template <class T>
struct Combined {
  Target<T> out;
  const T* bias;            // null, or [columns]
  Gain<compute_t<T>> gain;  // of the first product
  Parts<compute_t<T>> parts;
};

// out [members, a.rows, b.rows] = gain * a0 b0^T + a1 b1^T + bias, in one tile of sums.
template <class T, class S, bool kBByDepth>
__global__ void __launch_bounds__(kGemmThreads)
    combine_kernel(Combined<T> result, Operand<T> a0, GroupedOperand<T> b0, Operand<T> a1, Operand<T> b1) {
  using C = compute_t<T>;
  using Product = Gemm<T, S, false, kBByDepth>;
  QUAVER_DYNAMIC_SHARED(typename Product::Buffers, buffers);
  const TilePlace<S> place(a1.rows);
  const int64_t of_factors = Product::steps(a0);
  const Share share(of_factors + Product::steps(a1), blockIdx.z, result.parts.splits);
  Sums<T, S> sums;
  if (share.first < of_factors) {
    Product::accumulate(sums, *buffers, a0, b0, place.member, place.row, place.column, share.first,
                        min(share.last, of_factors));
    if (result.gain.values) {
      sums.for_pairs([&](int, int column_, C& first, C& second) {
        const int64_t column = place.column + column_;
        if (column < b1.rows) first = multiply(first, result.gain[column]);
        if (column + 1 < b1.rows) second = multiply(second, result.gain[column + 1]);
      });
    }
  }
  Product::accumulate(sums, *buffers, a1, b1, place.member, place.row, place.column,
                      max(int64_t(0), share.first - of_factors), max(int64_t(0), share.last - of_factors));
  sums.for_pairs([&](int row_, int column_, C& first, C& second) {
    const int64_t row = place.row + row_, column = place.column + column_;
    if (row >= a1.rows || column >= b1.rows) return;
    const bool has_second = column + 1 < b1.rows;
    const int64_t at = (place.member * a1.rows + row) * b1.rows + column;
    if (result.parts.data) {
      const int64_t size = gridDim.x / ((a1.rows + S::kRows - 1) / S::kRows) * a1.rows * b1.rows;
      return store_part(result.parts.of(blockIdx.z, size), at, first, second, has_second);
    }
    if (result.bias) {
      first = add(first, widen(result.bias[column]));
      if (has_second) second = add(second, widen(result.bias[column + 1]));
    }
    result.out.store_pair(at, first, second, has_second);
  });
}

// ---- what the blocks of a split depth have left, added in their order ---------------------------------------------
template <class C>
__device__ C total(const Parts<C>& parts, int64_t at, int64_t size) {
  C sum = 0;
  for (int64_t split = 0; split < parts.splits; split++) sum = add(sum, parts.of(split, size)[at]);
  return sum;
}

// Calls body(index) for each of `size` elements.
template <class Body>
__device__ void for_elements(int64_t size, Body&& body) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) body(i);
}

template <class T>
__global__ void __launch_bounds__(kSpectralThreads)
    finish_projected_kernel(Projected<T> result, int64_t rows, int64_t columns) {
  for_elements(rows * columns, [&](int64_t i) {
    result.store(i / columns, i % columns, columns, total(result.parts, i, rows * columns), 0, false);
  });
}

template <class T>
__global__ void __launch_bounds__(kSpectralThreads)
    finish_combined_kernel(Combined<T> result, int64_t size, int64_t columns) {
  for_elements(size, [&](int64_t i) {
    compute_t<T> sum = total(result.parts, i, size);
    if (result.bias) sum = add(sum, widen(result.bias[i % columns]));
    result.out.store(i, sum);
  });
}

// ---- Delta ---------------------------------------------------------------------------------------------------------
// c of each column of the factors, [B, R]: what a depth of them is multiplied by.
template <class C>
__global__ void __launch_bounds__(kSpectralThreads)
    spread_kernel(C* out, const C* coefficients, int64_t size, uint32_t rank) {
  for_elements(size, [&](int64_t i) { out[i] = coefficients[i / rank]; });
}

// out [B, N, K] = gain * up diag(c_b) down + weight. A block has a tile of one sample.
template <class T, class S>
__global__ void __launch_bounds__(kGemmThreads)
    delta_kernel(Target<T> out, Values<T> weight, Gain<compute_t<T>> gain, GroupedOperand<T> up, Operand<T> down,
                 const compute_t<T>* spread) {
  using C = compute_t<T>;
  using Product = Gemm<T, S, false, true>;
  QUAVER_DYNAMIC_SHARED(typename Product::Buffers, buffers);
  const TilePlace<S> place(up.rows);
  const DepthFactors<C> factors = {spread + place.member * up.depth, 1, up.depth};
  Sums<T, S> sums;
  Product::accumulate(sums, *buffers, up, down, 0, place.row, place.column, 0, Product::steps(up), factors);
  sums.for_pairs([&](int row_, int column_, C& first, C& second) {
    const int64_t row = place.row + row_, column = place.column + column_;
    if (row >= up.rows || column >= down.rows) return;
    const bool has_second = column + 1 < down.rows;
    first = multiply(first, gain[row]);
    second = multiply(second, gain[row]);
    const int64_t at = row * down.rows + column;
    if (weight.data) {
      first = add(first, weight[at]);
      if (has_second) second = add(second, weight[at + 1]);
    }
    out.store_pair(place.member * up.rows * down.rows + at, first, second, has_second);
  });
}

// out [B, N, K] = weight + gain * delta, whose rows are at strides and are `whole` groups of 16 bytes or not.
template <class T>
struct StridedRows {
  Values<T> values;
  int64_t member_stride, stride;
};

template <class V, int G>
__device__ void load_widened(const void* data, const Part& part, compute_t<V> (&out)[G]) {
  V values[G];
  load(static_cast<const V*>(data), part, values);
#pragma unroll
  for (int i = 0; i < G; i++) out[i] = widen(values[i]);
}

template <class T>
__global__ void __launch_bounds__(kSpectralThreads)
    add_delta_kernel(T* out, Values<T> weight, StridedRows<T> delta, Gain<compute_t<T>> gain, int64_t members,
                     int64_t rows, int64_t columns, bool packed) {
  using C = compute_t<T>;
  constexpr int G = kGroup<T>;
  const int64_t groups = (columns + G - 1) / G;
  for_elements(members * rows * groups, [&](int64_t i) {
    const int64_t row = i / groups % rows, member = i / groups / rows, column = i % groups * G;
    Part part = {0, 0, column, columns, packed && column + G <= columns};
    const auto read = [&](const Values<T>& from, int64_t line, C(&values)[G]) {
      part.at = line + column;
      from.wide ? load_widened<C>(from.data, part, values) : load_widened<T>(from.data, part, values);
    };
    C of_delta[G], of_weight[G];
    read(delta.values, member * delta.member_stride + row * delta.stride, of_delta);
    read(weight, row * columns, of_weight);
    T sums[G];
#pragma unroll
    for (int j = 0; j < G; j++) sums[j] = narrow<T>(add(of_weight[j], multiply(gain[row], of_delta[j])));
    part.at = (member * rows + row) * columns + column;
    store(out, part, sums);
  });
}

// ---- coefficients --------------------------------------------------------------------------------------------------
__device__ inline void sine_and_cosine(float x, float* sine, float* cosine) { sincosf(x, sine, cosine); }
__device__ inline void sine_and_cosine(double x, double* sine, double* cosine) { sincos(x, sine, cosine); }

// out [rows, 2n]: cosines, then sines, of the angles [rows, n] that the blocks of a split depth have left.
template <class C>
__global__ void __launch_bounds__(kSpectralThreads) waves_kernel(C* out, Parts<C> angles, int64_t rows, int64_t n) {
  for_elements(rows * n, [&](int64_t i) {
    C* to = out + i / n * 2 * n + i % n;
    sine_and_cosine(total(angles, i, rows * n), to + n, to);
  });
}

// out [rows, n]: the gradient of the angles, from that of the coefficients and these themselves.
template <class C>
__global__ void __launch_bounds__(kSpectralThreads)
    angle_gradient_kernel(C* out, const C* grad, const C* coefficients, int64_t rows, int64_t n) {
  for_elements(rows * n, [&](int64_t i) {
    const int64_t at = i / n * 2 * n + i % n;
    out[i] = quaver::add(multiply(grad[at + n], coefficients[at]), -multiply(grad[at], coefficients[at + n]));
  });
}

}  // namespace quaver::gpu
