// A diag(c_b) B for many c: what a sample's Delta is. B's panels are packed once; for each sample a block of them is
// scaled in the L1 cache and multiplied at once, so that a scaled factor is never in memory.
#pragma once
#include "cpu/spectral_products.h"

namespace quaver::cpu {

// Columns first .. first + count - 1 of a result: one panel, or the left part of one.
struct Stripe {
  int64_t first, count;
  bool ends;  // it is the last of a thread's part, or of all
};

// Of panels of `width`; cut into as many equal parts as there are threads where there are few.
inline std::vector<Stripe> stripes_of(int64_t columns, int64_t width, int64_t samples) {
  const int64_t threads = torch::stable::get_num_threads();
  const bool few = samples * ceil_div(columns, width) < 8 * threads;
  // A vector of any level and type divides it.
  constexpr int64_t kStep = 16;
  const int64_t part = few ? round_up(ceil_div(columns, threads), kStep) : columns;
  std::vector<Stripe> stripes;
  for (int64_t begin = 0; begin < columns; begin += part) {
    const int64_t end = std::min(columns, begin + part);
    for (int64_t j = begin; j < end; j += width) stripes.push_back({j, std::min(width, end - j), j + width >= end});
  }
  return stripes;
}

// Multiply-adds for an element of all samples' M, and of a factor, as so many of the large products: they run at 3 / 4
// of their rate. As kernels/spectral_linear/orders.py counts them.
inline int64_t shared_cost(int64_t samples, int64_t rank) {
  return (rank * ceil_div(samples, kSamplesTogether) + samples) * 4 / 3;
}

// The same of pairs. By AMX what is made for all samples takes as long whatever the rank is (a product of two tiles,
// and their stores), and products sample by sample, which wait for what they read, reach some 110 multiply-adds a
// cycle.
inline int64_t shared_cost_of_pairs(int64_t samples, int64_t rank) {
  const int64_t groups = ceil_div(samples, kSamplesTogether);
  return has_amx() ? 14 * groups + 7 * samples / 2 : (rank * groups + 2 * samples) * 4 / 3;
}

// Stripes side by side that one thread takes together, from `number` on: columns `begin` .. begin + columns - 1.
struct StripeSpan {
  const Stripe* stripes;
  int64_t number, count, begin, columns;
};

// How many stripes that is, where a stripe of all samples takes so many bytes of workspace: for so many the left
// operand, and x, are read once (8 x 512, 448 x 448, R 1536: 22.7 ms of one at a time, 20.0 of 4; bf16 by AMX 13.7
// and 10.7).
inline int64_t stripes_of_span(int64_t bytes) {
  constexpr int64_t kMost = 4, kBytes = 2800 << 10;
  return std::clamp<int64_t>(kBytes / std::max<int64_t>(1, bytes), 1, kMost);
}

// `most` stripes each, or what is left of a thread's part.
inline std::vector<StripeSpan> spans_of(const std::vector<Stripe>& stripes, int64_t most) {
  std::vector<StripeSpan> spans;
  for (size_t s = 0; s < stripes.size(); s++) {
    if (s == 0 || stripes[s - 1].ends || spans.back().count == most) {
      spans.push_back({&stripes[s], int64_t(s), 0, stripes[s].first, 0});
    }
    spans.back().count++;
    spans.back().columns += stripes[s].count;
  }
  return spans;
}

// Samples at a time where a factor's product is made for all of them (factor_loops.h). 1: where that would take longer
// than scaled factors, sample by sample, and where pairs would hold elements of two factors.
inline int64_t samples_together(const Tensor& coefficients, int64_t rank, bool pairs) {
  const int64_t samples = coefficients.size(0);
  if (coefficients.size(1) == 0 || (pairs && rank % 2)) return 1;
  const int64_t cost = pairs ? shared_cost_of_pairs(samples, rank) : shared_cost(samples, rank);
  return cost < samples * rank ? kSamplesTogether : 1;
}

// The depth that is scaled at a time: 48 columns of it take 36 of the L1 cache's 48 KiB, and sums in blocks of it have
// a smaller error than longer ones (448 x 448 of rank 1536: 27.5 ms of 8 samples with 512 tokens, with 384 27.0).
constexpr int64_t kScaledDepth = 192;

template <class C>
class ScaledProduct {
 public:
  // left [rows, factors * rank]; fill(to, stripe) packs a stripe of B [factors * rank, columns]: element (k, i) at
  // to[k * width + i], in single elements of C. Both are in this thread's workspaces `Use::kLeft` and `Use::kFactors`
  // from then on. coefficients [samples, factors], contiguous.
  template <class Fill>
  ScaledProduct(const Arithmetic<C>& how, const Matrix<C>& left, int64_t rows, int64_t rank, const Tensor& coefficients,
                const std::vector<Stripe>& stripes, Fill&& fill)
      : how_(how),
        rank_(rank),
        factors_(coefficients.size(1)),
        depth_(how.elements(factors_ * rank)),
        together_(samples_together(coefficients, rank, how.pairs != nullptr)),
        block_(together_ > 1 ? depth_ : depth_block(depth_, kScaledDepth)),
        coefficients_(const_data<C>(coefficients)) {
    const auto& loops = how.loops;
    if (together_ == 1) scales_ = expanded<C>(coefficients, rank);
    if (together_ > 1 && how.pairs) {
      left_ = rows_of_pairs(left, rows);
    } else {
      left_ = left_of(loops, left, rows, depth_, block_,
                      workspace<C>(Use::kLeft, left_size(loops, left, rows, depth_, block_)));
    }
    C* panels = workspace<C>(Use::kFactors, int64_t(stripes.size()) * size());
    parallel_for(0, int64_t(stripes.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; s++) {
        C* panel = panels + s * size();
        if (together_ > 1 && how.pairs) {
          C* singles = workspace<C>(Use::kScaled, size());
          fill(singles, stripes[size_t(s)]);
          scale(panel, singles, nullptr, loops.columns, factors_ * rank_);
        } else {
          fill(panel, stripes[size_t(s)]);
        }
      }
    });
    panels_ = panels;
  }

