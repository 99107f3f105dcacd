// z up^T of few rows, where a row of up is in as many pieces as there are factors: up is read from end to end instead,
// which the hardware fetches ahead, and each of its elements has a sum of its own.
#pragma once
#include <numeric>

#include "cpu/spectral_inputs.h"

namespace quaver::cpu {

// In elements of C, or in pairs of bf16 in the bits of floats: `together` elements of up in each.
template <class C>
class InOrder {
 public:
  static bool takes(const SpectralInputs& in, int64_t together) {
    const Tensor& up = in.up;
    const auto in_pairs = [&](int64_t elements) { return elements % together == 0; };
    return int64_t(up.element_size()) * together == int64_t(sizeof(C)) &&
           (together == 1 || in.x.rows() <= kMostRowsOfPairs) && up.stride(1) == in.rank() &&
           up.stride(0) != in.rank() && in_pairs(in.rank()) && in_pairs(up.stride(0)) &&
           period_of(in.rank() / together) <= kMostPeriod &&
           reinterpret_cast<uintptr_t>(const_data<char>(up)) % sizeof(C) == 0;
  }

  InOrder(const SpectralInputs& in, int64_t together)
      : up_(const_data<C>(in.up)),
        factor_(in.up.stride(0) / together),
        factors_(in.up.size(0)),
        rank_(in.rank() / together),
        period_(period_of(rank_)),
        outputs_(in.outputs()),
        rows_(in.x.rows()),
        add_(spectral_loops_of<C>().add_factors) {
    if constexpr (std::is_same_v<C, float>) {
      if (together == 2) add_ = spectral_loops().add_pair_factors;
    }
  }

  // [rows, outputs], of rows of z that are z_stride apart.
  const C* run(const C* z, int64_t z_stride) const {
    const C* scales = repeated(z, z_stride);
    C* to = workspace<C>(Use::kUp, rows_ * outputs_);
    const int64_t most = kSums / std::max<int64_t>(1, rank_ * rows_), threads = torch::stable::get_num_threads();
    const int64_t each = std::clamp<int64_t>(ceil_div(outputs_, threads), 1, std::max<int64_t>(1, most));
    parallel_for(0, ceil_div(outputs_, each), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) part(to, scales, t * each, std::min(each, outputs_ - t * each));
    });
    return to;
  }

 private:
  // Elements of a cache line: those of a vector, or of several.
  static constexpr int64_t kLine = 64 / sizeof(C);

  // A vector has elements of several rows of up: z of a factor again and again, until a row begins a line as well.
  static int64_t period_of(int64_t rank) { return std::lcm(rank, kLine); }

  // [factors, rows, period]
  const C* repeated(const C* z, int64_t z_stride) const {
    C* to = workspace<C>(Use::kScaled, factors_ * rows_ * period_);
    for (int64_t f = 0; f < factors_; f++) {
      for (int64_t m = 0; m < rows_; m++) {
        C* line = to + (f * rows_ + m) * period_;
        for (int64_t j = 0; j < period_; j += rank_) std::copy_n(z + m * z_stride + f * rank_, rank_, line + j);
      }
    }
    return to;
  }

  void part(C* to, const C* scales, int64_t first, int64_t count) const {
    const int64_t stride = round_up(count * rank_, kLine);
    C* sums = workspace<C>(Use::kFactors, rows_ * stride);
    std::fill_n(sums, rows_ * stride, C(0));
    add_(sums, stride, up_ + first * rank_, factor_, factors_, scales, period_, rows_, count * rank_);
    for (int64_t m = 0; m < rows_; m++) {
      for (int64_t i = 0; i < count; i++) {
        const C* of = sums + m * stride + i * rank_;
        to[m * outputs_ + first + i] = std::accumulate(of, of + rank_, C(0));
      }
    }
  }

  // With more rows tiles multiply gathered rows of up faster.
  static constexpr int64_t kMostRowsOfPairs = 4;
  // Longer pieces of rows are as well gathered.
  static constexpr int64_t kMostPeriod = 256;
  // At a time: they stay in the L1 cache.
  static constexpr int64_t kSums = 6144;

  const C* const up_;
  const int64_t factor_, factors_, rank_, period_, outputs_, rows_;
  decltype(SpectralLoopsOf<C>::add_factors) add_;
};

}  // namespace quaver::cpu
