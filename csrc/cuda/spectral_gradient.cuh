// Gradients of spectral_linear: products whose tiles are scaled, summed and stored before they leave the block.
#pragma once
#include "cuda/spectral_product.cuh"

namespace quaver::gpu {

// Elements at and at + 1; `at` is even.
template <class T>
__device__ void load_pair(const T* from, int64_t at, compute_t<T>& first, compute_t<T>& second) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  const Pair pair = reinterpret_cast<const Pair*>(from)[at / 2];
  first = widen(pair.first);
  second = widen(pair.second);
}

// ---- by tokens: the gradient of x down^T ---------------------------------------------------------------------------
// q [rows, R] = (gain * grad) up, and what becomes of it. `plain` is x down^T. R is even, as the number of factors is.
template <class T>
struct ProjectedGradient {
  using C = compute_t<T>;
  const T* plain;              // null: neither `scaled` nor `products` is asked for
  Target<T> scaled, gradient;  // c * plain and c * q; of data null: not asked for
  C* products;  // [slots, factors, rows]: sums of plain * q over a factor's columns of a tile; null: as above
  Coefficients<C> coefficients;
};

// The slots of a factor's sums: tiles of `columns` that its columns can lie in.
inline int64_t product_slots(int64_t rank, int64_t columns) { return (rank + columns - 2) / columns + 1; }

// Shared memory: first the tiles of a product, then the products of its results with `plain`, in pairs. They are
// written by quads of lanes and read by a lane for a row: `slot` keeps both out of each other's banks.
template <class T, class S>
union ProjectedShared {
  struct alignas(2 * sizeof(compute_t<T>)) Pair {
    compute_t<T> first, second;
  };
  typename Gemm<T, S, false, true>::Buffers buffers;
  Pair pairs[S::kRows][S::kColumns / 2];

  __device__ static int slot(int row, int pair) { return pair ^ (row % 4 * 4 + row / 4 % 4); }
};

template <class T, class S>
__global__ void __launch_bounds__(kGemmThreads)
    projected_gradient_kernel(ProjectedGradient<T> result, Operand<T> grad, GroupedOperand<T> up,
                              Gain<compute_t<T>> gain) {
  using C = compute_t<T>;
  using Product = Gemm<T, S, false, true>;
  using Shared = ProjectedShared<T, S>;
  QUAVER_DYNAMIC_SHARED(Shared, shared);
  const TilePlace<S> place(grad.rows);
  const int64_t rows = grad.rows, columns = up.rows;
  Sums<T, S> sums;
  Product::accumulate(sums, shared->buffers, grad, up, 0, place.row, place.column, 0, Product::steps(grad),
                      gain.along_depth(grad.depth));
  sums.for_pairs([&](int row_, int column_, C& first, C& second) {
    const int64_t row = place.row + row_, column = place.column + column_, at = row * columns + column;
    if (row >= rows || column >= columns) return;
    const C of_first = result.coefficients.at(row, column), of_second = result.coefficients.at(row, column + 1);
    if (result.gradient.data) {
      result.gradient.store_pair(at, multiply(of_first, first), multiply(of_second, second), true);
    }
    if (!result.plain) return;
    C plain_first, plain_second;
    load_pair(result.plain, at, plain_first, plain_second);
    if (result.scaled.data) {
      result.scaled.store_pair(at, multiply(of_first, plain_first), multiply(of_second, plain_second), true);
    }
    shared->pairs[row_][Shared::slot(row_, column_ / 2)] = {multiply(plain_first, first),
                                                            multiply(plain_second, second)};
  });
  if (!result.products) return;
  __syncthreads();
  const int row = int(threadIdx.x), last = int(min(int64_t(S::kColumns), columns - place.column));
  if (row >= S::kRows || place.row + row >= rows) return;
  const uint32_t rank = result.coefficients.rank;
  uint32_t factor = uint32_t(place.column) / rank, in_factor = uint32_t(place.column) % rank;
  C sum = 0;
  const auto take = [&](C value, int column) {
    sum = add(sum, value);
    in_factor++;
    if (in_factor < rank && column + 1 < last) return;
    const int64_t slot = blockIdx.y - factor * rank / uint32_t(S::kColumns);
    result.products[(slot * result.coefficients.factors + factor) * rows + place.row + row] = sum;
    sum = 0;
    in_factor = 0;
    factor++;
  };
  for (int column = 0; column < last; column += 2) {
    const auto pair = shared->pairs[row][Shared::slot(row, column / 2)];
    take(pair.first, column);
    if (column + 1 < last) take(pair.second, column + 1);
  }
}

