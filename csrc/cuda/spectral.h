// Host code that the ops of spectral_linear share: their tensors as operands, and the launches of their products.
#pragma once
#include <algorithm>

#include "common/integers.h"
#include "common/linear_shape.h"
#include "cuda/library_product.h"
#include "cuda/linear_gradient.cuh"
#include "cuda/spectral_gradient.cuh"

namespace quaver::gpu {

using torch::stable::contiguous;
using torch::stable::new_empty;

// Blocks that fill any GPU: smaller tiles, then splits of the depth are taken where there are fewer.
#ifdef __CUDACC__
constexpr int64_t kEnoughTiles = 132;
#else
constexpr int64_t kEnoughTiles = 4;  // so that the emulator's small tests have large tiles
#endif
// Steps of the depth that a split has at least.
constexpr int64_t kStepsOfSplit = 4;

// ---- tensors -------------------------------------------------------------------------------------------------------
inline Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  const Tensor from = contiguous(x);
  if (from.scalar_type() == dtype) return from;
  Tensor out = new_empty(from, sizes_of(from), dtype);
  torch::stable::copy_(out, from);
  return out;
}

inline Tensor reshaped(const Tensor& x, std::vector<int64_t> sizes) { return torch::stable::view(x, sizes); }

// [B, T, columns], whose rows' elements lie side by side.
struct Tokens {
  Tensor tensor;
  int64_t batch, length, columns, sample_stride, stride;

  explicit Tokens(const Tensor& x) : tensor(x), batch(x.size(0)), length(x.size(1)), columns(x.size(2)) {
    if (columns > 1 && x.stride(2) != 1) tensor = contiguous(x);
    sample_stride = tensor.stride(0);
    stride = tensor.stride(1);
    // Lines that overlap, as those of an expanded tensor, are no operand's.
    if ((length > 1 && stride < columns) || (batch > 1 && sample_stride < columns)) *this = Tokens(copied(tensor));
  }

  int64_t rows() const { return batch * length; }
  // Whether all rows are one matrix.
  bool is_matrix() const { return batch <= 1 || length == 0 || sample_stride == length * stride || length == 1; }

  // All rows [B * T, columns]; of a tensor that is_matrix().
  template <class T>
  Operand<T> all() const {
    const int64_t line = length == 1 && batch > 1 ? sample_stride : stride;
    return {input<T>(tensor), rows() > 1 ? line : columns, 0, rows(), columns};
  }
  // Those of each sample.
  template <class T>
  Operand<T> samples() const {
    return {input<T>(tensor), length > 1 ? stride : columns, batch > 1 ? sample_stride : 0, length, columns};
  }
  Tensor matrix() const { return torch::stable::reshape(tensor, std::vector<int64_t>{rows(), columns}); }

 private:
  static Tensor copied(const Tensor& x) {
    Tensor out = new_empty(x, sizes_of(x));
    torch::stable::copy_(out, x);
    return out;
  }
};

// The same, where the rows need to be one matrix.
inline Tokens as_matrix(const Tokens& x) { return x.is_matrix() ? x : Tokens(contiguous(x.tensor)); }

template <class T>
Operand<T> by_depth(Operand<T> from) {
  std::swap(from.rows, from.depth);
  return from;
}
template <class T>
GroupedOperand<T> by_depth(GroupedOperand<T> from) {
  std::swap(from.rows, from.depth);
  return from;
}
template <class T>
GroupedOperand<T> in_one_group(const Operand<T>& from) {
  constexpr int64_t kPiece = 16 / sizeof(T);
  return {from, ceil_div(std::max<int64_t>(1, std::max(from.rows, from.depth)), kPiece) * kPiece, 0};
}

template <class T>
Values<T> values_of(const Tensor& x) {
  using C = compute_t<T>;
  if (x.element_size() == sizeof(T)) return {input<T>(x), false};
  return {input<C>(x), true};
}
template <class T>
Target<T> target_of(Tensor& x) {
  using C = compute_t<T>;
  if (x.element_size() == sizeof(T)) return {output<T>(x), false};
  return {output<C>(x), true};
}

// down [2n, r, K] and up [2n, N, r].
struct Factors {
  Tensor down, up;  // as given
  int64_t factors, rank, inputs, outputs;

