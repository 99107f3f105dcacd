// torch.ops.quaver.njx_attention and its backward on CUDA: windows, exchange, broadcast, a few kernels after each
// other. The broadcast is a kernel of its own: as the exchange's epilogue it would run on the few blocks that the
// exchange has. Schemas: kernels/window_attention/op.py.
#include "cuda/attention.h"

namespace {

using namespace quaver;
using gpu::contiguous;
using gpu::new_empty;

// `wide`, of the compute dtype, contiguous, as what tensor cores take.
template <class T>
Tensor narrowed(const Tensor& wide, const Tensor& like) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    return wide;
  } else {
    Tensor out = new_empty(wide, sizes_of(wide), like.scalar_type());
    gpu::launch(gpu::narrow_kernel<T>, gpu::summary_grid(wide.numel(), 1), dim3(gpu::kSummaryThreads), 0,
                gpu::current_stream(wide), gpu::output<T>(out), gpu::input<compute_t<T>>(wide), wide.numel());
    return out;
  }
}

gpu::WindowTokens tokens_of(const gpu::WindowArguments& arguments) {
  return {arguments.q.size(2), arguments.window, arguments.windows()};
}

std::tuple<Tensor, Tensor> njx_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& select,
                                         OptionalTensor source, const Tensor& gate, int64_t window,
                                         int64_t exchange_tokens, bool causal, double scale) {
  const gpu::DeviceGuard guard(q.get_device_index());
  const gpu::WindowArguments arguments(q, k, v, select, std::nullopt, window, exchange_tokens, causal, scale);
  auto [out, summary] = gpu::window_forward(arguments, true);
  const Tensor gates = contiguous(gate);
  Tensor result = out;
  dispatch_floating(q.scalar_type(), "njx_attention", [&, &wide = summary](auto element) {
    using T = decltype(element);
    const Tensor e = gpu::exchange_forward({narrowed<T>(wide, q), source, causal, scale});
    const int64_t pieces = (q.size(3) + gpu::kPiece<T> - 1) / gpu::kPiece<T>;
    const int64_t count = q.size(0) * q.size(1) * q.size(2) * pieces;
    gpu::launch(gpu::add_exchanged_kernel<T>, gpu::summary_grid(count, 1), dim3(gpu::kSummaryThreads), 0,
                gpu::current_stream(q), gpu::heads_of<T>(result, gpu::updated<T>(result)), gpu::input<T>(e),
                gpu::input<compute_t<T>>(gates), q.size(1), tokens_of(arguments), count, int(q.size(3)));
  });
  return {result, summary};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> njx_attention_backward(const Tensor& grad_, const Tensor& q,
                                                                          const Tensor& k, const Tensor& v,
                                                                          const Tensor& select, const Tensor& summary_,
                                                                          OptionalTensor source, const Tensor& gate,
                                                                          int64_t window, int64_t exchange_tokens,
                                                                          bool causal, double scale) {
  const gpu::DeviceGuard guard(q.get_device_index());
  const gpu::WindowArguments arguments(q, k, v, select, std::nullopt, window, exchange_tokens, causal, scale);
  const Tensor grad = gpu::with_rows(grad_), summary = contiguous(summary_), gates = contiguous(gate);
  Tensor of_gate = new_empty(gate, sizes_of(gate)), of_summary;
  dispatch_floating(q.scalar_type(), "njx_attention_backward", [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    const auto stream = gpu::current_stream(q);
    // With the gate left out the exchange's backward gives the gate's gradient too: the sum of grad * e.
    Tensor sums = new_empty(q, sizes_of(summary));
    gpu::launch(gpu::sum_rows_kernel<T>, gpu::summary_grid(summary.numel(), 1), dim3(gpu::kSummaryThreads), 0, stream,
                gpu::output<T>(sums), gpu::input_heads<T>(grad), q.size(1), tokens_of(arguments), summary.numel(),
                int(q.size(3)));
    const auto [of_z, products] =
        gpu::exchange_backward(sums, {narrowed<T>(summary, q), source, causal, scale}, gates, true);
    of_summary = of_z;
    gpu::launch(gpu::gate_gradient_kernel<C>, dim3(unsigned(q.size(1))), dim3(gpu::kSummaryThreads), 0, stream,
                gpu::output<C>(of_gate), gpu::input<C>(products), q.size(0), summary.size(2));
  });
  const auto [of_q, of_k, of_v, of_select] = gpu::window_backward(grad, of_summary, arguments);
  return {of_q, of_k, of_v, of_select, of_gate};
}

}  // namespace

QUAVER_GPU_LIBRARY(m) {
  m.impl("njx_attention", TORCH_BOX(&njx_attention));
  m.impl("njx_attention_backward", TORCH_BOX(&njx_attention_backward));
}