// ---- sums of a tile's lines, beside its own rows and columns -------------------------------------------------------
// The sums of this thread's elements in each of its rows, then of its warp's columns.
template <class T, class S>
struct LineSums {
  using C = compute_t<T>;
  C values[2 * S::kI] = {};

  // line: the number of this thread's row
  __device__ void add(int line, C value) { values[line] = quaver::add(values[line], value); }
  // partial [tiles of columns * 2, rows]
  __device__ void store(double* partial, int64_t tile, int64_t row, int64_t rows) const {
#pragma unroll
    for (int i = 0; i < 2 * S::kI; i++) {
      double sum = double(values[i]);
      for (int distance = 1; distance < 4; distance *= 2) {
        sum = quaver::add(sum, __shfl_xor_sync(0xffffffffu, sum, distance));
      }
      const int64_t number = row + Sums<T, S>::first_row() + 8 * i;
      if (threadIdx.x % 4 == 0 && number < rows) partial[(tile * 2 + threadIdx.x / 64) * rows + number] = sum;
    }
  }
};

// The same of columns, then of its warp's rows.
template <class T, class S>
struct ColumnSums {
  using C = compute_t<T>;
  C values[2 * S::kJ] = {};

  // pair: the number of this thread's pair of columns
  __device__ void add(int pair, C first, C second) {
    values[2 * pair] = quaver::add(values[2 * pair], first);
    values[2 * pair + 1] = quaver::add(values[2 * pair + 1], second);
  }
  // partial [tiles of rows * 2, columns]
  __device__ void store(C* partial, int64_t tile, int64_t column, int64_t columns) const {
#pragma unroll
    for (int i = 0; i < 2 * S::kJ; i++) {
      C sum = values[i];
      for (int distance = 4; distance < 32; distance *= 2) {
        sum = quaver::add(sum, __shfl_xor_sync(0xffffffffu, sum, distance));
      }
      const int64_t number = column + Sums<T, S>::first_column() + i / 2 * 8 + i % 2;
      if (threadIdx.x % 32 < 4 && number < columns) {
        partial[(tile * 2 + threadIdx.x / 32 % 2) * columns + number] = sum;
      }
    }
  }
};

// Where the element of a row and a column lies: columns are in groups, as those of GroupedOperand.
struct Lines {
  int64_t member_stride, stride;
  uint32_t group;
  int64_t group_stride;

  __device__ int64_t at(int64_t member, int64_t row, int64_t column) const {
    const uint32_t number = uint32_t(column) / group;
    return member * member_stride + number * group_stride + row * stride + (uint32_t(column) - number * group);
  }
  template <class T>
  __device__ void store_pair(const Target<T>& to, int64_t member, int64_t row, int64_t column, compute_t<T> first,
                             compute_t<T> second, bool has_second) const {
    const int64_t here = at(member, row, column), next = at(member, row, column + 1);
    if (next == here + 1) return to.store_pair(here, first, second, has_second);
    // A group's last column: there are more groups, for their number is even.
    to.store(here, first);
    to.store(next, second);
  }
};

// ---- a^T b ---------------------------------------------------------------------------------------------------------
template <class T>
struct Outer {
  Target<T> out;  // of data null: not asked for
  Lines lines;
  Gain<compute_t<T>> gain;  // of a row
  // For the gain's gradient: the sums of the products (without gain) with `other`, of each row and half a tile.
  Values<T> other;
  Lines of_other;
  double* of_gain;  // [members * tiles of columns * 2, rows], or null
};

