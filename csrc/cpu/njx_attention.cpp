// torch.ops.quaver.njx_attention and its backward on the CPU. Schemas: kernels/window_attention/op.py.
#include "common/integers.h"
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

  // Some of the key heads of a batch, and the query heads that share them.
  struct Some {
    int64_t batch, first_key_head, key_heads, first_head, heads;
  };

  // So many bytes of the output, or of its gradient, stay in the caches from one stage to the next.
  static constexpr int64_t kTogether = 2 << 20;

  // How many key heads are done together, one stage after the other; 0 for each stage of the whole, where not even two
  // would stay in the caches. Where heads of a token lie side by side one alone would touch the pages of all of them.
  int64_t together(int64_t element_size) const {
    const int64_t key_heads = windows.key_heads(), threads = int64_t(torch::stable::get_num_threads());
    const int64_t bytes = windows.length() * windows.width() * windows.group() * element_size;
    if (2 * bytes > kTogether || windows.batches() * key_heads < threads) return 0;
    int64_t count = windows.heads_inside() ? std::clamp<int64_t>(kTogether / bytes, 1, key_heads) : 1;
    const auto uneven = [&](int64_t tasks) { return tasks < 4 * threads && tasks % threads != 0; };
    while (count > 1 && uneven(windows.batches() * ceil_div(key_heads, count))) count /= 2;
    return count;
  }

  // The three stages of a pass, in this order or (kForward: false) the other way round. attention(some heads) does
  // theirs, all() that of the whole; exchange(batch, head, its rows of C [W, d], scratch) that between windows;
  // window(batch, head, window, its row of C) what leads from one to the other.
  template <class C, bool kForward, class Attention, class All, class Exchange, class Window>
  void stages(int64_t element_size, Attention&& attention, All&& all, Exchange&& exchange, Window&& window) const {
    const int64_t batches = windows.batches(), heads = windows.heads(), key_heads = windows.key_heads();
    const int64_t count = shape.windows, rows = count * shape.width, group = windows.group();
    if (windows.length() == 0 || batches * key_heads == 0) return;
    const int64_t scratch = exchange_loops().scratch(shape.windows, shape.width);
    // Window by window: the order of memory where heads are inside.
    const auto of_window = [&](const Some& some, int64_t w, C* of) {
      for (int64_t h = 0; h < some.heads; h++) {
        window(some.batch, some.first_head + h, w, of + h * rows + w * shape.width);
      }
    };
    const int64_t each = together(element_size);
    if (each > 0) {
      const int64_t parts = ceil_div(key_heads, each);
      parallel_for(0, batches * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t first = i % parts * each, some_heads = std::min(each, key_heads - first);
          const Some some{i / parts, first, some_heads, first * group, some_heads * group};
          C* memory = workspace<C>(Use::kExchange, scratch + some.heads * rows);
          C* of = memory + scratch;
          if (kForward) attention(some);
          for (int64_t w = 0; !kForward && w < count; w++) of_window(some, w, of);
          for (int64_t h = 0; h < some.heads; h++) exchange(some.batch, some.first_head + h, of + h * rows, memory);
          for (int64_t w = 0; kForward && w < count; w++) of_window(some, w, of);
          if (!kForward) attention(some);
        }
      });
      return;
    }
    C* of = workspace<C>(Use::kSums, batches * heads * rows);
    const auto of_windows = [&] {
      parallel_for(0, batches * count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t batch = i / count;
          of_window({batch, 0, key_heads, 0, heads}, i % count, of + batch * heads * rows);
        }
      });
    };
    if (kForward) all();
    if (!kForward) of_windows();
    parallel_for(0, batches * heads, 1, [&](int64_t begin, int64_t end) {
      C* memory = workspace<C>(Use::kExchange, scratch);
      for (int64_t i = begin; i < end; i++) exchange(i / heads, i % heads, of + i * rows, memory);
    });
    if (kForward) of_windows();
    if (!kForward) all();
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
    njx.stages<C, true>(
        to.element_size,
        [&](const auto& some) { windows.forward(some.batch, some.first_key_head, some.key_heads, to, &summary); },
        [&] { windows.forward(to, &summary); },
        [&](int64_t batch, int64_t head, C* e, C* scratch) {
          const C* z = const_data<C>(summary) + windows.summary_at(batch, head, 0);
          loops.forward(njx.shape, z, njx.sources.of(batch), e, scratch);
        },
        [&](int64_t batch, int64_t head, int64_t window, const C* e) {
          const Span span = njx.span(window);
          windows.loops().add_row(to.at(batch, head, span.first).first, to.token, span.length, windows.width(),
                                  double(const_data<C>(njx.gate)[head]), e);
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
    njx.stages<C, false>(
        from.element_size,
        [&](const auto& some) { windows.backward(some.batch, some.first_key_head, some.key_heads, gradients); },
        [&] { windows.backward(gradients); },
        // With the gate left out the backward pass gives the gate's gradient too: the sum of grad * e.
        [&](int64_t batch, int64_t head, const C* sums, C* scratch) {
          const int64_t first = windows.summary_at(batch, head, 0);
          of_gates[size_t(batch * windows.heads() + head)] =
              loops.backward(njx.shape, sums, const_data<C>(summary) + first, njx.sources.of(batch),
                             double(const_data<C>(njx.gate)[head]), data<C>(of_summary) + first, scratch);
        },
        [&](int64_t batch, int64_t head, int64_t window, C* sum) {
          const Span span = njx.span(window);
          windows.loops().sum_rows(sum, from.at(batch, head, span.first).first, from.token, span.length,
                                   windows.width());
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
