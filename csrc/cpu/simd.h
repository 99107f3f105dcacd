// The few vector operations that the loops need, at the width of the instruction set this file is compiled for.
// GCC and clang vector types do the rest. Everything is in an anonymous namespace: the same names exist once per
// instruction set, and the linker must never keep one copy for all of them.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__) && !defined(QUAVER_PORTABLE)
#define QUAVER_SSE2
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Uints __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Longs __attribute__((vector_size(kVectorBytes)));
constexpr int kFloats = kVectorBytes / 4, kLongs = kVectorBytes / 8;

// Of float or double.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Floats;
};
template <>
struct VectorOf<double> {
  using type = Doubles;
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

#define QUAVER_INLINE inline __attribute__((always_inline))

// The product of the low halves of each 64-bit lane.
QUAVER_INLINE Longs multiply_low_halves(Longs a, Longs b) {
#if defined(__AVX512F__)
  return (Longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(QUAVER_SSE2)
  return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

QUAVER_INLINE Longs xor3(Longs a, Longs b, Longs c) {
#if defined(__AVX512F__)
  return (Longs)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// The low half of each 64-bit lane of `low`, with the low half of `high` above it.
QUAVER_INLINE Uints pack_low_halves(Longs low, Longs high) {
#if defined(__AVX512F__)
  return (Uints)_mm512_mask_blend_epi32(0xAAAA, (__m512i)low, (__m512i)(high << 32));
#elif defined(__AVX2__)
  return (Uints)_mm256_blend_epi32((__m256i)low, (__m256i)(high << 32), 0xAA);
#else
  return (Uints)((low & 0xffffffffu) | high << 32);
#endif
}

// (bits & mask) | ones
QUAVER_INLINE Uints mask_or(Uints bits, uint32_t mask, uint32_t ones) {
#if defined(__AVX512F__)
  return (Uints)_mm512_ternarylogic_epi32((__m512i)bits, _mm512_set1_epi32(int(mask)), _mm512_set1_epi32(int(ones)),
                                          0xEA);
#else
  return (bits & mask) | ones;
#endif
}

// x with its sign flipped where bit 31 of `bits` is set.
QUAVER_INLINE Floats flip_sign(Floats x, Uints bits) {
#if defined(__AVX512F__)
  return (Floats)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)bits, _mm512_set1_epi32(int(0x80000000u)), 0x78);
#else
  return (Floats)((Uints)x ^ (bits & 0x80000000u));
#endif
}

// `yes` where `bit` of `bits` is set, else `no`.
QUAVER_INLINE Floats choose(Uints bits, uint32_t bit, Floats yes, Floats no) {
#if defined(__AVX512F__)
  return (Floats)_mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(int(bit))), (__m512)no,
                                      (__m512)yes);
#else
  return (bits & bit) != 0 ? yes : no;
#endif
}

QUAVER_INLINE Floats square_roots(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(QUAVER_SSE2)
  return (Floats)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kFloats; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Within each 128 bits: a0 b0 a1 b1 and a2 b2 a3 b3.
QUAVER_INLINE Floats interleave_low(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_unpacklo_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_unpacklo_ps((__m256)a, (__m256)b);
#elif defined(QUAVER_SSE2)
  return (Floats)_mm_unpacklo_ps((__m128)a, (__m128)b);
#else
  return Floats{a[0], b[0], a[1], b[1]};
#endif
}

QUAVER_INLINE Floats interleave_high(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#elif defined(QUAVER_SSE2)
  return (Floats)_mm_unpackhi_ps((__m128)a, (__m128)b);
#else
  return Floats{a[2], b[2], a[3], b[3]};
#endif
}

QUAVER_INLINE Doubles interleave_low(Doubles a, Doubles b) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_unpacklo_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Doubles)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
#else
  return Doubles{a[0], b[0]};
#endif
}

QUAVER_INLINE Doubles interleave_high(Doubles a, Doubles b) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Doubles)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
#else
  return Doubles{a[1], b[1]};
#endif
}

// a * b + c, rounded once where the instruction set can: never for noise.
QUAVER_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

QUAVER_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512F__)
// c plus the products of the pairs of bf16 in each 32 bits of a and b. Needs AVX512-BF16, which the level lacks: as an
// intrinsic it could not be inlined into functions that are compiled without.
QUAVER_INLINE Floats add_pair_products(Floats a, Floats b, Floats c) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
#endif

// The larger of each lane; b where one of them is not a number.
QUAVER_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

QUAVER_INLINE Doubles larger(Doubles a, Doubles b) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Doubles)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

QUAVER_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
QUAVER_INLINE Floats all(float x) { return x - Floats{}; }
QUAVER_INLINE Doubles all(double x) { return x - Doubles{}; }
QUAVER_INLINE Longs all(uint64_t x) { return x - Longs{}; }

template <class V>
QUAVER_INLINE V load(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <class V>
QUAVER_INLINE void store(void* to, V x) {
  std::memcpy(to, &x, sizeof x);
}

}  // namespace