// out [members, rows, columns] = gain * a^T b for a [members, depth, rows] and b [members, depth, columns].
template <class T, class S>
__global__ void __launch_bounds__(kGemmThreads) outer_kernel(Outer<T> result, Operand<T> a, Operand<T> b) {
  using C = compute_t<T>;
  using Product = Gemm<T, S, true, true>;
  QUAVER_DYNAMIC_SHARED(typename Product::Buffers, buffers);
  const TilePlace<S> place(a.rows);
  Sums<T, S> sums;
  Product::accumulate(sums, *buffers, a, b, place.member, place.row, place.column);
  LineSums<T, S> of_gain;
  sums.for_places([&](int line, int, int row_, int column_, C& first, C& second) {
    const int64_t row = place.row + row_, column = place.column + column_;
    if (row >= a.rows || column >= b.rows) return;
    const bool has_second = column + 1 < b.rows;
    if (result.of_gain) {
      C sum = multiply(first, result.other[result.of_other.at(place.member, row, column)]);
      if (has_second) sum = add(sum, multiply(second, result.other[result.of_other.at(place.member, row, column + 1)]));
      of_gain.add(line, sum);
    }
    if (!result.out.data) return;
    const C gain = result.gain[row];
    result.lines.store_pair(result.out, place.member, row, column, multiply(gain, first), multiply(gain, second),
                            has_second);
  });
  if (result.of_gain) {
    of_gain.store(result.of_gain, place.member * gridDim.y + blockIdx.y, place.row, a.rows);
  }
}

// ---- by Delta: from its gradient [B, N, K] to those of the factors ------------------------------------------------
template <class T>
struct UpGradient {
  using C = compute_t<T>;
  Target<T> out;  // [2n, N, r]; of data null: not asked for
  Values<T> up;
  Lines lines;         // of both
  double* of_gain;     // as Outer's, of up * sum_b c_b P_b; or null
  C* of_coefficients;  // [B, tiles of rows * 2, R]: the sums of gain * up * P_b over rows; or null
  Gain<C> gain;
  Coefficients<C> coefficients;
};

// P_b = grad_b down^T [N, R] for a tile, one sample after the other; out = gain * sum_b c_b P_b. R is even.
template <class T, class S>
__global__ void __launch_bounds__(kGemmThreads)
    up_gradient_kernel(UpGradient<T> result, Operand<T> grad, Operand<T> down, int64_t samples) {
  using C = compute_t<T>;
  using Product = Gemm<T, S, false, false>;
  QUAVER_DYNAMIC_SHARED(typename Product::Buffers, buffers);
  const TilePlace<S> place(grad.rows);
  Sums<T, S> total;
  for (int64_t b = 0; b < samples; b++) {
    Sums<T, S> sums;
    Product::accumulate(sums, *buffers, grad, down, b, place.row, place.column);
    ColumnSums<T, S> of_coefficients;
    sums.for_places([&](int, int pair, int row_, int column_, C& first, C& second) {
      const int64_t row = place.row + row_, column = place.column + column_;
      const bool has = row < grad.rows && column < down.rows;
      if (result.of_coefficients && has) {
        const C gain = result.gain[row], up = result.up[result.lines.at(0, row, column)];
        const C next = result.up[result.lines.at(0, row, column + 1)];
        of_coefficients.add(pair, multiply(multiply(gain, up), first), multiply(multiply(gain, next), second));
      }
      first = has ? multiply(first, result.coefficients.at(b, column)) : C(0);
      second = has ? multiply(second, result.coefficients.at(b, column + 1)) : C(0);
    });
    if (result.of_coefficients) {
      const int64_t tile = b * gridDim.x + blockIdx.x;
      of_coefficients.store(result.of_coefficients, tile, place.column, down.rows);
    }
    total.add(sums);
  }
  LineSums<T, S> of_gain;
  total.for_places([&](int line, int, int row_, int column_, C& first, C& second) {
    const int64_t row = place.row + row_, column = place.column + column_;
    if (row >= grad.rows || column >= down.rows) return;
    if (result.of_gain) {
      const C sum = multiply(first, result.up[result.lines.at(0, row, column)]);
      of_gain.add(line, add(sum, multiply(second, result.up[result.lines.at(0, row, column + 1)])));
    }
    if (!result.out.data) return;
    const C gain = result.gain[row];
    result.lines.store_pair(result.out, 0, row, column, multiply(gain, first), multiply(gain, second), true);
  });
  if (result.of_gain) of_gain.store(result.of_gain, blockIdx.y, place.row, grad.rows);
}

