// torch.ops.quaver.window_exchange and its backward on CUDA. Schemas: kernels/window_attention/op.py.
#include "cuda/attention.h"
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"

namespace quaver::gpu {

namespace {

// One call, as the kernels take it: each window's summary is key and value, and the query of others.
template <class T>
struct Call {
  Attention<T> attention;
  int64_t batches;
  Tensor source;
  Stream stream;

  explicit Call(const ExchangeArguments& of) : Call(of, input_heads<T>(of.summary), of.summary.size(2)) {}

  Call(const ExchangeArguments& of, const Heads<const T>& z, int64_t windows)
      : attention{z,
                  z,
                  z,
                  {nullptr, 0, windows, of.causal},
                  {windows, std::max<int64_t>(1, windows), of.causal, 1, nullptr, 0, 0},
                  Tiling(windows, windows, kTileRows<T>, true),  // one row after the other
                  of.summary.size(1),
                  1,
                  int(of.summary.size(3)),
                  compute_t<T>(of.scale)},
        batches(of.summary.size(0)),
        stream(current_stream(of.summary)) {
    if (!of.source) return;
    source = contiguous(*of.source);
    attention.sources.indexes = input<int64_t>(source);
    attention.sources.batch_stride = source.dim() == 2 ? windows : 0;
  }

  dim3 grid() const { return attention_grid(attention.tiling, attention.heads, batches); }
};

}  // namespace

Tensor exchange_forward(const ExchangeArguments& arguments) {
  const Tensor& z = arguments.summary;
  Tensor e = new_empty(z, sizes_of(z));
  dispatch_floating(z.scalar_type(), "window_exchange", [&](auto element) {
    using T = decltype(element);
    const Call<T> call(arguments);
    const ForwardResult<T> result{output_heads<T>(e), {}, {nullptr, false}, nullptr};
    dispatch_width<T>(z.size(3), [&](auto width) {
      using Shared = ForwardShared<T, width()>;
      launch(attention_forward_kernel<T, width(), true>, call.grid(), dim3(kAttentionThreads<T>), sizeof(Shared),
             call.stream, call.attention, result);
    });
  });
  return e;
}

std::tuple<Tensor, Tensor> exchange_backward(const Tensor& grad_, const ExchangeArguments& arguments,
                                             const OptionalTensor& gate, bool wide) {
  const Tensor &z = arguments.summary, grad = contiguous(grad_);
  const auto dtype = compute_dtype(z.scalar_type());
  const std::vector<int64_t> rows = {z.size(0), z.size(1), z.size(2)};
  Tensor of_z = new_empty(z, sizes_of(z), wide ? dtype : z.scalar_type());
  Tensor of_queries = new_empty(z, sizes_of(z), dtype), of_keys = new_empty(z, sizes_of(z), dtype);
  Tensor log_sum = new_empty(z, rows, dtype), mean = new_empty(z, rows, dtype);
  dispatch_floating(z.scalar_type(), "window_exchange_backward", [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    const Call<T> call(arguments);
    const Attention<T>& attention = call.attention;
    Gradients<T> gradients{};
    gradients.grad = input_heads<T>(grad);
    gradients.wide_q = output<C>(of_queries);
    gradients.wide_k = output<C>(of_keys);
    gradients.log_sum = output<C>(log_sum);
    gradients.mean = output<C>(mean);
    dispatch_width<T>(z.size(3), [&](auto width) {
      constexpr size_t kShared = sizeof(BackwardShared<T, width()>);
      const dim3 threads(kAttentionThreads<T>);
      launch(query_gradient_kernel<T, width(), true>, call.grid(), threads, kShared, call.stream, attention, gradients);
      input<C>(log_sum);
      input<C>(mean);
      launch(key_gradient_kernel<T, width(), true>, call.grid(), threads, kShared, call.stream, attention, gradients);
    });
    const bool is_wide = of_z.element_size() == int64_t(sizeof(C));
    const Target<T> target(is_wide ? static_cast<void*>(output<C>(of_z)) : output<T>(of_z), is_wide);
    const int64_t count = z.size(0) * z.size(1) * z.size(2);
    launch(source_gradient_kernel<T>, summary_grid(count, 32), dim3(kSummaryThreads), 0, call.stream, target,
           input<C>(of_keys), input<C>(of_queries), attention.sources, gate ? input<C>(*gate) : nullptr, z.size(1),
           count, int(z.size(3)));
  });
  return {of_z, mean};
}

}  // namespace quaver::gpu

namespace {

using namespace quaver;

Tensor window_exchange(const Tensor& summary, OptionalTensor source, bool causal, double scale) {
  const gpu::DeviceGuard guard(summary.get_device_index());
  return gpu::exchange_forward({gpu::contiguous(summary), source, causal, scale});
}

Tensor window_exchange_backward(const Tensor& grad, const Tensor& summary, OptionalTensor source, bool causal,
                                double scale) {
  const gpu::DeviceGuard guard(summary.get_device_index());
  return std::get<0>(
      gpu::exchange_backward(grad, {gpu::contiguous(summary), source, causal, scale}, std::nullopt, false));
}

}  // namespace

QUAVER_GPU_LIBRARY(m) {
  m.impl("window_exchange", TORCH_BOX(&window_exchange));
  m.impl("window_exchange_backward", TORCH_BOX(&window_exchange_backward));
}
