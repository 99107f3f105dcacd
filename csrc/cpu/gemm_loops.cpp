#include "cpu/gemm_loops.h"

#include "cpu/gemm_amx.h"
#include "cpu/gemm_kernel.h"
#include "cpu/gemm_pack.h"
#include "cpu/level.h"

namespace {

using quaver::cpu::LeftBlock;

// A tile that is cut by the right edge of C: the kernel works on a copy.
template <class T>
void multiply_edge(Tile<T> kernel, int rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride, const T* b,
                   T* c, int64_t stride, const T* bias, Addend addend) {
  alignas(64) T tile[kRows * kColumns<T>] = {}, of_bias[kColumns<T>] = {};
  if (addend == kBias) std::memcpy(of_bias, bias, size_t(columns) * sizeof(T));
  if (addend == kResult) {
    for (int i = 0; i < rows; i++) std::memcpy(tile + i * kColumns<T>, c + i * stride, size_t(columns) * sizeof(T));
  }
  kernel(depth, a, a_stride, b, tile, kColumns<T>, of_bias, addend);
  for (int i = 0; i < rows; i++) std::memcpy(c + i * stride, tile + i * kColumns<T>, size_t(columns) * sizeof(T));
}

template <class P, class T = typename P::Element>
void multiply(int64_t rows, int64_t columns, int64_t depth, const LeftBlock<T>& a, const T* b, int64_t b_panel, T* c,
              int64_t stride, const T* bias, bool accumulate) {
  const Addend addend = accumulate ? kResult : bias ? kBias : kNothing;
  const auto tile = [&](int64_t i, int64_t j) {
    const int height = rows - i < kRows ? int(rows - i) : kRows;
    const int width = columns - j < kColumns<T> ? int(columns - j) : kColumns<T>;
    const int vectors = (width + kLanes<T> - 1) / kLanes<T>;
    const Tile<T> kernel = (a.by_row ? tiles_of<P, true>(vectors) : tiles_of<P, false>(vectors))[height - 1];
    const T* of_a = a.data + i / kRows * a.panel;
    const T* of_b = b + j / kColumns<T> * b_panel;
    const T* of_bias = bias ? bias + j : nullptr;
    T* of_c = c + i * stride + j;
    if (width % kLanes<T> == 0) {
      kernel(depth, of_a, a.stride, of_b, of_c, stride, of_bias, addend);
    } else {
      multiply_edge(kernel, height, width, depth, of_a, a.stride, of_b, of_c, stride, of_bias, addend);
    }
  };
  // What the inner loop reads again and again stays in the L1 cache: a panel of B, or, where the depth is small, all of
  // B, and C is written row by row.
  constexpr int64_t kSmall = 16384 / int(sizeof(T));
  if (depth * columns <= kSmall) {
    for (int64_t i = 0; i < rows; i += kRows) {
      for (int64_t j = 0; j < columns; j += kColumns<T>) tile(i, j);
    }
  } else {
    for (int64_t j = 0; j < columns; j += kColumns<T>) {
      for (int64_t i = 0; i < rows; i += kRows) tile(i, j);
    }
  }
}

template <class P, class T = typename P::Element>
constexpr quaver::cpu::GemmLoopsOf<T> loops = {kRows, kColumns<T>, kDepth, pack_rows<T>, pack_columns<T>, multiply<P>};

#if defined(__AVX512F__)
constexpr quaver::cpu::PairLoops pair_loops = {loops<Pairs>, zip};
constexpr const quaver::cpu::PairLoops *kPairLoops = &pair_loops, *kAmxLoops = &amx_loops;
#else
constexpr const quaver::cpu::PairLoops *kPairLoops = nullptr, *kAmxLoops = nullptr;
#endif

}  // namespace

namespace quaver::cpu {
extern const GemmLoops QUAVER_AT_LEVEL(gemm_loops);
const GemmLoops QUAVER_AT_LEVEL(gemm_loops) = {loops<Plain<float>>, loops<Plain<double>>, kPairLoops, kAmxLoops};
}  // namespace quaver::cpu
