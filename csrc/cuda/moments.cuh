// The mean of a tensor and the sum of squares about it: of blocks of fixed size, combined in a fixed order.
#pragma once
#include "cuda/noise.cuh"
#include "cuda/reduce.cuh"

namespace quaver::gpu {

struct Moments {
  double mean, squares;
};

constexpr int kHeld = 16;  // elements a thread holds in registers
constexpr int kMomentBlock = kThreads * kHeld;

// Two passes over a block's elements, which stay in registers: no cancellation at any mean.
template <class T>
__global__ void __launch_bounds__(kThreads) moments_kernel(double* partial, const T* x, int64_t n) {
  using C = compute_t<T>;
  constexpr int G = kGroup<T>;
  const int64_t start = int64_t(blockIdx.x) * kMomentBlock;
  const int count = int(min(int64_t(kMomentBlock), n - start));
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  C held[kHeld];
  C sum = 0;
  for (int h = 0; h < kHeld; h += G) {
    const int at = (h / G * kThreads + int(threadIdx.x)) * G;
    T values[G];
    load(x, {0, start + at, at, count, aligned && at + G <= count}, values);
    for (int i = 0; i < G; i++) sum += held[h + i] = widen(values[i]);
  }
  const C middle = C(block_sum(double(sum)) / count);
  C squares = 0, errors = 0;
  for (int h = 0; h < kHeld; h++) {
    const int at = (h / G * kThreads + int(threadIdx.x)) * G + h % G;
    const C d = at < count ? held[h] - middle : C(0);
    squares += d * d;
    errors += d;
  }
  // `middle` is rounded: the sum of what is left about it corrects both moments.
  const double error = block_sum(double(errors)), about = block_sum(double(squares));
  if (threadIdx.x == 0) {
    partial[2 * int64_t(blockIdx.x)] = double(middle) + error / count;
    partial[2 * int64_t(blockIdx.x) + 1] = about - error * error / count;
  }
}

// Those of n elements from those of their blocks (Chan, Golub, LeVeque 1979), by one block of threads.
__device__ inline Moments combine(const double* partial, int64_t n) {
  const int64_t blocks = (n + kMomentBlock - 1) / kMomentBlock;
  const auto size = [&](int64_t b) { return double(min(int64_t(kMomentBlock), n - b * kMomentBlock)); };
  double mean = 0, squares = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x) mean += partial[2 * b] * size(b);
  mean = block_sum(mean) / double(n);
  for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x) {
    const double delta = partial[2 * b] - mean;
    squares += partial[2 * b + 1] + delta * delta * size(b);
  }
  return {mean, block_sum(squares)};
}

// Starts moments_kernel on a contiguous x; the result is what `combine` takes.
inline Tensor partial_moments(const Tensor& x) {
  const int64_t n = x.numel(), blocks = (n + kMomentBlock - 1) / kMomentBlock;
  Tensor partial = torch::stable::new_empty(x, {blocks, 2}, ScalarType::Double);
  dispatch_floating(x.scalar_type(), "weight_scale", [&](auto element) {
    using T = decltype(element);
    launch(moments_kernel<T>, dim3(unsigned(blocks)), dim3(kThreads), 0, current_stream(x), output<double>(partial),
           input<T>(x), n);
  });
  return partial;
}

}  // namespace quaver::gpu
