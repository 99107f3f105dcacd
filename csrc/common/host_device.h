// What nvcc, g++ and the emulator spell differently in code that all three compile.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define QUAVER_HD __host__ __device__ __forceinline__
#else
// always_inline: an out-of-line copy would be shared by files that are compiled for different instruction sets.
#define QUAVER_HD inline __attribute__((always_inline))
#endif

namespace quaver {

// One IEEE-754 operation each, never contracted into a fused multiply-add: the noise is defined by them. On the host
// the build passes -ffp-contract=off.
#ifdef __CUDA_ARCH__
QUAVER_HD float multiply(float a, float b) { return __fmul_rn(a, b); }
QUAVER_HD float add(float a, float b) { return __fadd_rn(a, b); }
QUAVER_HD float square_root(float a) { return __fsqrt_rn(a); }
QUAVER_HD double multiply(double a, double b) { return __dmul_rn(a, b); }
QUAVER_HD double add(double a, double b) { return __dadd_rn(a, b); }
// nvcc makes a 64-bit product of the plain form, with an addition of zero to each: 20 more instructions a Philox block.
QUAVER_HD uint64_t multiply_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}
#else
QUAVER_HD float multiply(float a, float b) { return a * b; }
QUAVER_HD float add(float a, float b) { return a + b; }
QUAVER_HD float square_root(float a) { return __builtin_sqrtf(a); }
QUAVER_HD double multiply(double a, double b) { return a * b; }
QUAVER_HD double add(double a, double b) { return a + b; }
QUAVER_HD uint64_t multiply_wide(uint32_t a, uint32_t b) { return uint64_t(a) * b; }
#endif

}  // namespace quaver
