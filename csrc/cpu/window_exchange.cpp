// torch.ops.quaver.window_exchange and its backward on the CPU. Schemas: kernels/window_attention/op.py.
#include "cpu/window_host.h"

namespace quaver::cpu {

Sources::Sources(const OptionalTensor& source, int64_t windows, bool causal)
    : windows_(windows), per_batch_(source && source->dim() == 2) {
  if (!source) {
    for (int64_t w = 0; w < windows; w++) indexes_.push_back(causal ? std::max<int64_t>(0, w - 1) : w);
    return;
  }
  const Tensor given = contiguous(*source);
  const int64_t* from = const_data<int64_t>(given);
  indexes_.assign(from, from + given.numel());
  for (size_t i = 0; i < indexes_.size(); i++) {
    const int64_t w = int64_t(i) % windows, most = causal ? w - 1 : windows - 1;
    if (causal && w == 0) {
      indexes_[i] = 0;
      continue;
    }
    STD_TORCH_CHECK(0 <= indexes_[i] && indexes_[i] <= most, "source: expected a window in [0, ", most, "] for window ",
                    w, ", got ", indexes_[i]);
  }
}

namespace {

// Calls body(batch, first, scratch) for each head; first: of its elements in [B, H, W, d].
template <class C, class Body>
void for_heads(const Tensor& summary, Body&& body) {
  const int64_t heads = summary.size(1), windows = summary.size(2), width = summary.size(3);
  const int64_t scratch = exchange_loops().scratch(windows, width);
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, windows * windows * width));
  parallel_for(0, windows == 0 ? 0 : summary.size(0) * heads, grain, [&](int64_t begin, int64_t end) {
    C* of_thread = workspace<C>(Use::kExchange, scratch);
    for (int64_t i = begin; i < end; i++) body(i / heads, i * windows * width, of_thread);
  });
}

Tensor window_exchange(const Tensor& summary, OptionalTensor source, bool causal, double scale) {
  const Tensor z = widened(summary);
  const Tensor e = torch::stable::new_empty(z, sizes_of(z));
  const Sources sources(source, z.size(2), causal);
  const ExchangeShape shape{z.size(2), z.size(3), scale, causal};
  with_exchange(z.scalar_type(), [&](const auto& loops, auto zero) {
    using C = decltype(zero);
    for_heads<C>(z, [&](int64_t batch, int64_t first, C* scratch) {
      loops.forward(shape, const_data<C>(z) + first, sources.of(batch), data<C>(e) + first, scratch);
    });
  });
  return narrowed(e, summary.scalar_type());
}

Tensor window_exchange_backward(const Tensor& grad_, const Tensor& summary, OptionalTensor source, bool causal,
                                double scale) {
  const Tensor z = widened(summary), grad = widened(grad_);
  const Tensor of_z = torch::stable::new_empty(z, sizes_of(z));
  const Sources sources(source, z.size(2), causal);
  const ExchangeShape shape{z.size(2), z.size(3), scale, causal};
  with_exchange(z.scalar_type(), [&](const auto& loops, auto zero) {
    using C = decltype(zero);
    for_heads<C>(z, [&](int64_t batch, int64_t first, C* scratch) {
      loops.backward(shape, const_data<C>(grad) + first, const_data<C>(z) + first, sources.of(batch), 1.0,
                     data<C>(of_z) + first, scratch);
    });
  });
  return narrowed(of_z, summary.scalar_type());
}

}  // namespace
}  // namespace quaver::cpu

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("window_exchange", TORCH_BOX(&quaver::cpu::window_exchange));
  m.impl("window_exchange_backward", TORCH_BOX(&quaver::cpu::window_exchange_backward));
}
