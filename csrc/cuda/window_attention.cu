// torch.ops.quaver.window_attention and its backward on CUDA. Schemas: kernels/window_attention/op.py.
#include "cuda/attention.h"
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"

namespace quaver::gpu {

namespace {

// One call, as the kernels take it.
template <class T>
struct Call {
  using C = compute_t<T>;
  Attention<T> attention;
  int64_t batches;
  Tensor select, starts;  // contiguous, where they are given
  Stream stream;

  explicit Call(const WindowArguments& of)
      : attention{input_heads<T>(of.q),
                  input_heads<T>(of.k),
                  input_heads<T>(of.v),
                  {},
                  {of.q.size(2), std::max<int64_t>(1, std::min(of.window, of.q.size(2))), of.causal, 0, nullptr, 0, 0},
                  Tiling(of.q.size(2), of.window, kTileRows<T>, of.document_starts.has_value()),
                  of.q.size(1),
                  of.k.size(1) > 0 ? of.q.size(1) / of.k.size(1) : 1,
                  int(of.q.size(3)),
                  C(of.scale)},
        batches(of.q.size(0)),
        stream(current_stream(of.q)) {
    if (of.select) select = contiguous(*of.select);
    if (!of.document_starts) return;
    starts = contiguous(*of.document_starts);
    attention.visible.starts = input<int32_t>(starts);
    attention.visible.documents = starts.size(starts.dim() - 1);
    attention.visible.batch_stride = starts.dim() == 2 ? attention.visible.documents : 0;
  }

  int64_t windows() const {
    return (attention.visible.length + attention.visible.window - 1) / attention.visible.window;
  }
  int64_t summaries() const { return batches * attention.heads * windows(); }
  WindowTokens tokens() const { return {attention.visible.length, attention.visible.window, windows()}; }
  SummaryWeights<T> weights(const C* data) const { return {data, windows(), attention.visible.window}; }

