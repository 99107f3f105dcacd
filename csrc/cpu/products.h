// What the loops of products multiply: elements of type T, or pairs of bf16 in the bits of a float, those by vectors or
// by the tiles of AMX.
#pragma once
#include "cpu/simd.h"

namespace {

// kTogether: neighbours along the depth that one element holds.
template <class T>
struct Plain {
  using Element = T;
  static constexpr int64_t kTogether = 1;
  static QUAVER_INLINE Vector<T> broadcast(const T* a) { return all(*a); }
  static QUAVER_INLINE Vector<T> add_product(Vector<T> a, Vector<T> b, Vector<T> c) { return multiply_add(a, b, c); }
};
#if defined(__AVX512F__)
struct Pairs {
  using Element = float;
  static constexpr int64_t kTogether = 2;
  static QUAVER_INLINE Floats broadcast(const float* a) { return (Floats)(Ints{} + load<int32_t>(a)); }
  static QUAVER_INLINE Floats add_product(Floats a, Floats b, Floats c) { return add_pair_products(a, b, c); }
};
struct TiledPairs : Pairs {};
#endif

}  // namespace