// out [R, K] = sum_b c_b (gain * up)^T grad_b.
template <class T, class S>
__global__ void __launch_bounds__(kGemmThreads)
    down_gradient_kernel(Target<T> out, GroupedOperand<T> up, Operand<T> grad, Gain<compute_t<T>> gain,
                         Coefficients<compute_t<T>> coefficients, int64_t samples) {
  using C = compute_t<T>;
  using Product = Gemm<T, S, true, true>;
  QUAVER_DYNAMIC_SHARED(typename Product::Buffers, buffers);
  const TilePlace<S> place(up.rows);
  const auto factors = gain.along_depth(up.depth);
  Sums<T, S> total;
  for (int64_t b = 0; b < samples; b++) {
    Sums<T, S> sums;
    Product::accumulate(sums, *buffers, up, grad, b, place.row, place.column, 0, Product::steps(up), factors);
    sums.for_pairs([&](int row_, int, C& first, C& second) {
      const int64_t row = place.row + row_;
      const C c = row < up.rows ? coefficients.at(b, row) : C(0);
      first = multiply(first, c);
      second = multiply(second, c);
    });
    total.add(sums);
  }
  total.for_pairs([&](int row_, int column_, C& first, C& second) {
    const int64_t row = place.row + row_, column = place.column + column_;
    if (row >= up.rows || column >= grad.rows) return;
    out.store_pair(row * grad.rows + column, first, second, column + 1 < grad.rows);
  });
}

// ---- the last sums -------------------------------------------------------------------------------------------------
// out [samples, factors] from sums of parts: of each output `terms` of them, `term_stride` apart, of `length` elements
// that lie side by side.
struct Summed {
  int64_t samples, factors, sample_stride, factor_stride, terms, term_stride, length;
  uint32_t rank, tile;  // tile > 0: a factor has only the slots of the tiles that its columns lie in

  __device__ int64_t terms_of(int64_t factor) const {
    if (tile == 0) return terms;
    const uint32_t first = uint32_t(factor) * rank;
    return (first + rank - 1) / tile - first / tile + 1;
  }
};

// A warp for each output.
template <class C>
__global__ void __launch_bounds__(kSpectralThreads) sum_parts_kernel(C* out, const C* parts, Summed shape) {
  const int64_t number = int64_t(blockIdx.x) * (kSpectralThreads / kWarp) + threadIdx.x / kWarp;
  if (number >= shape.samples * shape.factors) return;
  const int64_t factor = number % shape.factors;
  const C* from = parts + number / shape.factors * shape.sample_stride + factor * shape.factor_stride;
  double sum = 0;
  for (int64_t term = 0; term < shape.terms_of(factor); term++) {
    for (int64_t i = threadIdx.x % kWarp; i < shape.length; i += kWarp) {
      sum = add(sum, double(from[term * shape.term_stride + i]));
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) out[number] = C(sum);
}

// The same where each token is a sample, from [slots, factors, rows] to [rows, factors]: by way of shared memory, so
// that both are read and written in lines.
template <class C>
__global__ void __launch_bounds__(kSpectralThreads) turn_parts_kernel(C* out, const C* parts, Summed shape) {
  __shared__ C turned[kWarp][kWarp + 1];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t first_row = int64_t(blockIdx.x) * kWarp, first_factor = int64_t(blockIdx.y) * kWarp;
  for (int i = warp; i < kWarp; i += kSpectralThreads / kWarp) {
    const int64_t factor = first_factor + i, row = first_row + lane;
    C sum = 0;
    if (factor < shape.factors && row < shape.samples) {
      for (int64_t term = 0; term < shape.terms_of(factor); term++) {
        sum = add(sum, parts[term * shape.term_stride + factor * shape.factor_stride + row]);
      }
    }
    turned[i][lane] = sum;
  }
  __syncthreads();
  for (int i = warp; i < kWarp; i += kSpectralThreads / kWarp) {
    const int64_t factor = first_factor + lane, row = first_row + i;
    if (factor < shape.factors && row < shape.samples) out[row * shape.factors + factor] = turned[lane][i];
  }
}

// out [size], or `one` for all, from partial [terms, size].
template <class T>
__global__ void __launch_bounds__(kCombine)
    sum_terms_kernel(Target<T> out, const double* partial, int64_t terms, int64_t size, bool one) {
  if (one) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < terms * size; i += blockDim.x) sum = add(sum, partial[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) out.store(0, compute_t<T>(sum));
    return;
  }
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= size) return;
  double sum = 0;
  for (int64_t term = 0; term < terms; term++) sum = add(sum, partial[term * size + n]);
  out.store(n, compute_t<T>(sum));
}

}  // namespace quaver::gpu
