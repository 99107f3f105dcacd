// spectral_linear by way of W + Delta, on the CPU: panels of it are made in the cache and multiplied with x at once.
#pragma once
#include <numeric>

#include "cpu/scaled_product.h"
#include "cpu/spectral_inputs.h"

namespace quaver::cpu {

// Depth of the panels of W + Delta at a time, of one sample or of several: with more of it the L2 cache would not hold
// them.
constexpr int64_t kPanelDepth = 2048, kPanelDepthOfSeveral = 512;

// Panels of W + gain * Delta_b in the cache, used at once.
template <class C>
class ByDelta {
 public:
  ByDelta(Tensor& out, Tensor* kept, const SpectralInputs& in)
      : in_(in),
        how_(in.dtype),
        outputs_(in.outputs()),
        inputs_(in.x.columns),
        together_(samples_together(in.coefficients, in.rank(), how_.pairs != nullptr)),
        gain_(values_of<C>(in.gain, outputs_)),
        bias_(values_of<C>(in.bias, outputs_)),
        out_(output<char>(out)),
        kept_(kept ? output<char>(*kept) : nullptr),
        x_block_(depth_block(std::min(how_.elements(inputs_), kPanelDepth), how_.loops.depth)) {}

  void run() const {
    const auto& loops = how_.loops;
    const auto stripes = stripes_of(outputs_, loops.columns, ceil_div(in_.x.batch, together_));
    const UpRows<C> up(in_.up, pointer(gain_), nullptr);
    const ScaledProduct<C> delta(how_, matrix_of(how_, const_data<char>(in_.down), inputs_, true, in_.ranks()), inputs_,
                                 in_.rank(), in_.coefficients, stripes, [&](C* to, const Stripe& s) {
                                   up.fill(loops, to, loops.columns, s.first, s.count, 0, in_.ranks());
                                 });
    const int64_t of_stripe = std::min(together_, in_.x.batch) * panel_size() * int64_t(sizeof(C));
    const auto spans = spans_of(stripes, stripes_of_span(of_stripe));
    const int64_t count = int64_t(spans.size()), group = samples_at_a_time();
    for (int64_t first = 0; first < in_.x.batch; first += group) {
      const int64_t samples = std::min(group, in_.x.batch - first);
      const std::vector<Left<C>> x = pack(first, samples);
      parallel_for(0, ceil_div(samples, together_) * count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
          const int64_t b = t / count * together_;
          multiply(delta, spans[size_t(t % count)], first + b, std::min(together_, samples - b), x.data() + b);
        }
      });
    }
  }

 private:
  int64_t packed_size() const {
    return left_size(how_.loops, in_.x.matrix(how_, 0, false), in_.x.length, how_.elements(inputs_), x_block_);
  }
  int64_t samples_at_a_time() const {
    const int64_t bytes = packed_size() * int64_t(sizeof(C));
    return bytes == 0 ? std::max<int64_t>(1, in_.x.batch)
                      : std::max<int64_t>(1, kProjectedBytes / bytes / together_) * together_;
  }

  // Samples as left operands.
  std::vector<Left<C>> pack(int64_t first, int64_t samples) const {
    C* buffer = workspace<C>(Use::kSamples, samples * packed_size());
    std::vector<Left<C>> x;
    for (int64_t b = 0; b < samples; b++) {
      x.push_back(left_of(how_.loops, in_.x.matrix(how_, first + b, false), in_.x.length, how_.elements(inputs_),
                          x_block_, buffer + b * packed_size()));
    }
    return x;
  }

  // Depth of the panels at a time: parts begin with a block of x and with a tile of rows of the panel.
  int64_t panel_depth() const {
    const int64_t unit = std::lcm(x_block_ * how_.together(), int64_t(how_.loops.rows));
    const int64_t most = together_ > 1 ? kPanelDepthOfSeveral : kPanelDepth;
    return std::clamp<int64_t>(inputs_, 1, unit * std::max<int64_t>(1, most / unit));
  }
  int64_t panel_size() const {
    return std::max<int64_t>(1, round_up(panel_depth(), x_block_ * how_.together())) * how_.loops.columns;
  }

  // A span of the results of samples first .. first + samples - 1.
  void multiply(const ScaledProduct<C>& delta, const StripeSpan& span, int64_t first, int64_t samples,
                const Left<C>* x) const {
    const int64_t most = panel_depth(), size = span.count * panel_size();
    C* panels = workspace<C>(Use::kPanel, samples * size);
    // A result of 16 bits leaves its tile when it is complete: those of parts of the depth are kept.
    const bool whole = most >= inputs_;
    const int64_t wide = round_up(span.columns, 16), tall = whole ? kTileRows : in_.x.length;
    C* tiles = workspace<C>(Use::kTile, how_.narrow ? (whole ? 1 : samples) * tall * wide : 0);
    for (int64_t k = 0; k == 0 || k < inputs_; k += most) {
      const int64_t part = std::min(most, inputs_ - k);
      make(panels, delta, span, first, samples, k, part);
      for (int64_t b = 0; b < samples; b++) {
        for (int64_t s = 0; kept_ && s < span.count; s++) {
          keep(panels + b * size + s * panel_size(), span.stripes[s], first + b, k, part);
        }
        C* tile = tiles + (whole ? 0 : b * tall * wide);
        multiply(span, first + b, x[b], paired(panels + b * size, span.count, part), k, part, tile, wide, whole);
      }
    }
  }

  // Those of sample b, part of the depth: some rows of x at a time, which stay in the cache for all of the span.
  void multiply(const StripeSpan& span, int64_t b, const Left<C>& x, const C* right, int64_t k, int64_t part, C* tile,
                int64_t wide, bool whole) const {
    const int64_t width = how_.loops.columns, length = in_.x.length, depth = how_.elements(part);
    const int64_t panel = how_.pairs ? depth * width : panel_size();
    const C* bias = bias_.empty() ? nullptr : bias_.data() + span.begin;
    for (int64_t i = 0; i < length; i += kTileRows) {
      const int64_t rows = std::min(kTileRows, length - i), out = (b * length + i) * outputs_ + span.begin;
      C* to = !how_.narrow ? reinterpret_cast<C*>(out_) + out : whole ? tile : tile + i * wide;
      for (int64_t at = 0; at == 0 || at < depth; at += x_block_) {
        how_.loops.multiply(rows, span.columns, std::min(x_block_, depth - at), x.at(i, k / how_.together() + at),
                            right + at * width, panel, to, how_.narrow ? wide : outputs_, bias, k + at > 0);
      }
      if (how_.narrow && k + part >= inputs_) {
        how_.narrow->store_rows(out_, out, outputs_, to, wide, rows, span.columns);
      }
    }
  }

  // Rows k .. of the panels, [samples, stripes]: columns k .. of rows of W + gain * Delta.
  void make(C* panels, const ScaledProduct<C>& delta, const StripeSpan& span, int64_t first, int64_t samples, int64_t k,
            int64_t part) const {
    const int64_t width = how_.loops.columns, size = span.count * panel_size();
    const Matrix<C> weight{const_data<char>(in_.weight), inputs_, false, how_.narrow};
    for (int64_t s = 0; s < span.count; s++) {
      C* panel = panels + s * panel_size();
      const Stripe& stripe = span.stripes[s];
      weight.pack(how_.loops, {panel, width, std::max<int64_t>(1, part), 1}, 0, stripe.first, stripe.count, 0, k, part);
      for (int64_t b = 1; b < samples; b++) std::copy_n(panel, part * width, panel + b * size);
    }
    delta.run(span, panel_size(), k, part, first, samples, {panels, width, size}, true);
  }

  // kept[b, n, k] from the panel.
  void keep(const C* panel, const Stripe& stripe, int64_t b, int64_t k, int64_t part) const {
    const int64_t at = (b * outputs_ + stripe.first) * inputs_ + k, width = how_.loops.columns;
    const auto& loops = spectral_loops_of<C>();
    if (!how_.narrow) {
      return loops.transpose(reinterpret_cast<C*>(kept_) + at, inputs_, panel, width, part, stripe.count);
    }
    C* rows = workspace<C>(Use::kRows, part * stripe.count);
    loops.transpose(rows, part, panel, width, part, stripe.count);
    how_.narrow->store_rows(kept_, at, inputs_, rows, part, stripe.count, part);
  }

  // The panels of a sample as the right operand of x.
  const C* paired(const C* panels, int64_t count, int64_t part) const {
    if constexpr (std::is_same_v<C, float>) {
      if (how_.pairs) {
        const int64_t width = how_.loops.columns, size = ceil_div(part, 2) * width;
        C* pairs = workspace<C>(Use::kPairs, count * size);
        for (int64_t s = 0; s < count; s++) {
          spectral_loops().pair_panel(pairs + s * size, panels + s * panel_size(), nullptr, width, part);
        }
        return pairs;
      }
    }
    return panels;
  }

  const SpectralInputs& in_;
  const Arithmetic<C> how_;
  const int64_t outputs_, inputs_;
  const int64_t together_;
  const std::vector<C> gain_, bias_;
  char* const out_;
  char* const kept_;
  const int64_t x_block_;
};

}  // namespace quaver::cpu
