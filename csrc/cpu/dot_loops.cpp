#include "cpu/dot_loops.h"

#include "cpu/gemm_kernel.h"
#include "cpu/level.h"

namespace {

// Rows of w and of x at a time: their products are in registers.
constexpr int kDotRows = 4, kDotInputs = 3;

template <class T, int N, int M>
void add_block(T* sums, int64_t sums_stride, const T* w, int64_t w_stride, const T* x, int64_t x_stride,
               int64_t depth) {
  using V = Vector<T>;
  V sum[N][M];
#define QUAVER_EACH_SUM \
  _Pragma("GCC unroll 4") for (int i = 0; i < N; i++) _Pragma("GCC unroll 3") for (int m = 0; m < M; m++)
  QUAVER_EACH_SUM sum[i][m] = load<V>(sums + i * sums_stride + m * kLanes<T>);
  int64_t k = 0;
  for (; k + kLanes<T> <= depth; k += kLanes<T>) {
    V input[M];
#pragma GCC unroll 3
    for (int m = 0; m < M; m++) input[m] = load<V>(x + m * x_stride + k);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      const V row = load<V>(w + i * w_stride + k);
#pragma GCC unroll 3
      for (int m = 0; m < M; m++) sum[i][m] = multiply_add(row, input[m], sum[i][m]);
    }
  }
  QUAVER_EACH_SUM {
    T* to = sums + i * sums_stride + m * kLanes<T>;
    store(to, sum[i][m]);
    for (int64_t r = k; r < depth; r++) to[r - k] += w[i * w_stride + r] * x[m * x_stride + r];
  }
#undef QUAVER_EACH_SUM
}

template <class T>
using Block = void (*)(T* sums, int64_t sums_stride, const T* w, int64_t w_stride, const T* x, int64_t x_stride,
                       int64_t depth);
template <class T, int N>
constexpr Block<T> kBlocks[kDotInputs] = {add_block<T, N, 1>, add_block<T, N, 2>, add_block<T, N, 3>};

template <class T>
void add(T* sums, const T* w, int64_t w_stride, int64_t w_rows, const T* x, int64_t x_stride, int64_t x_rows,
         int64_t depth) {
  const int64_t sums_stride = x_rows * kLanes<T>;
  for (int64_t i = 0; i < w_rows;) {
    const bool whole = w_rows - i >= kDotRows;
    const Block<T>* blocks = whole ? kBlocks<T, kDotRows> : kBlocks<T, 1>;
    for (int64_t m = 0; m < x_rows; m += kDotInputs) {
      const int64_t inputs = x_rows - m < kDotInputs ? x_rows - m : kDotInputs;
      blocks[inputs - 1](sums + i * sums_stride + m * kLanes<T>, sums_stride, w + i * w_stride, w_stride,
                         x + m * x_stride, x_stride, depth);
    }
    i += whole ? kDotRows : 1;
  }
}

template <class T>
void total(T* out, const T* sums, int64_t count) {
  for (int64_t i = 0; i < count; i++, sums += kLanes<T>) {
    T lanes[kLanes<T>];
    std::memcpy(lanes, sums, sizeof lanes);
    for (int half = kLanes<T> / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    }
    out[i] = lanes[0];
  }
}

template <class T>
constexpr quaver::cpu::DotLoopsOf<T> loops = {kLanes<T>, add<T>, total<T>};

}  // namespace

namespace quaver::cpu {
extern const DotLoops QUAVER_AT_LEVEL(dot_loops);
const DotLoops QUAVER_AT_LEVEL(dot_loops) = {loops<float>, loops<double>};
}  // namespace quaver::cpu
