// From words to numbers, one counter at a time: the definition of quaver's noise in C++ (kernels/philox/README.md). The
// vector form for the CPU is csrc/cpu/noise.h.
#pragma once
#include <cstring>

#include "common/philox.h"
#include "normal_coefficients.h"

namespace quaver {

QUAVER_HD float float_from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

QUAVER_HD uint32_t bits_from_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// 2^24 u: u = (x >> 8) 2^-24 + 2^-25 rounded to float32, in (0, 1].
QUAVER_HD float scaled_uniform(uint32_t x) { return add(float(int32_t(x >> 8)), 0.5f); }

QUAVER_HD float uniform(uint32_t x) { return multiply(scaled_uniform(x), 0x1p-24f); }

// sqrt(-2 log u)
QUAVER_HD float radius(uint32_t x) {
  const uint32_t split = bits_from_float(scaled_uniform(x)) - QUAVER_LOG_SPLIT;
  const float exponent = float(int32_t(split) >> 23);
  const float m = add(float_from_bits((split & 0x7fffffu) + QUAVER_SQRT_HALF), -1.0f);
  float p = QUAVER_LOG6;
  p = add(multiply(p, m), QUAVER_LOG5);
  p = add(multiply(p, m), QUAVER_LOG4);
  p = add(multiply(p, m), QUAVER_LOG3);
  p = add(multiply(p, m), QUAVER_LOG2);
  p = add(multiply(p, m), QUAVER_LOG1);
  p = add(multiply(p, m), QUAVER_LOG0);
  return square_root(add(multiply(p, m), multiply(exponent, QUAVER_MINUS_TWO_LOG_TWO)));
}

// The cosine and sine normals of Box and Muller (1958): the angle is (y >> 8) 2^-24 of a turn.
QUAVER_HD void normal_pair(uint32_t x, uint32_t y, float& cosine, float& sine) {
  const float r = radius(x);
  const uint32_t quadrant = y + 0x20000000u;  // bits 30 and 31: the nearest quarter turn
  // What is left of the angle, in quarter turns: exact, in [-1/2, 1/2).
  const float a = add(float_from_bits(((quadrant >> 7) & 0x7ffffeu) | 0x3f800000u), -1.5f);
  const float z = multiply(a, a);
  float s = add(multiply(QUAVER_SIN3, z), QUAVER_SIN2);
  s = add(multiply(s, z), QUAVER_SIN1);
  s = add(multiply(s, z), QUAVER_SIN0);
  s = multiply(s, a);
  float c = add(multiply(QUAVER_COS2, z), QUAVER_COS1);
  c = add(multiply(c, z), QUAVER_COS0);
  c = add(multiply(c, z), 1.0f);
  const bool odd = quadrant & 0x40000000u;
  const uint32_t cosine_sign = (quadrant + 0x40000000u) & 0x80000000u, sine_sign = quadrant & 0x80000000u;
  cosine = multiply(float_from_bits(bits_from_float(r) ^ cosine_sign), odd ? s : c);
  sine = multiply(float_from_bits(bits_from_float(r) ^ sine_sign), odd ? c : s);
}

// The four elements 4 block .. 4 block + 3 of a normal or uniform source.
QUAVER_HD void four_normals(const Source& source, uint64_t block, float (&out)[4]) {
  const Words x = philox(block, source.stream, source.domain, source.seed);
  normal_pair(x.w[0], x.w[1], out[0], out[1]);
  normal_pair(x.w[2], x.w[3], out[2], out[3]);
}

QUAVER_HD void four_uniforms(const Source& source, uint64_t block, float (&out)[4]) {
  const Words x = philox(block, source.stream, source.domain, source.seed);
  for (int i = 0; i < 4; i++) out[i] = uniform(x.w[i]);
}

// A Rademacher source: element % 128 numbers a bit of block element / 128. The word that has it, by selects (an index
// known at run time would send the words through a GPU's memory), and the sign that bit 0 of `bits` stands for.
QUAVER_HD uint32_t word_of(const Words& x, uint64_t element) {
  const uint32_t low = element & 32 ? x.w[1] : x.w[0], high = element & 32 ? x.w[3] : x.w[2];
  return element & 64 ? high : low;
}

QUAVER_HD float sign_of_bit(uint32_t bits) { return float_from_bits(0xbf800000u ^ bits << 31); }

}  // namespace quaver
