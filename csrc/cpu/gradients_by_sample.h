// The gradients of down, up, coefficients and gain from G_b, the gradient of W + gain * Delta_b, sample by sample:
//
//   H_b = G_b down^T [N, R]      P_b = (gain up)^T G_b [R, K]
//   of down: sum_b c_b P_b       S = sum_b c_b H_b: of up gain * S, of gain the rows' sums of up * S
//   of coefficients: the columns' sums of gain up * H_b
//
// H_b and P_b are made in tiles that stay in the L2 cache, one sample after the other, and are used up at once. Tiles
// do not depend on the number of threads.
#pragma once
#include "cpu/factor_gradients.h"

namespace quaver::cpu {

// The right operand of several products, packed into `buffer`: its elements (i, k), i < columns.
template <class C, class B>
Panels<C> packed_right(const GemmLoopsOf<C>& loops, const B& b, int64_t columns, int64_t length, C* buffer) {
  const int64_t block = depth_block(length, loops.depth);
  const Panels<C> panels{buffer, loops.columns, block, ceil_div(columns, loops.columns)};
  constexpr int64_t kTogether = 4;  // panels
  parallel_for(0, ceil_div(panels.count, kTogether), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin * kTogether; p < std::min(panels.count, end * kTogether); p += kTogether) {
      const int64_t i = p * panels.width;
      b.pack(loops, panels, p, i, std::min(columns - i, kTogether * panels.width), 0, 0, length);
    }
  });
  return panels;
}
template <class C>
int64_t right_size(const GemmLoopsOf<C>& loops, int64_t columns, int64_t length) {
  return round_up(columns, loops.columns) * round_up(length, depth_block(length, loops.depth));
}

// A tile of a product of packed operands.
template <class C>
void multiply_tile(const GemmLoopsOf<C>& loops, const Left<C>& a, int64_t i, const Panels<C>& b, int64_t panel,
                   int64_t rows, int64_t columns, int64_t length, C* to, int64_t stride) {
  for (int64_t at = 0; at == 0 || at < length; at += b.block) {
    loops.multiply(rows, columns, std::min(length - at, b.block), a.at(i, at), b.at(panel, at), b.size(), to, stride,
                   nullptr, at > 0);
  }
}

template <class C>
class GradientsBySample final : public GradientsOfFactors<C> {
 public:
  // down, up, coefficients as for EffectiveWeight; gain: of each row, or none.
  GradientsBySample(const Tensor& down, const Tensor& up, const Tensor& coefficients, const std::vector<C>& gain,
                    const FactorGradients& out)
      : how_(down.scalar_type()),
        down_(down),
        out_(out),
        rows_(up.size(1)),
        columns_(down.size(2)),
        ranks_(down.size(0) * down.size(1)),
        rank_(down.size(1)),
        factors_(down.size(0)),
        gain_(pointer(gain)),
        scales_(expanded<C>(coefficients, down.size(1))),
        up_(up, gain_) {
    if (out.of_products()) {
      sums_ = torch::stable::new_zeros(down, {rows_, ranks_}, compute_dtype(down.scalar_type()));
      const Matrix<C> right{const_data<char>(down), columns_, false, how_.narrow, how_.pairs, columns_};
      const int64_t length = how_.elements(columns_);
      right_ = packed_right(how_.loops, right, ranks_, length,
                            workspace<C>(Use::kRight, right_size(how_.loops, ranks_, length)));
    }
    if (out.down) {
      of_down_ = torch::stable::new_zeros(down, {ranks_, columns_}, compute_dtype(down.scalar_type()));
      auto* narrow = workspace<uint16_t>(Use::kSamples, how_.pairs ? up.numel() : 0);
      const auto left = multiplied_as(how_, up_.scaled, rows_, ranks_, ranks_, true, narrow);
      const int64_t length = how_.elements(rows_), block = depth_block(length, how_.loops.depth);
      left_ = left_of(how_.loops, left, ranks_, length, block,
                      workspace<C>(Use::kLeft, left_size(how_.loops, left, ranks_, length, block)));
    }
  }

  void add(const C* g, int64_t stride, int64_t first, int64_t samples) override {
    auto* narrow = workspace<uint16_t>(Use::kNarrow, how_.pairs ? samples * rows_ * stride : 0);
    std::vector<Matrix<C>> by_row, by_column;
    for (int64_t b = 0; b < samples; b++) {
      const int64_t at = b * rows_ * stride;
      by_row.push_back(multiplied_as(how_, g + at, rows_, columns_, stride, false, narrow + at));
      by_column.push_back(by_row.back());
      by_column.back().transposed = true;
      by_column.back().depth = rows_;
    }
    if (out_.of_products()) add_products(by_row, first);
    if (out_.down) add_down(by_column, first);
  }

  void finish() override {
    if (out_.up || out_.gain) write_up_and_gain(out_, const_data<C>(sums_), up_.plain, gain_, rows_, ranks_);
    if (out_.down) store_all(*out_.down, const_data<C>(of_down_));
  }

