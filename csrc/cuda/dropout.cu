// torch.ops.quaver.dropout on CUDA. Schema: kernels/dropout/op.py.
#include "cuda/noise.cuh"

namespace {

using namespace quaver;

template <class T>
__global__ void __launch_bounds__(gpu::kThreads)
    dropout_kernel(T* out, const T* x, gpu::Seeds seeds, Placement place, float p, compute_t<T> factor) {
  constexpr int G = gpu::kGroup<T>;
  const Source source = seeds[0];
  gpu::for_rows(place, [&](const gpu::Row& row) {
    gpu::for_parts<G>(row, row.is_packed<G>(x, out), [&](const gpu::Part& part) {
      T values[G];
      gpu::load(x, part, values);
      float u[G];
      gpu::Uniforms::make(source, part.group, u);
      for (int i = 0; i < G; i++) {
        values[i] = narrow<T>(u[i] > p ? multiply(widen(values[i]), factor) : compute_t<T>(0));
      }
      gpu::store(out, part, values);
    });
  });
}

Tensor dropout(const Tensor& input, const Tensor& seed, double p, int64_t stream, int64_t offset) {
  const gpu::DeviceGuard guard(input.get_device_index());
  const Tensor x = torch::stable::contiguous(input);
  Tensor out = torch::stable::empty_like(x);
  const gpu::Seeds seeds = gpu::seeds_of(seed, x, stream, kUniform);
  const Placement place = gpu::one_run(x.numel(), uint64_t(offset));
  dispatch_floating(x.scalar_type(), "dropout", [&](auto element) {
    using T = decltype(element);
    const auto layout = gpu::layout_of(place, gpu::kGroup<T>);
    const auto factor = compute_t<T>(p < 1 ? 1 / (1 - p) : 0);
    gpu::launch(dropout_kernel<T>, layout.grid, layout.block, 0, gpu::current_stream(x), gpu::output<T>(out),
                gpu::input<T>(x), seeds, place, float(p), factor);
  });
  return out;
}

}  // namespace

QUAVER_GPU_LIBRARY(m) { m.impl("dropout", TORCH_BOX(&dropout)); }
