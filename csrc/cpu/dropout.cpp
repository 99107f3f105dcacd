// torch.ops.quaver.dropout on the CPU. Schema: kernels/dropout/op.py.
#include "cpu/noise_source.h"
#include "cpu/output.h"

namespace {

using namespace quaver;

Tensor dropout(const Tensor& input, const Tensor& seed, double p, int64_t stream, int64_t offset) {
  const Tensor x = torch::stable::contiguous(input);
  Tensor out = torch::stable::empty_like(x);
  const Source source = cpu::sources(seed, stream, kUniform)[0];
  const auto& philox = cpu::philox_loops();
  const auto& loops = cpu::loops_of(x.scalar_type());
  const char* from = const_data<char>(x);
  const int64_t size = x.element_size();
  char* to = cpu::output<char>(out);
  torch::stable::parallel_for(0, x.numel(), cpu::kGrain, [&](int64_t begin, int64_t end) {
    cpu::for_tiles(uint64_t(offset), begin, end, [&](uint64_t element, int64_t at, int64_t length) {
      alignas(64) float u[cpu::kTile];
      cpu::prefetch(from + at * size, to + at * size, length * size);
      philox.fill(u, length, source, element);
      loops.drop(to, from, at, u, float(p), p < 1 ? 1 / (1 - p) : 0, length);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }
