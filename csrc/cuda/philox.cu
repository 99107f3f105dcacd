// torch.ops.quaver.philox_* on CUDA. Schemas: kernels/philox/op.py.
#include "common/philox.h"

#include "cuda/noise.cuh"

namespace {

using namespace quaver;

template <class T, class Noise>
__global__ void __launch_bounds__(gpu::kThreads)
    fill_kernel(T* out, gpu::Seeds seeds, Placement place, int64_t members) {
  constexpr int G = gpu::kGroup<T>;
  for (int64_t member = blockIdx.z; member < members; member += gridDim.z) {
    const Source source = seeds[member];
    T* to = out + member * place.columns;
    gpu::for_rows(place, [&](const gpu::Row& row) {
      gpu::for_parts<G>(row, row.is_packed<G>(to), [&](const gpu::Part& part) {
        float noise[G];
        Noise::make(source, part.group, noise);
        T values[G];
        for (int i = 0; i < G; i++) values[i] = narrow<T>(compute_t<T>(noise[i]));
        gpu::store(to, part, values);
      });
    });
  }
}

__global__ void __launch_bounds__(gpu::kThreads)
    words_kernel(int64_t* out, gpu::Seeds seeds, Placement place, uint64_t block, int64_t members) {
  for (int64_t member = blockIdx.z; member < members; member += gridDim.z) {
    const Source source = seeds[member];
    int64_t* to = out + member * place.columns;
    gpu::for_rows(place, [&](const gpu::Row& row) {
      gpu::for_parts<4>(row, row.is_packed<4>(to), [&](const gpu::Part& part) {
        const Words x = philox(block + part.group, source.stream, source.domain, source.seed);
        const int64_t values[4] = {int64_t(x.w[0]), int64_t(x.w[1]), int64_t(x.w[2]), int64_t(x.w[3])};
        gpu::store(to, part, values);
      });
    });
  }
}

// A block of the stream makes two keys of 63 bits.
__global__ void __launch_bounds__(gpu::kThreads) keys_kernel(int64_t* out, gpu::Seeds seeds, Placement place) {
  const Source source = seeds[0];
  gpu::for_rows(place, [&](const gpu::Row& row) {
    gpu::for_parts<2>(row, row.is_packed<2>(out), [&](const gpu::Part& part) {
      const Words x = philox(part.group, source.stream, source.domain, source.seed);
      const int64_t values[2] = {int64_t((uint64_t(x.w[0]) << 32 | x.w[1]) >> 1),
                                 int64_t((uint64_t(x.w[2]) << 32 | x.w[3]) >> 1)};
      gpu::store(out, part, values);
    });
  });
}

// out is [n] or [P, n], contiguous: the elements of one member, from number `first` on.
Placement member_of(const Tensor& out, const Tensor& seed, uint64_t first) {
  return gpu::one_run(out.numel() / std::max<int64_t>(1, members(seed)), first);
}

template <class T, class Noise>
void fill(Tensor& out, const Tensor& seed, const gpu::Seeds& seeds, const Placement& place) {
  const auto layout = gpu::layout_of(place, gpu::kGroup<T>, members(seed));
  gpu::launch(fill_kernel<T, Noise>, layout.grid, layout.block, 0, gpu::current_stream(out), gpu::output<T>(out), seeds,
              place, members(seed));
}

void philox_fill_(Tensor& out, const Tensor& seed, int64_t stream, int64_t domain, int64_t offset) {
  const gpu::DeviceGuard guard(out.get_device_index());
  const gpu::Seeds seeds = gpu::seeds_of(seed, out, stream, domain);
  const Placement place = member_of(out, seed, uint64_t(offset));
  dispatch_floating(out.scalar_type(), "philox_fill_", [&](auto element) {
    using T = decltype(element);
    switch (domain & 0xff) {
      case kNormal:
        return fill<T, gpu::Normals>(out, seed, seeds, place);
      case kRademacher:
        return fill<T, gpu::Signs>(out, seed, seeds, place);
      default:
        return fill<T, gpu::Uniforms>(out, seed, seeds, place);
    }
  });
}

void philox_words_(Tensor& out, const Tensor& seed, int64_t stream, int64_t domain, int64_t block, int64_t word) {
  const gpu::DeviceGuard guard(out.get_device_index());
  const gpu::Seeds seeds = gpu::seeds_of(seed, out, stream, domain);
  const Placement place = member_of(out, seed, uint64_t(word));
  const auto layout = gpu::layout_of(place, 4, members(seed));
  gpu::launch(words_kernel, layout.grid, layout.block, 0, gpu::current_stream(out), gpu::output<int64_t>(out), seeds,
              place, uint64_t(block), members(seed));
}

void philox_keys_(Tensor& out, const Tensor& seed, int64_t stream) {
  const gpu::DeviceGuard guard(out.get_device_index());
  const gpu::Seeds seeds = gpu::seeds_of(seed, out, stream, kPermutation);
  const Placement place = gpu::one_run(out.numel(), 0);
  const auto layout = gpu::layout_of(place, 2);
  gpu::launch(keys_kernel, layout.grid, layout.block, 0, gpu::current_stream(out), gpu::output<int64_t>(out), seeds,
              place);
}

}  // namespace

QUAVER_GPU_LIBRARY(m) {
  m.impl("philox_fill_", TORCH_BOX(&philox_fill_));
  m.impl("philox_words_", TORCH_BOX(&philox_words_));
  m.impl("philox_keys_", TORCH_BOX(&philox_keys_));
}