 private:
  static constexpr int64_t kRowsOfTile = 96, kColumnsOfTile = 192;

  void add_products(const std::vector<Matrix<C>>& g, int64_t first) const {
    const auto& loops = how_.loops;
    const int64_t samples = int64_t(g.size()), length = how_.elements(columns_);
    const std::vector<Left<C>> left = packed(g, length);
    const int64_t down = ceil_div(rows_, kRowsOfTile), panels = kColumnsOfTile / loops.columns;
    const int64_t across = ceil_div(right_.count, panels), wide = panels * loops.columns;
    std::vector<C> partial(size_t(out_.coefficients ? samples * down * ranks_ : 0));
    C* sums = data<C>(sums_);
    parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
      const auto& spectral = spectral_loops_of<C>();
      C* tile = workspace<C>(Use::kTile, kRowsOfTile * wide);
      for (int64_t t = begin; t < end; t++) {
        const int64_t n = t % down * kRowsOfTile, r = t / down * wide;
        const int64_t rows = std::min(kRowsOfTile, rows_ - n), columns = std::min(wide, ranks_ - r);
        for (int64_t b = 0; b < samples; b++) {
          multiply_tile(loops, left[size_t(b)], n, right_, r / loops.columns, rows, columns, length, tile, wide);
          spectral.add_scaled_columns(sums + n * ranks_ + r, ranks_, tile, wide, scales(first + b) + r, rows, columns);
          if (partial.empty()) continue;
          spectral.column_dots(partial.data() + (b * down + t % down) * ranks_ + r, tile, wide,
                               up_.scaled + n * ranks_ + r, ranks_, rows, columns);
        }
      }
    });
    if (out_.coefficients) sum_coefficients(partial, first, samples, down);
  }

  void sum_coefficients(const std::vector<C>& partial, int64_t first, int64_t samples, int64_t down) const {
    C* to = data<C>(*out_.coefficients) + first * factors_;
    for (int64_t i = 0; i < samples * factors_; i++) {
      const int64_t b = i / factors_, f = i % factors_;
      double sum = 0;
      for (int64_t d = 0; d < down; d++) {
        const C* from = partial.data() + (b * down + d) * ranks_ + f * rank_;
        for (int64_t j = 0; j < rank_; j++) sum += double(from[j]);
      }
      to[i] = C(sum);
    }
  }

  void add_down(const std::vector<Matrix<C>>& g, int64_t first) const {
    const auto& loops = how_.loops;
    const int64_t samples = int64_t(g.size()), length = how_.elements(rows_);
    const int64_t size = right_size(loops, columns_, length);
    C* buffer = workspace<C>(Use::kPackedB, samples * size);
    std::vector<Panels<C>> right;
    for (int64_t b = 0; b < samples; b++) {
      right.push_back(packed_right(loops, g[size_t(b)], columns_, length, buffer + b * size));
    }
    const int64_t down = ceil_div(ranks_, kRowsOfTile), panels = kColumnsOfTile / loops.columns;
    const int64_t across = ceil_div(ceil_div(columns_, loops.columns), panels), wide = panels * loops.columns;
    C* of_down = data<C>(of_down_);
    parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
      C* tile = workspace<C>(Use::kTile, kRowsOfTile * wide);
      for (int64_t t = begin; t < end; t++) {
        const int64_t r = t % down * kRowsOfTile, k = t / down * wide;
        const int64_t rows = std::min(kRowsOfTile, ranks_ - r), columns = std::min(wide, columns_ - k);
        for (int64_t b = 0; b < samples; b++) {
          multiply_tile(loops, left_, r, right[size_t(b)], k / loops.columns, rows, columns, length, tile, wide);
          spectral_loops_of<C>().add_scaled_rows(of_down + r * columns_ + k, columns_, tile, wide,
                                                 scales(first + b) + r, rows, columns);
        }
      }
    });
  }

  // Of several matrices of [N, K], as left operands.
  std::vector<Left<C>> packed(const std::vector<Matrix<C>>& g, int64_t length) const {
    std::vector<Left<C>> left;
    if (g.empty()) return left;
    const int64_t size = left_size(how_.loops, g[0], rows_, length, right_.block);
    C* buffer = workspace<C>(Use::kPackedA, int64_t(g.size()) * size);
    for (size_t b = 0; b < g.size(); b++) {
      left.push_back(left_of(how_.loops, g[b], rows_, length, right_.block, buffer + int64_t(b) * size));
    }
    return left;
  }

  const C* scales(int64_t b) const { return scales_.data() + b * ranks_; }

  const Arithmetic<C> how_;
  const Tensor& down_;
  const FactorGradients& out_;
  const int64_t rows_, columns_, ranks_, rank_, factors_;
  const C* const gain_;
  const std::vector<C> scales_;
  const UpBesideGain<C> up_;
  Tensor sums_, of_down_;
  Panels<C> right_{};
  Left<C> left_{};
};

}  // namespace quaver::cpu
