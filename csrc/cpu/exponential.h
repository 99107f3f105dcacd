// exp of each lane, from additions and products alone, the same at every instruction set but for contraction.
#pragma once
#include "cpu/simd.h"

namespace {

// exp(x) for x <= 88, within 1 ulp; 0 below -87 (where float32 has no normal numbers left); a NaN stays one.
// x = n log 2 + r, |r| <= log(2) / 2; exp(r) = 1 + r + r^2 g(r), g the polynomial of degree 4 of least relative error,
// 3.1e-9 (weighted least squares, iterated).
QUAVER_INLINE Floats exponentials(Floats x) {
  // Adding it leaves the nearest integer in the low bits, offset by the exponent's bias.
  constexpr float kRound = 0x1.8p23f + 127;
  const Floats rounded = multiply_add(x, all(1.44269504088896341f), all(kRound));
  const Floats n = rounded - kRound;
  const Floats r = multiply_add(n, all(-0x1.7f7d1cp-20f), multiply_add(n, all(-0x1.62e4p-1f), x));
  Floats g = multiply_add(all(0.0013814319390803576f), r, all(0.008368851616978645f));
  g = multiply_add(g, r, all(0.041668400168418884f));
  g = multiply_add(g, r, all(0.1666651964187622f));
  g = multiply_add(g, r, all(0.4999999403953552f));
  const Floats mantissa = multiply_add(g * r, r, r) + 1.0f;
  const Floats result = mantissa * (Floats)((Uints)rounded << 23);
  return x < -87.0f ? Floats{} : result;
}

// As above, 0 below -708. exp(r) by its series to r^13 / 13!, which is exact to 2^-57.
QUAVER_INLINE Doubles exponentials(Doubles x) {
  constexpr double kRound = 0x1.8p52 + 1023;
  const Doubles rounded = multiply_add(x, all(1.4426950408889634), all(kRound));
  const Doubles n = rounded - kRound;
  const Doubles r = multiply_add(n, all(-0x1.ef35793c7673p-45), multiply_add(n, all(-0x1.62e42fefa38p-1), x));
  constexpr double kInverseFactorials[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                           1.0 / 40320,     1.0 / 5040,     1.0 / 720,     1.0 / 120,
                                           1.0 / 24,        1.0 / 6,        1.0 / 2};
  Doubles g = all(1.0 / 6227020800);
#pragma GCC unroll 11
  for (int i = 0; i < 11; i++) g = multiply_add(g, r, all(kInverseFactorials[i]));
  const Doubles mantissa = multiply_add(g * r, r, r) + 1.0;
  const Doubles result = mantissa * (Doubles)((Longs)rounded << 52);
  return x < -708.0 ? Doubles{} : result;
}

}  // namespace