  Factors(const Tensor& down_, const Tensor& up_)
      : down(contiguous(down_)),
        up(contiguous(up_)),
        factors(down.size(0)),
        rank(down.size(1)),
        inputs(down.size(2)),
        outputs(up.size(1)) {
    STD_TORCH_CHECK(up.size(0) == factors && up.size(2) == rank, "quaver: up does not fit down");
    STD_TORCH_CHECK(up.scalar_type() == down.scalar_type(), "quaver: up and down differ in dtype");
    STD_TORCH_CHECK(columns() < int64_t(1) << 31, "quaver: too many columns of factors");
    STD_TORCH_CHECK(factors % 2 == 0, "quaver: an odd number of factors");
    check_same_device(up, down);
  }

  int64_t columns() const { return factors * rank; }
  uint32_t divisor() const { return uint32_t(std::max<int64_t>(1, rank)); }
  // Where up's element of an output and a column lies.
  Lines lines() const { return {0, rank, divisor(), outputs * rank}; }
};

// The factors in the dtype of x.
template <class T>
struct FactorOperands {
  Tensor down_, up_;
  Operand<T> down;       // [R, K]
  GroupedOperand<T> up;  // [N, R]

  FactorOperands(const Factors& of, ScalarType dtype)
      : down_(in_dtype(of.down, dtype)),
        up_(in_dtype(of.up, dtype)),
        down(input<T>(down_), of.inputs, 0, of.columns(), of.inputs),
        up(Operand<T>(input<T>(up_), of.rank, 0, of.outputs, of.columns()), of.divisor(), of.outputs * of.rank) {
    if (up.packed || up.halves || of.factors < 2) return;
    // Ranks that 8 bytes do not divide: the lines are put together once, so that they can be copied by pieces.
    up_ = contiguous(torch::stable::transpose(up_, 0, 1));
    up = in_one_group(Operand<T>(input<T>(up_), of.columns(), 0, of.outputs, of.columns()));
  }
};

template <class T>
Gain<compute_t<T>> gain_of(const OptionalTensor& gain, std::optional<Tensor>& kept) {
  if (!gain) return {nullptr, 0};
  kept = contiguous(*gain);
  return {input<compute_t<T>>(*kept), gain->dim() == 0 ? 0 : 1};
}

// ---- launches ------------------------------------------------------------------------------------------------------
template <class T, class Run>
void with_tile(int64_t rows, int64_t columns, int64_t members, Run&& run) {
  if constexpr (sizeof(T) == 2) {
    if (ceil_div(rows, LargeTile::kRows) * ceil_div(columns, LargeTile::kColumns) * members >= kEnoughTiles) {
      return run(LargeTile{});
    }
  }
  run(SmallTile{});
}

template <class S>
dim3 tile_grid(int64_t rows, int64_t columns, int64_t members, int64_t splits = 1) {
  STD_TORCH_CHECK(ceil_div(columns, S::kColumns) < 65536, "quaver: too many columns");
  return dim3(unsigned(ceil_div(rows, S::kRows) * members), unsigned(ceil_div(columns, S::kColumns)), unsigned(splits));
}

// Of a depth of `steps`, so that there are enough blocks.
template <class S>
int64_t splits_of(int64_t rows, int64_t columns, int64_t members, int64_t steps) {
  const int64_t tiles = std::max<int64_t>(1, ceil_div(rows, S::kRows) * ceil_div(columns, S::kColumns) * members);
  if (tiles * 2 > kEnoughTiles) return 1;
  const int64_t wanted = std::min(ceil_div(2 * kEnoughTiles, tiles), steps / kStepsOfSplit);
  return wanted < 2 ? 1 : ceil_div(steps, ceil_div(steps, wanted));
}

inline dim3 element_grid(int64_t size) {
  return dim3(unsigned(std::min<int64_t>(ceil_div(size, kSpectralThreads), 1 << 16)));
}

