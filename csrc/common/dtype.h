// The element types of a tensor and their conversion to and from the type that arithmetic runs in.
#pragma once
#include "common/normal.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace quaver {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// float32 for the 16-bit types and float32 itself, float64 for float64.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

QUAVER_HD float widen(float x) { return x; }
QUAVER_HD double widen(double x) { return x; }
QUAVER_HD float widen(bfloat16 x) { return float_from_bits(uint32_t(x.bits) << 16); }

QUAVER_HD float widen(float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 moves the exponent and makes subnormals normal, exactly.
  return float_from_bits(sign | bits_from_float(float_from_bits(magnitude << 13) * 0x1p112f));
#endif
}

template <class T>
QUAVER_HD T narrow(compute_t<T> x);
template <>
QUAVER_HD float narrow<float>(float x) {
  return x;
}
template <>
QUAVER_HD double narrow<double>(double x) {
  return x;
}
template <>
QUAVER_HD bfloat16 narrow<bfloat16>(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bits_from_float(x);
  // To nearest, ties to even; a NaN stays one.
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded)};
#endif
}
template <>
QUAVER_HD float16 narrow<float16>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bits_from_float(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                                    // below 2^-14: subnormal, a multiple of 2^-24
    // Adding 1/2 leaves the multiple of 2^-24, rounded to nearest even, in the low bits.
    return {uint16_t(sign | (bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13)};
#endif
}

}  // namespace quaver
