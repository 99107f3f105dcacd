// The noise stream a vector at a time: the same bits as csrc/common/normal.h. Included once per instruction set.
//
// A vector of 64-bit lanes holds one counter a lane, its words in the low halves. Counters are dealt to the lanes so
// that the words of two counters interleave within 128 bits to consecutive elements: no shuffle across 128 bits is
// needed.
#pragma once
#include "common/philox.h"
#include "cpu/simd.h"
#include "normal_coefficients.h"

namespace {

using quaver::kPhiloxM0;
using quaver::kPhiloxM1;
using quaver::kPhiloxRounds;
using quaver::Source;

// What the generators make at a time: 128 elements.
constexpr int kGroupCounters = 32, kGroup = 4 * kGroupCounters;
// Vectors in flight: the rounds and polynomials are chains, and the scheduler sees about 100 instructions. Zen 5,
// AVX-512: 0.61 ns a normal with 1, 0.44 with 2, 0.34 with 4.
constexpr int kTogether = 4;

// The round keys, and what the first three rounds do to the words that are equal in every counter of a source with the
// same high word of the block: 20 multiplications become 17, other work likewise.
struct Schedule {
  uint64_t x2_round0, x0_round1, x2_round1, x2_round2;
  uint64_t k0[kPhiloxRounds], k1[kPhiloxRounds];

  Schedule(const Source& source, uint32_t block_high) {
    uint32_t key0 = uint32_t(source.seed), key1 = uint32_t(source.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; round++) {
      k0[round] = key0;
      k1[round] = key1;
      key0 += quaver::kPhiloxW0;
      key1 += quaver::kPhiloxW1;
    }
    const uint64_t p1 = uint64_t(source.stream) * kPhiloxM1;  // round 0
    const uint32_t x0 = uint32_t(p1 >> 32) ^ block_high ^ uint32_t(k0[0]);
    const uint64_t p0 = uint64_t(x0) * kPhiloxM0;  // round 1
    x2_round0 = source.domain ^ k1[0];
    x0_round1 = uint32_t(p1) ^ k0[1];
    x2_round1 = (p0 >> 32) ^ k1[1];
    x2_round2 = uint32_t(p0) ^ k1[2];
  }
};

// The words of kLongs counters, in the low halves; what is above them is undefined.
struct WordVectors {
  Longs x0, x1, x2, x3;
};

template <int N>
QUAVER_INLINE void philox_vectors(const Schedule& key, const Longs (&low)[N], WordVectors (&out)[N]) {
  const Longs m0 = all(uint64_t(kPhiloxM0)), m1 = all(uint64_t(kPhiloxM1));
#pragma GCC unroll 4
  for (int j = 0; j < N; j++) {
    const Longs r0 = multiply_low_halves(low[j], m0);
    const Longs x2 = (r0 >> 32) ^ all(key.x2_round0);
    const Longs r1 = multiply_low_halves(x2, m1);
    const Longs y0 = (r1 >> 32) ^ all(key.x0_round1), y2 = r0 ^ all(key.x2_round1);
    const Longs p0 = multiply_low_halves(y0, m0), p1 = multiply_low_halves(y2, m1);
    out[j] = {xor3(p1 >> 32, r1, all(key.k0[2])), p1, (p0 >> 32) ^ all(key.x2_round2), p0};
  }
#pragma GCC unroll 10
  for (int round = 3; round < kPhiloxRounds; round++) {
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      WordVectors& x = out[j];
      const Longs p0 = multiply_low_halves(x.x0, m0), p1 = multiply_low_halves(x.x2, m1);
      x = {xor3(p1 >> 32, x.x1, all(key.k0[round])), p1, xor3(p0 >> 32, x.x3, all(key.k1[round])), p0};
    }
  }
}

// Lane 2j holds counter j and lane 2j + 1 counter kLongs / 2 + j.
QUAVER_INLINE Longs dealt_counters(uint64_t first) {
  Longs lanes;
  for (int j = 0; j < kLongs; j++) lanes[j] = uint64_t(j / 2 + j % 2 * (kLongs / 2));
  return lanes + first;
}

QUAVER_INLINE Floats scaled_uniforms(Uints x) { return to_floats((Ints)(x >> 8)) + 0.5f; }