// x down^T to `result`, and a kernel that finishes it where the depth is split.
template <class T>
void project(Projected<T> result, const Operand<T>& x, const Operand<T>& down, const Tensor& like) {
  using C = compute_t<T>;
  with_tile<T>(x.rows, down.rows, 1, [&](auto shape) {
    using S = decltype(shape);
    using Product = Gemm<T, S, false, false>;
    const int64_t splits = splits_of<S>(x.rows, down.rows, 1, Product::steps(x)), size = x.rows * down.rows;
    Tensor parts = new_empty(like, {splits > 1 ? splits * size : 0}, compute_dtype(like.scalar_type()));
    result.parts = {splits > 1 ? output<C>(parts) : nullptr, splits};
    launch(project_kernel<T, S>, tile_grid<S>(x.rows, down.rows, 1, splits), dim3(kGemmThreads),
           sizeof(typename Product::Buffers), current_stream(like), result, x, down);
    if (splits == 1) return;
    result.parts.data = const_cast<C*>(input<C>(parts));
    launch(finish_projected_kernel<T>, element_grid(size), dim3(kSpectralThreads), 0, current_stream(like), result,
           x.rows, down.rows);
  });
}

template <bool kBByDepth, class T>
void combine(Combined<T> result, const Operand<T>& a0, const GroupedOperand<T>& b0, const Operand<T>& a1,
             const Operand<T>& b1, int64_t members, const Tensor& like) {
  using C = compute_t<T>;
  with_tile<T>(a1.rows, b1.rows, members, [&](auto shape) {
    using S = decltype(shape);
    using Product = Gemm<T, S, false, kBByDepth>;
    const int64_t steps = Product::steps(a0) + Product::steps(a1), size = members * a1.rows * b1.rows;
    const int64_t splits = splits_of<S>(a1.rows, b1.rows, members, steps);
    Tensor parts = new_empty(like, {splits > 1 ? splits * size : 0}, compute_dtype(like.scalar_type()));
    result.parts = {splits > 1 ? output<C>(parts) : nullptr, splits};
    launch(combine_kernel<T, S, kBByDepth>, tile_grid<S>(a1.rows, b1.rows, members, splits), dim3(kGemmThreads),
           sizeof(typename Product::Buffers), current_stream(like), result, a0, b0, a1, b1);
    if (splits == 1) return;
    result.parts.data = const_cast<C*>(input<C>(parts));
    launch(finish_combined_kernel<T>, element_grid(size), dim3(kSpectralThreads), 0, current_stream(like), result, size,
           b1.rows);
  });
}

// The same of one product.
template <bool kBByDepth, class T>
void multiply_members(T* out, const T* bias, const Operand<T>& a, const Operand<T>& b, int64_t members,
                      const Tensor& like) {
  Operand<T> none = a, no_columns = b;
  none.depth = no_columns.depth = 0;
  combine<kBByDepth>({{out, false}, bias, {nullptr, 0}, {nullptr, 1}}, none, in_one_group(no_columns), a, b, members,
                     like);
}

// partial [terms, size] to out [size], or to a 0-dim one.
template <class T>
void sum_terms(Tensor& out, const Tensor& partial, int64_t terms, int64_t size) {
  if (out.numel() == 0) return;
  const bool one = out.dim() == 0;
  launch(sum_terms_kernel<T>, dim3(one ? 1u : unsigned(ceil_div(size, kCombine))), dim3(kCombine), 0,
         current_stream(out), target_of<T>(out), input<double>(partial), terms, size, one);
}

// of_gain: the gradient of the gain, or null.
template <class T>
void outer(Outer<T> result, const Operand<T>& a, const Operand<T>& b, int64_t members, const Tensor& like,
           Tensor* of_gain = nullptr) {
  with_tile<T>(a.rows, b.rows, members, [&](auto shape) {
    using S = decltype(shape);
    const dim3 grid = tile_grid<S>(a.rows, b.rows, members);
    const int64_t terms = members * int64_t(grid.y) * 2;
    Tensor partial = new_empty(like, {of_gain ? terms : 0, a.rows}, ScalarType::Double);
    if (of_gain) result.of_gain = output<double>(partial);
    launch(outer_kernel<T, S>, grid, dim3(kGemmThreads), sizeof(typename Gemm<T, S, true, true>::Buffers),
           current_stream(like), result, a, b);
    if (of_gain) sum_terms<T>(*of_gain, partial, terms, a.rows);
  });
}