  void make_weights(Tensor& weights, int64_t most) const {
    launch(summary_weights_kernel<C>, summary_grid(summaries(), 32), dim3(kSummaryThreads), 0, stream,
           output<C>(weights), input<C>(select), tokens(), summaries(), most);
  }
};

template <class T>
void forward(const WindowArguments& arguments, Tensor& out, Tensor* summary, bool wide) {
  using C = compute_t<T>;
  const Call<T> call(arguments);
  const Attention<T>& attention = call.attention;
  ForwardResult<T> result{output_heads<T>(out), {}, {nullptr, wide}, nullptr};
  Tensor weights = new_empty(arguments.q, {summary ? arguments.select->numel() : 0}, compute_dtype(out.scalar_type()));
  const bool parts = summary && attention.tiling.parts > 1;
  Tensor partial =
      new_empty(weights, {parts ? call.batches * attention.heads * attention.tiling.count * attention.width : 0});
  if (summary) {
    call.make_weights(weights, arguments.exchange_tokens);
    result.weights = call.weights(input<C>(weights));
    result.summary.data = wide ? static_cast<void*>(output<C>(*summary)) : output<T>(*summary);
    if (parts) result.partial = output<C>(partial);
  }
  dispatch_width<T>(attention.width, [&](auto width) {
    using Shared = ForwardShared<T, width()>;
    launch(attention_forward_kernel<T, width(), false>, attention_grid(attention.tiling, attention.heads, call.batches),
           dim3(kAttentionThreads<T>), sizeof(Shared), call.stream, attention, result);
  });
  if (!parts) return;
  const int64_t count = call.summaries() * attention.width;
  launch(add_parts_kernel<T>, summary_grid(count, 1), dim3(kSummaryThreads), 0, call.stream, result.summary,
         input<C>(partial), attention.tiling, call.windows(), count, attention.width);
}

template <class T>
void backward(const OptionalTensor& grad, const OptionalTensor& grad_summary, const WindowArguments& arguments,
              Tensor& of_q, Tensor& of_k, Tensor& of_v, Tensor& of_select) {
  using C = compute_t<T>;
  const Call<T> call(arguments);
  const Attention<T>& attention = call.attention;
  const int64_t rows = call.batches * attention.heads * attention.visible.length;
  const auto wide = compute_dtype(arguments.q.scalar_type());
  Gradients<T> gradients{};
  if (grad) gradients.grad = input_heads<T>(*grad);
  Tensor weights = new_empty(of_q, {grad_summary ? rows : 0}, wide);
  Tensor of_weights = new_empty(of_q, {grad_summary ? rows : 0}, wide), of_summary;
  if (grad_summary) {
    of_summary = contiguous(*grad_summary);
    const bool is_wide = of_summary.element_size() == int64_t(sizeof(C));
    gradients.grad_summary = {is_wide ? static_cast<const void*>(input<C>(of_summary)) : input<T>(of_summary), is_wide};
    call.make_weights(weights, arguments.exchange_tokens);
    gradients.weights = call.weights(input<C>(weights));
    gradients.of_weights = output<C>(of_weights);
  }
  gradients.q = output_heads<T>(of_q);
  gradients.k = output_heads<T>(of_k);
  gradients.v = output_heads<T>(of_v);
  // Windows of one tile keep to themselves. Those of documents lie across tiles.
  const bool alone = attention.tiling.parts == 1 && !attention.visible.starts;
  Tensor log_sum = new_empty(of_q, {alone ? 0 : rows}, wide), mean = new_empty(of_q, {alone ? 0 : rows}, wide);
  dispatch_width<T>(attention.width, [&](auto width) {
    constexpr size_t kShared = sizeof(BackwardShared<T, width()>);
    const dim3 threads(kAttentionThreads<T>);
    const dim3 of_keys = attention_grid(attention.tiling, attention.heads / attention.group, call.batches);
    if (alone) {
      launch(window_backward_kernel<T, width()>, of_keys, threads, kShared, call.stream, attention, gradients);
      return;
    }
    gradients.log_sum = output<C>(log_sum);
    gradients.mean = output<C>(mean);
    launch(query_gradient_kernel<T, width(), false>, attention_grid(attention.tiling, attention.heads, call.batches),
           threads, kShared, call.stream, attention, gradients);
    input<C>(log_sum);
    input<C>(mean);
    launch(key_gradient_kernel<T, width(), false>, of_keys, threads, kShared, call.stream, attention, gradients);
  });
  if (!grad_summary) return;
  launch(select_gradient_kernel<C>, summary_grid(call.summaries(), 32), dim3(kSummaryThreads), 0, call.stream,
         output<C>(of_select), input<C>(weights), input<C>(of_weights), call.tokens(), call.summaries());
}

}  // namespace

std::tuple<Tensor, Tensor> window_forward(const WindowArguments& arguments, bool wide) {
  const Tensor& q = arguments.q;
  const auto dtype = wide ? compute_dtype(q.scalar_type()) : q.scalar_type();
  Tensor out = empty_like_heads(q);
  Tensor summary = arguments.select ? new_empty(q, {q.size(0), q.size(1), arguments.windows(), q.size(3)}, dtype)
                                    : new_empty(q, {0});
  dispatch_floating(q.scalar_type(), "window_attention", [&](auto element) {
    forward<decltype(element)>(arguments, out, arguments.select ? &summary : nullptr,
                               dtype == compute_dtype(q.scalar_type()));
  });
  return {out, summary};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_backward(const OptionalTensor& grad,
                                                           const OptionalTensor& grad_summary,
                                                           const WindowArguments& arguments) {
  const Tensor& q = arguments.q;
  Tensor of_q = empty_like_heads(q), of_k = empty_like_heads(arguments.k), of_v = empty_like_heads(arguments.v);
  Tensor of_select = arguments.select ? new_empty(*arguments.select, sizes_of(*arguments.select)) : new_empty(q, {0});
  const OptionalTensor of_summary = arguments.select ? grad_summary : std::nullopt;
  if (arguments.select && !of_summary) torch::stable::zero_(of_select);
  dispatch_floating(q.scalar_type(), "window_attention_backward", [&](auto element) {
    backward<decltype(element)>(grad, of_summary, arguments, of_q, of_k, of_v, of_select);
  });
  return {of_q, of_k, of_v, of_select};
}

}  // namespace quaver::gpu

namespace {

using namespace quaver;

std::tuple<Tensor, Tensor> window_attention(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor select,
                                            OptionalTensor document_starts, int64_t window, int64_t exchange_tokens,
                                            bool causal, double scale) {
  const gpu::DeviceGuard guard(q.get_device_index());
  return gpu::window_forward({q, k, v, select, document_starts, window, exchange_tokens, causal, scale}, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(OptionalTensor grad, OptionalTensor grad_summary,
                                                                     const Tensor& q, const Tensor& k, const Tensor& v,
                                                                     OptionalTensor select,
                                                                     OptionalTensor document_starts, int64_t window,
                                                                     int64_t exchange_tokens, bool causal,
                                                                     double scale) {
  const gpu::DeviceGuard guard(q.get_device_index());
  if (grad) grad = gpu::with_rows(*grad);
  return gpu::window_backward(grad, grad_summary,
                              {q, k, v, select, document_starts, window, exchange_tokens, causal, scale});
}

}  // namespace

QUAVER_GPU_LIBRARY(m) {
  m.impl("window_attention", TORCH_BOX(&window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}
