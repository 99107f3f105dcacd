// Host side of the attention kernels: tensors as the kernels take them, and what window_attention.cu and
// window_exchange.cu do for njx_attention.cu.
#pragma once
#include <algorithm>
#include <tuple>

#include "common/linear_shape.h"
#include "cuda/window_summary.cuh"

namespace quaver::gpu {

using torch::stable::contiguous;
using torch::stable::new_empty;

// A width of tiles that holds `width` elements of a head.
template <class T, class F>
void dispatch_width(int64_t width, F&& f) {
  constexpr int kMost = sizeof(T) == 8 ? 32 : 128;
  STD_TORCH_CHECK(width <= kMost, "quaver: the CUDA kernels of window attention take heads of up to ", kMost,
                  " elements in this dtype, got ", width);
  using std::integral_constant;
  // Wider types have fewer widths: they are not what is trained with, and each costs time to compile.
  if constexpr (sizeof(T) == 2) {
    if (width <= 16) return f(integral_constant<int, 16>{});
    if (width > 64 && width <= 96) return f(integral_constant<int, 96>{});
  }
  if (width <= 32) return f(integral_constant<int, 32>{});
  if constexpr (sizeof(T) < 8) {
    if (width <= 64) return f(integral_constant<int, 64>{});
    f(integral_constant<int, 128>{});
  }
}

// x with the elements of a row side by side.
inline Tensor with_rows(const Tensor& x) { return x.size(3) > 1 && x.stride(3) != 1 ? contiguous(x) : x; }

template <class T, class U>
Heads<U> heads_of(const Tensor& x, U* data) {
  const auto whole = [](int64_t stride) { return stride % kPiece<T> == 0; };
  const bool packed =
      reinterpret_cast<uintptr_t>(data) % 16 == 0 && whole(x.stride(0)) && whole(x.stride(1)) && whole(x.stride(2));
  return {data, x.stride(0), x.stride(1), x.stride(2), packed};
}
template <class T>
Heads<const T> input_heads(const Tensor& x) {
  return heads_of<T>(x, input<T>(x));
}

// For a result beside x: with the heads of a token side by side where x has them so. The fake in op.py does the same.
inline Tensor empty_like_heads(const Tensor& x) {
  if (x.stride(1) >= x.stride(2)) return new_empty(x, sizes_of(x));
  return torch::stable::transpose(new_empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)}), 1, 2);
}
template <class T>
Heads<T> output_heads(Tensor& x) {
  return heads_of<T>(x, output<T>(x));
}

inline dim3 attention_grid(const Tiling& tiling, int64_t heads, int64_t batches) {
  const int64_t blocks = tiling.count * heads * batches;
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "quaver: too many windows for one launch: ", blocks, " blocks");
  return dim3(unsigned(blocks));
}

// Of kernels whose threads or warps go through `count` things in steps of the grid.
inline dim3 summary_grid(int64_t count, int64_t threads_each) {
  return dim3(unsigned(std::min<int64_t>((count * threads_each + kSummaryThreads - 1) / kSummaryThreads, 1 << 16)));
}

struct WindowArguments {
  Tensor q, k, v;
  OptionalTensor select, document_starts;
  int64_t window, exchange_tokens;
  bool causal;
  double scale;

  WindowArguments(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor select,
                  OptionalTensor document_starts, int64_t window, int64_t exchange_tokens, bool causal, double scale)
      : q(with_rows(q)),
        k(with_rows(k)),
        v(with_rows(v)),
        select(select),
        document_starts(document_starts),
        window(window),
        exchange_tokens(exchange_tokens),
        causal(causal),
        scale(scale) {}

  int64_t windows() const { return (q.size(2) + window - 1) / window; }
};

// out and, where there is select, the summary: of q's dtype or, wide, of the compute dtype.
std::tuple<Tensor, Tensor> window_forward(const WindowArguments& arguments, bool wide);
// The gradients of q, k, v and select. grad_summary: of q's dtype or the compute dtype.
std::tuple<Tensor, Tensor, Tensor, Tensor> window_backward(const OptionalTensor& grad,
                                                           const OptionalTensor& grad_summary,
                                                           const WindowArguments& arguments);

struct ExchangeArguments {
  Tensor summary;  // contiguous
  OptionalTensor source;
  bool causal;
  double scale;
};

Tensor exchange_forward(const ExchangeArguments& arguments);
// The gradient of the summary times gate[h], if there is a gate, of the summary's dtype or, wide, of the compute dtype;
// and, [B, H, W] of the compute dtype, each window's sum of grad * e.
std::tuple<Tensor, Tensor> exchange_backward(const Tensor& grad, const ExchangeArguments& arguments,
                                             const OptionalTensor& gate, bool wide);

}  // namespace quaver::gpu
