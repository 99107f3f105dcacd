// The inner loops of the GEMM in gemm.h, compiled once per instruction set: packing and the product of packed panels.
//
// C [rows, columns] = A [rows, depth] B [depth, columns]. A panel holds `width` rows of A, or columns of B, element
// (i, k) at k * width + i, so that the micro-kernel reads it from end to end. A may be read where it is.
#pragma once
#include <cstdint>

#include "cpu/simd_level.h"

namespace quaver::cpu {

// A block of A: groups of `rows` rows that are `panel` elements apart. Element (i, k) of a group lies at
// i * stride + k where `by_row` says so, else at k * stride + i, as it does in a panel with its width for the stride.
template <class T>
struct LeftBlock {
  const T* data;
  int64_t panel, stride;
  bool by_row;
};

template <class T>
struct GemmLoopsOf {
  // Widths of a panel of A and of B: the rows and columns that the micro-kernel holds in registers.
  int rows, columns;
  // The depth of a panel at most: longer sums are made of several panels.
  int depth;
  // to[k * width + i] = from[i * stride + k], for i < count <= width; what is beside them is undefined. (A panel of A
  // has an order of its own under AMX: gemm_amx.h.)
  void (*pack_rows)(T* to, int64_t width, const T* from, int64_t stride, int64_t count, int64_t depth);
  // to[i / width * panel + k * width + i % width] = from[k * stride + i], for i < count.
  void (*pack_columns)(T* to, int64_t panel, int64_t width, const T* from, int64_t stride, int64_t count,
                       int64_t depth);
  // c[i * stride + j] = (accumulate ? c : bias ? bias[j] : 0) + sum_k A(i, k) B(k, j), of panels that follow each other
  // b_panel elements apart.
  void (*multiply)(int64_t rows, int64_t columns, int64_t depth, const LeftBlock<T>& a, const T* b, int64_t b_panel,
                   T* c, int64_t stride, const T* bias, bool accumulate);
};

// bf16 by the instructions that multiply pairs of them and add both products to a float. Two neighbours along the
// depth, the first in the low half, are the bits of one float of A and of B, so that panels and packing are those of
// floats with half the depth. C and the bias are floats. The instructions take subnormal numbers for zero.
// Pairs are packed in multiples of so many along the depth, but for the last of them.
constexpr int64_t kPairsTogether = 16;

struct PairLoops {
  GemmLoopsOf<float> gemm;
  // 32 bits of `to` from each even[i] and odd[i]; no `odd` is zeros.
  void (*zip)(void* to, const uint16_t* even, const uint16_t* odd, int64_t count);
};

struct GemmLoops {
  GemmLoopsOf<float> f32;
  GemmLoopsOf<double> f64;
  // Null at the levels that never have the instructions: for has_bf16() and for has_amx() only.
  const PairLoops *bf16, *amx;
};

QUAVER_LOOPS(GemmLoops, gemm_loops)

}  // namespace quaver::cpu
