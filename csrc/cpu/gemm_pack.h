// Packing of the GEMM's operands into panels. Included once per instruction set.
#pragma once
#include "cpu/gemm_kernel.h"

namespace {

constexpr int kParts = kVectorBytes / 16;  // of 128 bits

// The 16 bytes at row[i * step] + k, for each part i.
template <class V, class T>
QUAVER_INLINE V load_parts(const T* const* row, int step, int64_t k) {
#if defined(__AVX512F__)
  __m512i x = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row[0] + k)));
  x = _mm512_inserti32x4(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[step] + k)), 1);
  x = _mm512_inserti32x4(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[2 * step] + k)), 2);
  return (V)_mm512_inserti32x4(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[3 * step] + k)), 3);
#elif defined(__AVX2__)
  const __m256i x = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row[0] + k)));
  return (V)_mm256_inserti128_si256(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[step] + k)), 1);
#else
  (void)step;
  return load<V>(row[0] + k);
#endif
}

// A block of kLanes rows by kBlock columns, transposed within each 128 bits: part i of a vector comes from rows
// i * kBlock .. i * kBlock + kBlock - 1.
QUAVER_INLINE void transpose(const float* const* row, int64_t k, Floats (&out)[4]) {
  const Floats r0 = load_parts<Floats>(row, 4, k), r1 = load_parts<Floats>(row + 1, 4, k);
  const Floats r2 = load_parts<Floats>(row + 2, 4, k), r3 = load_parts<Floats>(row + 3, 4, k);
  const Doubles low01 = (Doubles)interleave_low(r0, r1), high01 = (Doubles)interleave_high(r0, r1);
  const Doubles low23 = (Doubles)interleave_low(r2, r3), high23 = (Doubles)interleave_high(r2, r3);
  out[0] = (Floats)interleave_low(low01, low23);
  out[1] = (Floats)interleave_high(low01, low23);
  out[2] = (Floats)interleave_low(high01, high23);
  out[3] = (Floats)interleave_high(high01, high23);
}

QUAVER_INLINE void transpose(const double* const* row, int64_t k, Doubles (&out)[2]) {
  const Doubles r0 = load_parts<Doubles>(row, 2, k), r1 = load_parts<Doubles>(row + 1, 2, k);
  out[0] = interleave_low(r0, r1);
  out[1] = interleave_high(r0, r1);
}

template <class T>
void pack_rows(T* to, int64_t width, const T* from, int64_t stride, int64_t count, int64_t depth) {
  constexpr int kBlock = 16 / int(sizeof(T)), kLine = 64 / int(sizeof(T));
  const T* row[kMaxColumns + kLanes<T>];
  // Rows past the last are read as the last: results of such lanes are never used.
  for (int64_t i = 0; i < width + kLanes<T>; i++) row[i] = from + (i < count ? i : count - 1) * stride;
  // A vector may be wider than what is left of the panel. Its store passes into the next column's first lanes, which
  // are written later: lanes go from the last to the first, columns upwards, and the last ones to the loop below.
  const int64_t last = (width - 1) / kLanes<T> * kLanes<T>, end = depth - (width % kLanes<T> ? kLanes<T> : 0);
  int64_t k = 0;
  // A line of each row at a time: rows a multiple of 4 KiB apart share a set of the L1 cache.
  for (; k + kLine <= end; k += kLine) {
    // Rows are short for the hardware's prefetcher: 0.9 -> 0.75 ns an element of matrices in memory, K = 448.
    for (int64_t i = 0; i < width; i++) __builtin_prefetch(row[i] + k + 4 * kLine);
    for (int64_t first = last; first >= 0; first -= kLanes<T>) {
#pragma GCC unroll 4
      for (int block = 0; block < kLine; block += kBlock) {
        Vector<T> columns[kBlock];
        transpose(row + first, k + block, columns);
#pragma GCC unroll 4
        for (int j = 0; j < kBlock; j++) store(to + (k + block + j) * width + first, columns[j]);
      }
    }
  }
  // What is left, block by block: rows of a low-rank factor are no longer than this.
  for (; k + kBlock <= end; k += kBlock) {
    for (int64_t first = last; first >= 0; first -= kLanes<T>) {
      Vector<T> columns[kBlock];
      transpose(row + first, k, columns);
#pragma GCC unroll 4
      for (int j = 0; j < kBlock; j++) store(to + (k + j) * width + first, columns[j]);
    }
  }
  for (; k < depth; k++) {
    for (int64_t i = 0; i < width; i++) to[k * width + i] = row[i][k];
  }
}

template <class T, int kWidth>
QUAVER_INLINE void copy_columns(T* to, int64_t panel, const T* from, int64_t count) {
  for (; count >= kWidth; count -= kWidth, from += kWidth, to += panel) std::memcpy(to, from, kWidth * sizeof(T));
  for (int64_t i = 0; i < kWidth && count > 0; i++) to[i] = from[i < count ? i : count - 1];
}

template <class T>
void pack_columns(T* to, int64_t panel, int64_t width, const T* from, int64_t stride, int64_t count, int64_t depth) {
  for (int64_t k = 0; k < depth; k++) {
    if (width == kRows) {
      copy_columns<T, kRows>(to + k * kRows, panel, from + k * stride, count);
    } else {
      copy_columns<T, kColumns<T>>(to + k * kColumns<T>, panel, from + k * stride, count);
    }
  }
}

#if defined(__AVX512F__)
void zip(void* to, const uint16_t* even, const uint16_t* odd, int64_t count) {
  auto* pairs = static_cast<uint32_t*>(to);
  if (odd) {
    for (int64_t i = 0; i < count; i++) pairs[i] = even[i] | uint32_t(odd[i]) << 16;
  } else {
    for (int64_t i = 0; i < count; i++) pairs[i] = even[i];
  }
}
#endif

}  // namespace
