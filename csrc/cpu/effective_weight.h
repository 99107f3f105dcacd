// W + gain * Delta_b, or Delta_b alone, written to memory: for spectral_delta, and for a backward pass without what
// forward could have kept.
#pragma once
#include "cpu/scaled_product.h"

namespace quaver::cpu {

// up's factors side by side, [N, R], in C; gain: of each row, or null.
template <class C>
void concatenate(C* to, const Tensor& up, const C* gain) {
  constexpr int64_t kTogether = 8;
  const int64_t rows = up.size(1), ranks = up.size(0) * up.size(2);
  for_rows(ceil_div(rows, kTogether), kTogether * ranks, [&](int64_t n) {
    const int64_t first = n * kTogether;
    gather_rows(to + first * ranks, ranks, up, first, std::min(kTogether, rows - first), gain);
  });
}

// A [rows, columns] of C as a matrix of the arithmetic's own type: itself, or rounded to bf16 in `buffer`.
template <class C>
Matrix<C> multiplied_as(const Arithmetic<C>& how, const C* wide, int64_t rows, int64_t columns, int64_t stride,
                        bool transposed, uint16_t* buffer) {
  const int64_t depth = transposed ? rows : columns;
  if (!how.pairs) return {reinterpret_cast<const char*>(wide), stride, transposed};
  for_rows(rows, columns, [&](int64_t r) { how.narrow->store(buffer, r * stride, wide + r * stride, columns); });
  return {reinterpret_cast<const char*>(buffer), stride, transposed, how.narrow, how.pairs, depth};
}

// The factors, in the dtype that is multiplied.
template <class C>
class EffectiveWeight {
 public:
  // down [2n, r, K] contiguous, up as of rows_of_factors(), coefficients [B, 2n]; weight [N, K] or none, of one dtype.
  EffectiveWeight(const Tensor& down, const Tensor& up, const Tensor& coefficients, const C* gain, const Tensor* weight)
      : how_(down.scalar_type()),
        rows_(up.size(1)),
        columns_(down.size(2)),
        ranks_(down.size(0) * down.size(1)),
        rank_(down.size(1)),
        down_(down),
        up_(up),
        coefficients_(torch::stable::contiguous(coefficients)),
        gain_(gain),
        weight_(weight) {}

  // to: [samples, N, K] of the factors' dtype, contiguous, of samples first .. first + samples - 1.
  void run(char* to, int64_t first, int64_t samples) const {
    const auto& loops = how_.loops;
    const int64_t together = samples_together(coefficients_, rank_, how_.pairs != nullptr);
    const int64_t groups = ceil_div(samples, together);
    const auto stripes = stripes_of(columns_, loops.columns, groups);
    C* wide = workspace<C>(Use::kSums, rows_ * ranks_);
    concatenate(wide, up_, gain_);
    auto* narrow = workspace<uint16_t>(Use::kSamples, how_.pairs ? rows_ * ranks_ : 0);
    const ScaledProduct<C> product(how_, multiplied_as(how_, wide, rows_, ranks_, ranks_, false, narrow), rows_, rank_,
                                   coefficients_, stripes, [&](C* panel, const Stripe& s) {
                                     const Matrix<C> down{const_data<char>(down_), columns_, true, how_.narrow};
                                     down.pack(loops, {panel, loops.columns, std::max<int64_t>(1, ranks_), 1}, 0,
                                               s.first, s.count, 0, 0, ranks_);
                                   });
    const int64_t wide_elements = how_.narrow ? std::min(together, samples) * rows_ * loops.columns : 0;
    const auto spans = spans_of(stripes, stripes_of_span(wide_elements * int64_t(sizeof(C))));
    const int64_t count = int64_t(spans.size());
    parallel_for(0, groups * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const int64_t b = t / count * together;
        make(product, spans[size_t(t % count)], to, b, first + b, std::min(together, samples - b));
      }
    });
  }

 private:
  // Of samples b .. b + samples - 1, which go to out[sample ..].
  void make(const ScaledProduct<C>& product, const StripeSpan& span, char* out, int64_t sample, int64_t b,
            int64_t samples) const {
    const int64_t wide = round_up(span.columns, 16), size = rows_ * columns_, at = sample * size + span.begin;
    SampleTiles<C> to{reinterpret_cast<C*>(out) + at, columns_, size};
    if (how_.narrow) to = {workspace<C>(Use::kTile, samples * rows_ * wide), wide, rows_ * wide};
    for (int64_t i = 0; weight_ && i < samples; i++) {
      const auto& loops = loops_of(weight_->scalar_type());
      for (int64_t n = 0; n < rows_; n++) {
        loops.widen(to.data + i * to.sample + n * to.stride, const_data<char>(*weight_), n * columns_ + span.begin,
                    span.columns);
      }
    }
    product.run(span, how_.loops.columns, 0, rows_, b, samples, to, weight_ != nullptr);
    for (int64_t i = 0; how_.narrow && i < samples; i++) {
      how_.narrow->store_rows(out, at + i * size, columns_, to.data + i * to.sample, to.stride, rows_, span.columns);
    }
  }

  const Arithmetic<C> how_;
  const int64_t rows_, columns_, ranks_, rank_;
  const Tensor& down_;
  const Tensor& up_;
  const Tensor coefficients_;
  const C* gain_;
  const Tensor* weight_;
};

}  // namespace quaver::cpu
