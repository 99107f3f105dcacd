// The gradients of down, up, coefficients and gain from G_b, the gradient of W + gain * Delta_b, with what each factor
// has to do with several samples made at once (factor_loops.h):
//
//   S_f = sum_b c_bf G_b [N, K]
//   of down: (gain up_f)^T S_f      Z_f = S_f down_f^T: of up gain * Z, of gain the rows' sums of up * Z
//   of coefficients: the sums over N and K of (gain up_f down_f) G_b
//
// Tiles of S_f and of up_f down_f stay in the L1 cache. What they are does not depend on the number of threads.
#pragma once
#include <memory>

#include "cpu/gradients_by_sample.h"

namespace quaver::cpu {

template <class C>
class GradientsByFactor final : public GradientsOfFactors<C> {
 public:
  // As GradientsBySample.
  GradientsByFactor(const Tensor& down, const Tensor& up, const Tensor& coefficients, const std::vector<C>& gain,
                    const FactorGradients& out)
      : how_(down.scalar_type()),
        out_(out),
        rows_(up.size(1)),
        columns_(down.size(2)),
        factors_(down.size(0)),
        rank_(down.size(1)),
        ranks_(factors_ * rank_),
        gain_(pointer(gain)),
        coefficients_(torch::stable::contiguous(coefficients)),
        down_(in_dtype(down, compute_dtype(down.scalar_type()))),
        up_(up, gain_) {
    if (out.up || out.gain) of_up_ = side(rows_);
    if (out.down) of_down_ = side(columns_);
    if (out.coefficients) right_ = packed_down();
  }

  void add(const C* g, int64_t stride, int64_t first, int64_t samples) override {
    for (int64_t b = 0; b < samples; b += kSamplesTogether) {
      const int64_t now = std::min(kSamplesTogether, samples - b);
      const C* from = g + b * rows_ * stride;
      if (out_.down || out_.coefficients) add_along_rows(from, stride, first + b, now);
      if (out_.up || out_.gain) add_along_columns(from, stride, first + b, now);
    }
  }

