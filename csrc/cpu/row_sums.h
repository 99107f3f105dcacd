// The sum over the rows of a matrix: the gradient of a bias.
#pragma once
#include <vector>

#include "cpu/gemm.h"

namespace quaver::cpu {

// [columns]: in float64, of C's sums of eight rows; in blocks of rows that depend on the shape alone.
template <class C>
std::vector<double> sum_rows(const char* from, ScalarType dtype, int64_t rows, int64_t columns, int64_t stride) {
  constexpr int64_t kTogether = 8;
  const auto& loops = loops_of(dtype);
  const int64_t block = round_up(std::max<int64_t>(64, rows / 64), kTogether), blocks = ceil_div(rows, block);
  std::vector<double> partial(size_t(blocks * columns));
  const auto sum_blocks = [&](int64_t begin, int64_t end) {
    std::vector<C> few(static_cast<size_t>(columns));
    for (int64_t b = begin; b < end; b++) {
      const int64_t last = std::min(rows, (b + 1) * block);
      for (int64_t first = b * block; first < last; first += kTogether) {
        std::fill(few.begin(), few.end(), C(0));
        for (int64_t r = first; r < std::min(last, first + kTogether); r++) {
          loops.accumulate(few.data(), from, r * stride, columns);
        }
        for (int64_t n = 0; n < columns; n++) partial[size_t(b * columns + n)] += double(few[size_t(n)]);
      }
    }
  };
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, block * columns)),
                              sum_blocks);
  std::vector<double> sums(static_cast<size_t>(columns));
  for (int64_t b = 0; b < blocks; b++) {
    for (int64_t n = 0; n < columns; n++) sums[size_t(n)] += partial[size_t(b * columns + n)];
  }
  return sums;
}

}  // namespace quaver::cpu
