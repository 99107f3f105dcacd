// The inner loops of the GEMM in gemm.h, compiled once per instruction set: packing and the product of packed panels.
//
// C [rows, columns] = A [rows, depth] B [depth, columns]. A panel holds `width` rows of A, or columns of B, element
// (i, k) at k * width + i, so that the micro-kernel reads both operands from end to end.
#pragma once
#include <cstdint>

#include "cpu/simd_level.h"

namespace quaver::cpu {

template <class T>
struct GemmLoopsOf {
  // Widths of a panel of A and of B: the rows and columns that the micro-kernel holds in registers.
  int rows, columns;
  // The depth of a panel at most: longer sums are made of several panels.
  int depth;
  // to[k * width + i] = from[i * stride + k], for i < count <= width; what is beside them is undefined.
  void (*pack_rows)(T* to, int64_t width, const T* from, int64_t stride, int64_t count, int64_t depth);
  // to[i / width * panel + k * width + i % width] = from[k * stride + i], for i < count.
  void (*pack_columns)(T* to, int64_t panel, int64_t width, const T* from, int64_t stride, int64_t count,
                       int64_t depth);
  // c[i * stride + j] = (accumulate ? c : bias ? bias[j] : 0) + sum_k A(i, k) B(k, j), of panels that follow each other:
  // those of A are a_panel elements apart, those of B b_panel.
  void (*multiply)(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_panel, const T* b,
                   int64_t b_panel, T* c, int64_t stride, const T* bias, bool accumulate);
};

struct GemmLoops {
  GemmLoopsOf<float> f32;
  GemmLoopsOf<double> f64;
};

QUAVER_LOOPS(GemmLoops, gemm_loops)

}  // namespace quaver::cpu