// a^T b of two matrices of rows [rows, N] and [rows, K], in `out`'s dtype: the library's product where it has one.
template <class T>
void plain_outer(Tensor& out, const Tokens& a, const Tokens& b) {
  if (out.numel() == 0) return;
  if (library_makes(a.tensor, out.scalar_type())) {
    out = reshaped(library_product(torch::stable::transpose(a.matrix(), 0, 1), b.matrix(), out.scalar_type()),
                   sizes_of(out));
    return;
  }
  const Lines lines = {0, b.columns, 1u << 31, 0};
  outer<T>({target_of<T>(out), lines, {nullptr, 0}, {nullptr, false}, lines, nullptr}, by_depth(as_matrix(a).all<T>()),
           by_depth(as_matrix(b).all<T>()), 1, a.tensor);
}

template <class C>
void sum_parts(Tensor& out, const C* parts, const Summed& shape) {
  if (out.numel() == 0) return;
  const auto stream = current_stream(out);
  if (shape.length != 1 || shape.sample_stride != 1) {
    const int64_t blocks = ceil_div(shape.samples * shape.factors, kSpectralThreads / kWarp);
    return launch(sum_parts_kernel<C>, dim3(unsigned(blocks)), dim3(kSpectralThreads), 0, stream, output<C>(out), parts,
                  shape);
  }
  const dim3 grid(unsigned(ceil_div(shape.samples, kWarp)), unsigned(ceil_div(shape.factors, kWarp)));
  launch(turn_parts_kernel<C>, grid, dim3(kSpectralThreads), 0, stream, output<C>(out), parts, shape);
}

// q = (gain * grad) up and what is made of it; of_coefficients: their gradient, or null.
template <class T>
void projected_gradient(ProjectedGradient<T> result, const Operand<T>& grad, const GroupedOperand<T>& up,
                        const Gain<compute_t<T>>& gain, Tensor* of_coefficients, const Tensor& like) {
  using C = compute_t<T>;
  const auto& coefficients = result.coefficients;
  with_tile<T>(grad.rows, up.rows, 1, [&](auto shape) {
    using S = decltype(shape);
    const int64_t slots = of_coefficients ? product_slots(coefficients.rank, S::kColumns) : 0;
    const int64_t of_slot = coefficients.factors * grad.rows;
    Tensor products = new_empty(like, {slots * of_slot}, compute_dtype(like.scalar_type()));
    if (of_coefficients) result.products = output<C>(products);
    launch(projected_gradient_kernel<T, S>, tile_grid<S>(grad.rows, up.rows, 1), dim3(kGemmThreads),
           sizeof(ProjectedShared<T, S>), current_stream(like), result, grad, up, gain);
    if (!of_coefficients) return;
    // Without rows or columns nothing is written: then there is nothing to add.
    const int64_t size = grad.rows * up.rows;
    const Summed summed = {of_coefficients->numel() / std::max<int64_t>(1, coefficients.factors),
                           coefficients.factors,
                           coefficients.rows,
                           grad.rows,
                           0,
                           of_slot,
                           coefficients.rows,
                           coefficients.rank,
                           size > 0 ? uint32_t(S::kColumns) : 0};
    sum_parts(*of_coefficients, input<C>(products), summed);
  });
}

// The sums of the columns of grad.
template <class T>
void bias_gradient(Tensor& out, const Tokens& grad_) {
  const Tokens grad = as_matrix(grad_);
  const int64_t rows_of_chunk = std::max<int64_t>(64, ceil_div(grad.rows(), 1024));
  const int64_t chunks = ceil_div(grad.rows(), rows_of_chunk);
  Tensor partial = new_empty(grad.tensor, {chunks, grad.columns}, ScalarType::Double);
  launch(column_sums_kernel<T>, dim3(unsigned(ceil_div(grad.columns, kThreads * kGroup<T>)), unsigned(chunks)),
         dim3(kThreads), 0, current_stream(out), output<double>(partial), by_depth(grad.all<T>()), rows_of_chunk, 1);
  sum_terms<T>(out, partial, chunks, grad.columns);
}

}  // namespace quaver::gpu
