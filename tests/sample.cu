// Two kernels for test_cuda_resources.py: the same noise-like arithmetic by single roundings, and as the compiler
// likes.
#include <cstdint>

namespace quaver {

struct Rounded {
  static __device__ float multiply(float a, float b) { return __fmul_rn(a, b); }
  static __device__ float add(float a, float b) { return __fadd_rn(a, b); }
  static __device__ float root(float a) { return __fsqrt_rn(a); }
};

struct Free {
  static __device__ float multiply(float a, float b) { return a * b; }
  static __device__ float add(float a, float b) { return a + b; }
  static __device__ float root(float a) { return sqrtf(a); }
};

template <typename Arithmetic, int kRounds>
__global__ void perturb(const float4* weight, float4* out, float sigma, uint32_t seed) {
  const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
  float4 value = weight[index];
  float* element = &value.x;
  uint32_t word = seed ^ index;
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int round = 0; round < kRounds; round++) word = __umulhi(word, 0xD2511F53u) ^ (word * 0xCD9E8D57u);
    const float u = Arithmetic::add(float(word >> 8), 0.5f);
    const float radius = Arithmetic::root(Arithmetic::add(Arithmetic::multiply(u, 3.0f), 1.0f));
    element[i] = Arithmetic::add(element[i], Arithmetic::multiply(sigma, radius));
  }
  out[index] = value;
}

// A loop over groups around one over its elements, and after them a loop without noise.
__global__ void looped(const float* weight, float* out, int groups, int last) {
  uint32_t word = threadIdx.x;
#pragma unroll 1
  for (int g = 0; g < groups; g++) {
    const float value = weight[g];
#pragma unroll 1
    for (int i = 0; i < last; i++) {
#pragma unroll
      for (int round = 0; round < 3; round++) word = __umulhi(word, 0xD2511F53u) ^ (word + 1u);
      out[g * last + i] = value + float(word);
    }
  }
#pragma unroll 1
  for (int i = 0; i < last; i++) out[i] *= 2.0f;
}

// Spills and synchronizes: 64 values live at once in 24 registers, indexed at run time through shared memory.
__global__ void __launch_bounds__(1024, 2) crowded(const float* values, float* out, int stride) {
  __shared__ float part[1024];
  float kept[64];
#pragma unroll
  for (int i = 0; i < 64; i++) kept[i] = values[threadIdx.x + i * stride];
  part[threadIdx.x] = kept[0];
  __syncthreads();
  float sum = part[1023 - threadIdx.x];
#pragma unroll
  for (int i = 0; i < 64; i++) sum += kept[i] * values[threadIdx.x * stride + i] * kept[63 - i];
#pragma unroll
  for (int i = 0; i < 64; i++) out[threadIdx.x + i * stride] = kept[i] * sum;
}

void launch_all(float4* a, float4* b) {
  perturb<Rounded, 2><<<1, 32>>>(a, b, 1.0f, 3);
  perturb<Free, 2><<<1, 32>>>(a, b, 1.0f, 3);
  looped<<<1, 32>>>(&a->x, &b->x, 3, 3);
  crowded<<<1, 1024>>>(&a->x, &b->x, 3);
}

}  // namespace quaver
