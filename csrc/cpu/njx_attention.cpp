// torch.ops.quaver.njx_attention and its backward on the CPU. Schemas: kernels/window_attention/op.py.
#include "cpu/window_host.h"

namespace quaver::cpu {
namespace {

// One call's windows with what the exchange between them needs.
struct NJX {
  Windows windows;
  Tensor gate;
  Sources sources;
  ExchangeShape shape;

  NJX(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& select, const OptionalTensor& source,
      const Tensor& gate_, int64_t window, int64_t exchange_tokens, bool causal, double scale)
      : windows(q, k, v, select, std::nullopt, window, exchange_tokens, causal, scale),
        gate(contiguous(gate_)),
        sources(source, windows.windows(), causal),
        shape{windows.windows(), q.size(3), scale, causal} {}

  Span span(int64_t window) const {
    const int64_t first = window * windows.window();
    return {first, std::min(windows.window(), windows.length() - first)};
  }

  // Calls attention(batch, key head) for all, and rest(batch, head, C's scratch, C's rows [W, d]) for the query heads,
  // one head after the other: what the first wrote is then in the cache. Where there are fewer key heads than threads,
  // all() does the attention of the whole before or after.
  template <class C, class One, class All, class Rest>
  void for_heads(bool attention_first, One&& one, All&& all, Rest&& rest) const {
    const int64_t key_heads = windows.key_heads(), tasks = windows.batches() * key_heads, group = windows.group();
    if (windows.length() == 0 || tasks == 0) return;
    const int64_t rows = shape.windows * shape.width, scratch = exchange_loops().scratch(shape.windows, shape.width);
    const bool apart = tasks < int64_t(torch::stable::get_num_threads());
    const auto rest_of = [&](int64_t batch, int64_t head) {
      C* memory = workspace<C>(Use::kExchange, scratch + rows);
      rest(batch, head, memory + rows, memory);
    };
    if (apart) {
      if (attention_first) all();
      parallel_for(0, tasks * group, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) rest_of(i / windows.heads(), i % windows.heads());
      });
      if (!attention_first) all();
      return;
    }
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t batch = i / key_heads, key_head = i % key_heads;
        if (attention_first) one(batch, key_head);
        for (int64_t h = 0; h < group; h++) rest_of(batch, key_head * group + h);
        if (!attention_first) one(batch, key_head);
      }
    });
  }
};

std::tuple<Tensor, Tensor> njx_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& select,
                                         OptionalTensor source, const Tensor& gate, int64_t window,
                                         int64_t exchange_tokens, bool causal, double scale) {
  const NJX njx(q, k, v, select, source, gate, window, exchange_tokens, causal, scale);
  const Windows& windows = njx.windows;
  Tensor out = empty_like_heads(q);
  const Tensor summary =
      torch::stable::new_empty(q, {q.size(0), q.size(1), windows.windows(), q.size(3)}, compute_dtype(q.scalar_type()));
  const HeadTensor to(out);
  with_exchange(q.scalar_type(), [&](const auto& loops, auto zero) {
    using C = decltype(zero);
    njx.for_heads<C>(
        true, [&](int64_t batch, int64_t key_head) { windows.forward(batch, key_head, to, &summary); },
        [&] { windows.forward(to, &summary); },
        [&](int64_t batch, int64_t head, C* scratch, C* e) {
          const C* z = const_data<C>(summary) + windows.summary_at(batch, head, 0);
          loops.forward(njx.shape, z, njx.sources.of(batch), e, scratch);
          const double factor = double(const_data<C>(njx.gate)[head]);
          for (int64_t w = 0; w < njx.shape.windows; w++) {
            const Span span = njx.span(w);
            windows.loops().add_row(to.at(batch, head, span.first).first, to.token, span.length, windows.width(),
                                    factor, e + w * windows.width());
          }
        });
  });
  return {out, summary};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> njx_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& select, const Tensor& summary_,
    OptionalTensor source, const Tensor& gate, int64_t window, int64_t exchange_tokens, bool causal, double scale) {
  const NJX njx(q, k, v, select, source, gate, window, exchange_tokens, causal, scale);
  const Windows& windows = njx.windows;
  const Tensor summary = contiguous(summary_);
  Tensor of_q = empty_like_heads(q), of_k = empty_like_heads(k), of_v = empty_like_heads(v);
  Tensor of_select = torch::stable::new_empty(select, sizes_of(select));
  Tensor of_gate = torch::stable::new_empty(gate, sizes_of(gate));
  const Tensor of_summary = torch::stable::new_empty(summary, sizes_of(summary));
  Windows::Gradients gradients;
  gradients.grad = HeadTensor(grad);
  gradients.has_grad = true;
  gradients.grad_summary = const_data<char>(of_summary);
  gradients.q = HeadTensor(of_q);
  gradients.k = HeadTensor(of_k);
  gradients.v = HeadTensor(of_v);
  gradients.select = data<char>(of_select);
  const HeadTensor& from = gradients.grad;
  std::vector<double> of_gates(size_t(windows.batches() * windows.heads()));
  with_exchange(q.scalar_type(), [&](const auto& loops, auto zero) {
    using C = decltype(zero);
    njx.for_heads<C>(
        false, [&](int64_t batch, int64_t key_head) { windows.backward(batch, key_head, gradients); },
        [&] { windows.backward(gradients); },
        [&](int64_t batch, int64_t head, C* scratch, C* sums) {
          for (int64_t w = 0; w < njx.shape.windows; w++) {
            const Span span = njx.span(w);
            windows.loops().sum_rows(sums + w * windows.width(), from.at(batch, head, span.first).first, from.token,
                                     span.length, windows.width());
          }
          // With the gate left out the backward pass gives the gate's gradient too: the sum of grad * e.
          const int64_t first = windows.summary_at(batch, head, 0);
          of_gates[size_t(batch * windows.heads() + head)] =
              loops.backward(njx.shape, sums, const_data<C>(summary) + first, njx.sources.of(batch),
                             double(const_data<C>(njx.gate)[head]), data<C>(of_summary) + first, scratch);
        });
    for (int64_t h = 0; h < windows.heads(); h++) {
      double sum = 0;
      for (int64_t b = 0; b < windows.batches(); b++) sum += of_gates[size_t(b * windows.heads() + h)];
      data<C>(of_gate)[h] = C(sum);
    }
  });
  return {of_q, of_k, of_v, of_select, of_gate};
}

}  // namespace
}  // namespace quaver::cpu

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("njx_attention", TORCH_BOX(&quaver::cpu::njx_attention));
  m.impl("njx_attention_backward", TORCH_BOX(&quaver::cpu::njx_attention_backward));
}
