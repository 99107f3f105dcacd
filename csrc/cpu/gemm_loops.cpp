#include "cpu/gemm_loops.h"

#include "cpu/gemm_kernel.h"
#include "cpu/gemm_pack.h"
#include "cpu/level.h"

namespace {

// A tile that is cut by the right edge of C: the kernel works on a copy.
template <class T>
void multiply_edge(int rows, int64_t columns, int64_t depth, const T* a, const T* b, T* c, int64_t stride,
                   const T* bias, Start start) {
  alignas(64) T tile[kRows * kColumns<T>] = {}, of_bias[kColumns<T>] = {};
  if (start == kFromBias) std::memcpy(of_bias, bias, size_t(columns) * sizeof(T));
  if (start == kFromResult) {
    for (int i = 0; i < rows; i++) std::memcpy(tile + i * kColumns<T>, c + i * stride, size_t(columns) * sizeof(T));
  }
  kTiles<T>[rows - 1](depth, a, b, tile, kColumns<T>, of_bias, start);
  for (int i = 0; i < rows; i++) std::memcpy(c + i * stride, tile + i * kColumns<T>, size_t(columns) * sizeof(T));
}

template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_panel, const T* b, int64_t b_panel,
              T* c, int64_t stride, const T* bias, bool accumulate) {
  const Start start = accumulate ? kFromResult : bias ? kFromBias : kFromZero;
  for (int64_t j = 0; j < columns; j += kColumns<T>, b += b_panel) {
    const T* of_a = a;
    for (int64_t i = 0; i < rows; i += kRows, of_a += a_panel) {
      const int height = rows - i < kRows ? int(rows - i) : kRows;
      T* of_c = c + i * stride + j;
      const T* of_bias = bias ? bias + j : nullptr;
      if (columns - j >= kColumns<T>) {
        kTiles<T>[height - 1](depth, of_a, b, of_c, stride, of_bias, start);
      } else {
        multiply_edge(height, columns - j, depth, of_a, b, of_c, stride, of_bias, start);
      }
    }
  }
}

template <class T>
constexpr quaver::cpu::GemmLoopsOf<T> loops = {kRows, kColumns<T>, kDepth, pack_rows<T>, pack_columns<T>, multiply<T>};

}  // namespace

namespace quaver::cpu {
extern const GemmLoops QUAVER_AT_LEVEL(gemm_loops);
const GemmLoops QUAVER_AT_LEVEL(gemm_loops) = {loops<float>, loops<double>};
}  // namespace quaver::cpu
