// What nvcc, g++ and the emulator spell differently in code that all three compile.
#pragma once
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
#else
QUAVER_HD float multiply(float a, float b) { return a * b; }
QUAVER_HD float add(float a, float b) { return a + b; }
QUAVER_HD float square_root(float a) { return __builtin_sqrtf(a); }
QUAVER_HD double multiply(double a, double b) { return a * b; }
QUAVER_HD double add(double a, double b) { return a + b; }
#endif

}  // namespace quaver