// The statements of normal_pair (common/normal.h), each for N vectors before the next.
#define QUAVER_EACH _Pragma("GCC unroll 4") for (int j = 0; j < N; j++)
template <int N>
QUAVER_INLINE void normal_pairs(const Uints (&x)[N], const Uints (&y)[N], Floats (&cosine)[N], Floats (&sine)[N]) {
  Uints split[N], quadrant[N];
  Floats m[N], r[N], a[N], z[N], s[N], c[N];
  QUAVER_EACH split[j] = (Uints)scaled_uniforms(x[j]) - QUAVER_LOG_SPLIT;
  QUAVER_EACH m[j] = (Floats)((split[j] & 0x7fffffu) + QUAVER_SQRT_HALF) - 1.0f;
  QUAVER_EACH r[j] = QUAVER_LOG6 * m[j] + QUAVER_LOG5;
  QUAVER_EACH r[j] = r[j] * m[j] + QUAVER_LOG4;
  QUAVER_EACH r[j] = r[j] * m[j] + QUAVER_LOG3;
  QUAVER_EACH r[j] = r[j] * m[j] + QUAVER_LOG2;
  QUAVER_EACH r[j] = r[j] * m[j] + QUAVER_LOG1;
  QUAVER_EACH r[j] = r[j] * m[j] + QUAVER_LOG0;
  QUAVER_EACH r[j] = r[j] * m[j] + to_floats((Ints)split[j] >> 23) * QUAVER_MINUS_TWO_LOG_TWO;
  QUAVER_EACH r[j] = square_roots(r[j]);
  QUAVER_EACH quadrant[j] = y[j] + 0x20000000u;
  QUAVER_EACH a[j] = (Floats)mask_or(quadrant[j] >> 7, 0x7ffffeu, 0x3f800000u) - 1.5f;
  QUAVER_EACH z[j] = a[j] * a[j];
  QUAVER_EACH s[j] = QUAVER_SIN3 * z[j] + QUAVER_SIN2;
  QUAVER_EACH c[j] = QUAVER_COS2 * z[j] + QUAVER_COS1;
  QUAVER_EACH s[j] = s[j] * z[j] + QUAVER_SIN1;
  QUAVER_EACH c[j] = c[j] * z[j] + QUAVER_COS0;
  QUAVER_EACH s[j] = (s[j] * z[j] + QUAVER_SIN0) * a[j];
  QUAVER_EACH c[j] = c[j] * z[j] + 1.0f;
  QUAVER_EACH {
    cosine[j] = flip_sign(r[j], quadrant[j] + 0x40000000u) * choose(quadrant[j], 0x40000000u, s[j], c[j]);
    sine[j] = flip_sign(r[j], quadrant[j]) * choose(quadrant[j], 0x40000000u, c[j], s[j]);
  }
}

struct Normals {
  template <int N>
  static QUAVER_INLINE void pairs(const Uints (&x)[N], const Uints (&y)[N], Floats (&even)[N], Floats (&odd)[N]) {
    normal_pairs(x, y, even, odd);
  }
};
struct Uniforms {
  template <int N>
  static QUAVER_INLINE void pairs(const Uints (&x)[N], const Uints (&y)[N], Floats (&even)[N], Floats (&odd)[N]) {
    QUAVER_EACH even[j] = scaled_uniforms(x[j]) * 0x1p-24f;
    QUAVER_EACH odd[j] = scaled_uniforms(y[j]) * 0x1p-24f;
  }
};

// The kGroup elements of group `group`, of a source whose words become elements by Distribution::pairs.
template <class Distribution>
QUAVER_INLINE void make_group(const Schedule& key, uint64_t group, float* out) {
  constexpr int N = kTogether;
  for (int first = 0; first < kGroupCounters; first += N * kLongs) {
    Longs low[N];
    WordVectors words[N];
    Uints x[N], y[N];
    Floats even[N], odd[N];
    QUAVER_EACH low[j] = dealt_counters(uint32_t(group * kGroupCounters) + uint64_t(first + j * kLongs));
    philox_vectors(key, low, words);
    QUAVER_EACH x[j] = pack_low_halves(words[j].x0, words[j].x2);
    QUAVER_EACH y[j] = pack_low_halves(words[j].x1, words[j].x3);
    Distribution::pairs(x, y, even, odd);
    QUAVER_EACH {
      float* to = out + 4 * (first + j * kLongs);
      store(to, interleave_low(even[j], odd[j]));
      store(to + kFloats, interleave_high(even[j], odd[j]));
    }
  }
}

#undef QUAVER_EACH

}  // namespace