  void finish() override {
    if (out_.up || out_.gain) {
      C* sums = workspace<C>(Use::kFactors, rows_ * ranks_);
      const C* from = const_data<C>(of_up_);
      parallel_for(0, panels(rows_), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p++) {
          const int64_t n = p * width_;
          spectral_loops_of<C>().transpose(sums + n * ranks_, ranks_, from + n * ranks_, width_, ranks_,
                                           std::min(width_, rows_ - n));
        }
      });
      write_up_and_gain(out_, sums, up_.plain, gain_, rows_, ranks_);
    }
    if (out_.down) {
      const auto& loops = loops_of(out_.down->scalar_type());
      const C* from = const_data<C>(of_down_);
      char* to = output<char>(*out_.down);
      for_rows(ranks_, columns_, [&](int64_t r) {
        for (int64_t k = 0; k < columns_; k += width_) {
          loops.store(to, r * columns_ + k, from + k * ranks_ + r * width_, std::min(width_, columns_ - k));
        }
      });
    }
  }

 private:
  // Tiles of rows whose dots are summed before they go on in float64.
  static constexpr int64_t kTilesOfDots = 4;

  // Factors of a task, which takes them through one panel: all, unless there are too few panels for all threads.
  int64_t factors_of_task(int64_t panels) const {
    constexpr int64_t kTasks = 4, kFewest = 16;
    const int64_t parts = ceil_div(kTasks * torch::stable::get_num_threads(), std::max<int64_t>(1, panels));
    return std::max(kFewest, round_up(ceil_div(factors_, parts), kFewest));
  }

  int64_t panels(int64_t columns) const { return ceil_div(columns, width_); }

  // Sums [R, columns], in panels of `width_` columns.
  Tensor side(int64_t columns) const {
    return torch::stable::new_zeros(coefficients_, {panels(columns), ranks_, width_});
  }

  // down in panels: zeros beside the last columns.
  const C* packed_down() const {
    C* to = workspace<C>(Use::kRight, panels(columns_) * ranks_ * width_);
    const C* from = const_data<C>(down_);
    for_rows(panels(columns_), ranks_ * width_, [&](int64_t p) {
      const int64_t k = p * width_, count = std::min(width_, columns_ - k);
      for (int64_t r = 0; r < ranks_; r++) {
        C* row = to + k * ranks_ + r * width_;
        std::fill(std::copy_n(from + r * columns_ + k, count, row), row + width_, C(0));
      }
    });
    return to;
  }

  FactorSizes<C> sizes(int64_t columns, int64_t f, int64_t factors, int64_t first, int64_t samples) const {
    return {
        columns, std::min(factors, factors_ - f), rank_, samples, const_data<C>(coefficients_) + first * factors_ + f,
        factors_};
  }

  // Of down and of the coefficients, panel by panel of columns.
  void add_along_rows(const C* g, int64_t stride, int64_t first, int64_t samples) {
    const auto& loops = factor_loops_of<C>();
    const int64_t across = panels(columns_), together = factors_of_task(across), blocks = ceil_div(factors_, together);
    C* side = out_.down ? data<C>(of_down_) : nullptr;
    std::vector<double> partial(size_t(out_.coefficients ? across * samples * factors_ : 0));
    parallel_for(0, across * blocks, 1, [&](int64_t begin, int64_t end) {
      C* tile = workspace<C>(Use::kTile, loops.side_rows * samples * width_);
      std::vector<C> dots(size_t(out_.coefficients ? together * samples * loops.lanes : 0));
      for (int64_t t = begin; t < end; t++) {
        const int64_t p = t / blocks, k = p * width_, f = t % blocks * together, at = f * rank_;
        const FactorSizes<C> s = sizes(std::min(width_, columns_ - k), f, together, first, samples);
        int64_t tiles = 0;
        for (int64_t n = 0; n < rows_; n += loops.side_rows) {
          const int64_t rows = std::min<int64_t>(loops.side_rows, rows_ - n);
          take_rows(tile, g + n * stride + k, stride, rows, s);
          const C* up = up_.scaled + n * ranks_ + at;
          if (side) loops.add_side(side + (k * ranks_ + at * width_), {up, 0, ranks_, false}, tile, rows, s);
          if (dots.empty()) continue;
          for (int64_t i = 0; i < rows; i += loops.sums.rows) {
            loops.dots(dots.data(), {up + i * ranks_, 0, ranks_, true}, right_ + k * ranks_ + at * width_,
                       tile + i * samples * width_, std::min<int64_t>(loops.sums.rows, rows - i), s);
          }
          if (++tiles % kTilesOfDots == 0 || n + rows == rows_)
            take_dots(dots, partial.data() + p * samples * factors_, f, s);
        }
      }
    });
    if (out_.coefficients) write_coefficients(partial, across, first, samples);
  }

  // tile[i][b][..] = rows i of samples b, zeros beside them.
  void take_rows(C* tile, const C* g, int64_t stride, int64_t rows, const FactorSizes<C>& s) const {
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t b = 0; b < s.samples; b++, tile += width_) {
        std::fill(std::copy_n(g + (b * rows_ + i) * stride, s.columns, tile), tile + width_, C(0));
      }
    }
  }

  // Adds the dots to sums [samples, factors], in float64, and begins again.
  void take_dots(std::vector<C>& dots, double* sums, int64_t f, const FactorSizes<C>& s) const {
    const C* from = dots.data();
    const int64_t lanes = factor_loops_of<C>().lanes;
    for (int64_t i = 0; i < s.factors; i++) {
      for (int64_t b = 0; b < s.samples; b++) {
        double sum = 0;
        for (int64_t l = 0; l < lanes; l++) sum += double(*from++);
        sums[b * factors_ + f + i] += sum;
      }
    }
    std::fill(dots.begin(), dots.end(), C(0));
  }

  void write_coefficients(const std::vector<double>& partial, int64_t parts, int64_t first, int64_t samples) const {
    const int64_t count = samples * factors_;
    C* to = data<C>(*out_.coefficients) + first * factors_;
    for (int64_t i = 0; i < count; i++) {
      double sum = 0;
      for (int64_t p = 0; p < parts; p++) sum += partial[size_t(p * count + i)];
      to[i] = C(sum);
    }
  }

  // Of up and gain, panel by panel of rows: the same with G_b transposed.
  void add_along_columns(const C* g, int64_t stride, int64_t first, int64_t samples) {
    const auto& loops = factor_loops_of<C>();
    const int64_t across = panels(rows_), together = factors_of_task(across), blocks = ceil_div(factors_, together);
    C* side = data<C>(of_up_);
    parallel_for(0, across * blocks, 1, [&](int64_t begin, int64_t end) {
      C* tile = workspace<C>(Use::kTile, loops.side_rows * samples * width_);
      for (int64_t t = begin; t < end; t++) {
        const int64_t n = t / blocks * width_, f = t % blocks * together, at = f * rank_;
        const FactorSizes<C> s = sizes(std::min(width_, rows_ - n), f, together, first, samples);
        std::fill_n(tile, loops.side_rows * samples * width_, C(0));
        for (int64_t k = 0; k < columns_; k += loops.side_rows) {
          const int64_t rows = std::min<int64_t>(loops.side_rows, columns_ - k);
          for (int64_t b = 0; b < samples; b++) {
            spectral_loops_of<C>().transpose(tile + b * width_, samples * width_, g + (b * rows_ + n) * stride + k,
                                             stride, s.columns, rows);
          }
          loops.add_side(side + n * ranks_ + at * width_, {const_data<C>(down_) + at * columns_ + k, 0, columns_, true},
                         tile, rows, s);
        }
      }
    });
  }

  const Arithmetic<C> how_;
  const FactorGradients& out_;
  const int64_t rows_, columns_, factors_, rank_, ranks_, width_ = how_.loops.columns;
  const C* const gain_;
  const Tensor coefficients_, down_;
  const UpBesideGain<C> up_;
  const C* right_ = nullptr;
  Tensor of_up_, of_down_;  // of side()
};

