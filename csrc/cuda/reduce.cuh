// Sums over a warp and a block, in an order that depends on nothing but the number of threads.
#pragma once
#include "common/host_device.h"
#include "cuda/gpu.h"

namespace quaver::gpu {

constexpr int kWarp = 32;
constexpr int kCombine = 1024;  // threads of a block that adds what many blocks have left

// Every lane gets the sum.
__device__ inline double warp_sum(double x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = add(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

// Every thread of a one-dimensional block of whole warps gets the sum.
__device__ inline double block_sum(double x) {
  __shared__ double warps[kWarp];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, count = int(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  x = warp_sum(lane < count ? warps[lane] : 0.0);
  __syncthreads();  // before the next call writes `warps`
  return x;
}

// out[s, v], a block each: the sum of partial[p, v, 0 .. terms - 1] over `summed` members p from s on. `size` values v.
template <class C>
__global__ void __launch_bounds__(kCombine)
    sum_partials_kernel(C* out, const double* partial, int64_t size, int64_t terms, int64_t summed) {
  const int64_t s = blockIdx.x / size, v = blockIdx.x % size;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < summed * terms; i += blockDim.x) {
    sum += partial[((s + i / terms) * size + v) * terms + i % terms];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = C(sum);
}

}  // namespace quaver::gpu