  // to [samples, rows, columns of a stripe] = (accumulate: +) left diag(scales) B of samples first .., of rows i on, a
  // multiple of a tile's; those of the span's next stripe are `apart` elements further.
  void run(const StripeSpan& span, int64_t apart, int64_t i, int64_t rows, int64_t first, int64_t samples,
           const SampleTiles<C>& to, bool accumulate) const {
    if (together_ > 1) return sum(span, apart, i, rows, first, samples, to, accumulate);
    for (int64_t s = 0; s < span.count; s++) {
      for (int64_t b = 0; b < samples; b++) {
        scale(span.number + s, span.stripes[s], i, rows, scales_.data() + (first + b) * factors_ * rank_,
              to.data + b * to.sample + s * apart, to.stride, accumulate);
      }
    }
  }

 private:
  int64_t size() const { return how_.loops.columns * factors_ * rank_; }

  const FactorSumLoops<C>& sum_loops() const {
    if constexpr (std::is_same_v<C, float>) {
      if (how_.pairs) return has_amx() ? factor_loops().amx : factor_loops().bf16;
    }
    return factor_loops_of<C>().sums;
  }

  // A of pairs by rows, which a factor's pairs are a part of: where it is, or in `Use::kLeft`, where rows are no
  // multiple of 4 KiB apart.
  Left<C> rows_of_pairs(const Matrix<C>& left, int64_t rows) const {
    const auto direct = [](const C* data, int64_t stride) { return Left<C>{{nullptr, 1, 1, 0}, data, stride, true}; };
    const int64_t in_place = left.row_stride();
    if (!left.transposed && in_place * int64_t(sizeof(C)) % 4096 != 0) return direct(left.at(0, 0), in_place);
    const int64_t stride = depth_ * int64_t(sizeof(C)) % 4096 < 64 ? depth_ + 16 : depth_;
    C* to = workspace<C>(Use::kLeft, rows * stride);
    if (!left.transposed) {
      for_rows(rows, depth_, [&](int64_t i) { std::copy_n(left.at(i, 0), depth_, to + i * stride); });
      return direct(to, stride);
    }
    const auto* singles = reinterpret_cast<const uint16_t*>(left.data);
    parallel_for(0, ceil_div(depth_, kPairsTogether), 1, [&](int64_t begin, int64_t end) {
      C* pairs = workspace<C>(Use::kRows, kPairsTogether * rows);
      for (int64_t k = begin * kPairsTogether; k < std::min(depth_, end * kPairsTogether); k += kPairsTogether) {
        const int64_t count = std::min(kPairsTogether, depth_ - k);
        for (int64_t d = 0; d < count; d++) {
          const uint16_t* even = singles + 2 * (k + d) * left.stride;
          how_.pairs->zip(pairs + d * rows, even, even + left.stride, rows);
        }
        spectral_loops_of<C>().transpose(to + k, stride, pairs, rows, count, rows);
      }
    });
    return direct(to, stride);
  }

  // Rows of the left operand come from the cache for all stripes but the first.
  void sum(const StripeSpan& span, int64_t apart, int64_t i, int64_t rows, int64_t first, int64_t samples,
           const SampleTiles<C>& to, bool accumulate) const {
    const FactorSumLoops<C>& loops = sum_loops();
    C* sums = workspace<C>(Use::kScaled, samples * loops.rows * how_.loops.columns);
    for (int64_t at = 0; at < rows; at += loops.rows) {
      const int64_t now = std::min<int64_t>(loops.rows, rows - at);
      for (int64_t s = 0; s < span.count; s++) {
        const FactorSizes<C> sizes{
            span.stripes[s].count, factors_, rank_, samples, coefficients_ + first * factors_, factors_};
        loops.sum({to.data + at * to.stride + s * apart, to.stride, to.sample}, sums, left_.at(i + at, 0),
                  panels_ + (span.number + s) * size(), now, sizes, accumulate);
      }
    }
  }

  void scale(int64_t s, const Stripe& stripe, int64_t i, int64_t rows, const C* scales, C* to, int64_t stride,
             bool accumulate) const {
    const int64_t width = how_.loops.columns;
    C* scaled = workspace<C>(Use::kScaled, width * block_);
    for (int64_t at = 0; at == 0 || at < depth_; at += block_) {
      const int64_t part = std::min(block_, depth_ - at), single = at * how_.together();
      scale(scaled, panels_ + s * size() + single * width, scales + single, width,
            std::min(part * how_.together(), factors_ * rank_ - single));
      how_.loops.multiply(rows, stripe.count, part, left_.at(i, at), scaled, 0, to, stride, nullptr,
                          accumulate || at > 0);
    }
  }

  void scale(C* to, const C* from, const C* scales, int64_t width, int64_t singles) const {
    if constexpr (std::is_same_v<C, float>) {
      if (how_.pairs) return spectral_loops().pair_panel(to, from, scales, width, singles);
    }
    spectral_loops_of<C>().scale_panel(to, from, scales, width, singles);
  }

  const Arithmetic<C>& how_;
  const int64_t rank_, factors_, depth_, together_, block_;
  const C* const coefficients_;
  std::vector<C> scales_;
  Left<C> left_;
  const C* panels_;
};

}  // namespace quaver::cpu