// Those of the two that takes fewer multiply-adds; of bf16 by AMX sample by sample: its tiles are faster than sharing
// in float32.
template <class C>
std::unique_ptr<GradientsOfFactors<C>> gradients_of_factors(const Tensor& down, const Tensor& up,
                                                            const Tensor& coefficients, const std::vector<C>& gain,
                                                            const FactorGradients& out) {
  const int64_t samples = coefficients.size(0), rank = down.size(1);
  const bool of_up = out.up || out.gain;
  const int64_t by_sample = (int(of_up || out.coefficients) + int(out.down != nullptr)) * rank * samples;
  const int64_t by_factor =
      (int(of_up) + int(out.coefficients != nullptr) + int(out.down != nullptr)) * shared_cost(samples, rank);
  const bool by_tiles = has_amx() && pair_loops_of(down.scalar_type());
  if (by_tiles || by_factor >= by_sample) {
    return std::make_unique<GradientsBySample<C>>(down, up, coefficients, gain, out);
  }
  return std::make_unique<GradientsByFactor<C>>(down, up, coefficients, gain, out);
}

// Samples whose matrices [rows, stride] are in memory at a time, `together` of which have something to share: these,
// unless they are huge, else as many as the caches hold.
template <class C>
int64_t samples_at_a_time(int64_t rows, int64_t stride, int64_t together) {
  constexpr int64_t kBytes = 8 << 20, kMostBytes = 64 << 20;
  const int64_t bytes = std::max<int64_t>(1, rows * stride * int64_t(sizeof(C)));
  return std::max<int64_t>({1, kBytes / bytes / together * together, std::min(together, kMostBytes / bytes)});
}

}  // namespace quaver::cpu
