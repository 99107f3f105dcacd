// Transposes tiles of one vector's lanes by as many rows, in registers.
#pragma once
#include <utility>

#include "cpu/simd.h"

namespace {

template <class V, size_t... I>
QUAVER_INLINE V interleave_halves(V a, V b, bool high, std::index_sequence<I...>) {
  constexpr int kCount = int(sizeof...(I));
  return high ? __builtin_shufflevector(a, b, (kCount / 2 + int(I / 2) + int(I % 2) * kCount)...)
              : __builtin_shufflevector(a, b, (int(I / 2) + int(I % 2) * kCount)...);
}

// to[c * to_stride + r] = from[r * from_stride + c]. Shuffling rows i and i + n / 2 into rows 2 i and 2 i + 1,
// log2(n) times, is the transposition.
template <class T>
QUAVER_INLINE void transpose_tile(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  using V = Vector<T>;
  constexpr int kCount = kLanes<T>;
  V rows[kCount], next[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) rows[i] = load<V>(from + i * from_stride);
#pragma GCC unroll 4
  for (int step = 1; step < kCount; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; i++) {
      next[2 * i] = interleave_halves(rows[i], rows[i + kCount / 2], false, std::make_index_sequence<kCount>());
      next[2 * i + 1] = interleave_halves(rows[i], rows[i + kCount / 2], true, std::make_index_sequence<kCount>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i++) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) store(to + i * to_stride, rows[i]);
}

}  // namespace
