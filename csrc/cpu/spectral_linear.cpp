// torch.ops.quaver.spectral_linear on the CPU. Schema: kernels/spectral_linear/schemas.py.
#include <numeric>

#include "cpu/scaled_product.h"
#include "cpu/spectral_few_rows.h"
#include "cpu/spectral_few_tiled.h"

namespace quaver::cpu {
namespace {

// Scales rows of x down^T by their coefficients, and keeps them as they were before.
template <class C>
struct Modulate final : Finish<C> {
  const C* coefficients;  // [.., factors]
  int64_t factors, rank, shared;
  int64_t first;  // row of the product's first
  Place kept;

  void operator()(C* tile, int64_t stride, int64_t i, int64_t j, int64_t rows, int64_t columns) const override {
    C* line = workspace<C>(Use::kLine, columns);
    int64_t expanded = -1;
    for (int64_t r = 0; r < rows; r++, tile += stride) {
      const int64_t row = first + i + r, of = row / shared;
      if (kept.data && kept.narrow) {
        kept.narrow->store(kept.data, row * kept.stride + j, tile, columns);
      } else if (kept.data) {
        std::copy_n(tile, columns, reinterpret_cast<C*>(kept.data) + row * kept.stride + j);
      }
      if (of != expanded) {
        expand(line, coefficients + of * factors, j, columns);
        expanded = of;
      }
      spectral_loops_of<C>().scale_columns(tile, 0, line, 1, columns);
    }
  }

 private:
  void expand(C* line, const C* from, int64_t j, int64_t columns) const {
    for (int64_t at = 0; at < columns;) {
      const int64_t f = (j + at) / rank, part = std::min((f + 1) * rank - (j + at), columns - at);
      std::fill_n(line + at, part, from[f]);
      at += part;
    }
  }
};

// Bytes of the products of rows with `down` at a time.
constexpr int64_t kProjectedBytes = 16 << 20;

// [x | c * x down^T] [W | gain up]^T + bias: x beside its projections, so that one sum makes the result.
template <class C>
void by_tokens(Tensor& out, Tensor* kept, const SpectralInputs& in) {
  const Arithmetic<C> how(in.dtype);
  const Samples x = in.x.merged();
  const int64_t inputs = x.columns, ranks = in.ranks(), outputs = in.outputs();
  const int64_t element = int64_t(out.element_size()), offset = round_up(inputs, how.together());
  // Rows a multiple of 4 KiB apart would share a few sets of the caches.
  const int64_t depth = offset + ranks, stride = round_up(depth, 2) + (depth * element % 4096 < 64 ? 32 : 0);
  const std::vector<C> gain = values_of<C>(in.gain, outputs), bias = values_of<C>(in.bias, outputs);
  const Matrix<C> weight = matrix_of(how, const_data<char>(in.weight), inputs, false, inputs);
  const Matrix<C> down = matrix_of(how, const_data<char>(in.down), inputs, false, inputs);
  const UpRows<C> up(in.up, pointer(gain), how.pairs);
  const Stacked<C, Matrix<C>, UpRows<C>> right{weight, up, offset / how.together()};
  Modulate<C> modulate;
  modulate.coefficients = const_data<C>(in.coefficients);
  modulate.factors = in.down.size(0);
  modulate.rank = in.rank();
  modulate.shared = in.rows_of_coefficients();
  modulate.kept = {kept ? output<char>(*kept) : nullptr, ranks, how.narrow};
  char* to = output<char>(out);
  const int64_t most = std::max<int64_t>(1024, round_up(kProjectedBytes / (stride * element), 1024));
  for (int64_t first = 0; first < x.length; first += most) {
    const int64_t rows = std::min(most, x.length - first);
    char* both = workspace<char>(Use::kSamples, rows * stride * element);
    const char* from = x.of(0) + first * x.row * element;
    parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, inputs)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        std::memcpy(both + r * stride * element, from + r * x.row * element, size_t(inputs * element));
        std::memset(both + (r * stride + inputs) * element, 0, size_t((offset - inputs) * element));
      }
    });
    modulate.first = first;
    multiply_into<C>(rows, ranks, inputs, matrix_of(how, from, x.row, false, inputs), down,
                     {both + offset * element, stride, how.narrow}, nullptr, &modulate);
    multiply_into<C>(rows, outputs, depth, matrix_of(how, both, stride, false, depth), right,
                     {to + first * outputs * element, outputs, how.narrow}, pointer(bias));
  }
}

// Depth of the panels of W + Delta at a time, of one sample or of several: with more of it the L2 cache would not hold
// them.
constexpr int64_t kPanelDepth = 2048, kPanelDepthOfSeveral = 512;

// Panels of W + gain * Delta_b in the L2 cache, used at once.
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
        element_(int64_t(out.element_size())),
        x_block_(depth_block(std::min(how_.elements(inputs_), kPanelDepth), how_.loops.depth)) {}

  void run() const {
    const auto& loops = how_.loops;
    const auto stripes = stripes_of(outputs_, loops.columns, ceil_div(in_.x.batch, together_));
    const UpRows<C> up(in_.up, pointer(gain_), nullptr);
    const ScaledProduct<C> delta(how_, matrix_of(how_, const_data<char>(in_.down), inputs_, true, in_.ranks()), inputs_,
                                 in_.rank(), in_.coefficients, stripes, [&](C* to, const Stripe& s) {
                                   up.fill(loops, to, loops.columns, s.first, s.count, 0, in_.ranks());
                                 });
    const int64_t group = samples_at_a_time();
    for (int64_t first = 0; first < in_.x.batch; first += group) {
      const int64_t samples = std::min(group, in_.x.batch - first);
      const std::vector<Left<C>> x = pack(first, samples);
      const int64_t count = int64_t(stripes.size());
      parallel_for(0, ceil_div(samples, together_) * count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
          const int64_t b = t / count * together_;
          multiply(delta, t % count, stripes[size_t(t % count)], first + b, std::min(together_, samples - b),
                   x.data() + b);
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

  // A stripe of the results of samples first .. first + samples - 1.
  void multiply(const ScaledProduct<C>& delta, int64_t s, const Stripe& stripe, int64_t first, int64_t samples,
                const Left<C>* x) const {
    const int64_t width = how_.loops.columns, length = in_.x.length, block = x_block_ * how_.together();
    // Parts of the depth begin with a block of x and with a tile of rows of the panel.
    const int64_t unit = std::lcm(block, int64_t(how_.loops.rows));
    const int64_t whole = unit * std::max<int64_t>(1, (together_ > 1 ? kPanelDepthOfSeveral : kPanelDepth) / unit);
    const int64_t most = std::clamp<int64_t>(inputs_, 1, whole);
    const int64_t size = std::max<int64_t>(1, round_up(most, block)) * width;
    C* panels = workspace<C>(Use::kPanel, samples * size);
    // A result of 16 bits leaves its tile when it is complete; where it is at once, all samples have the same one.
    const int64_t tile = most < inputs_ ? length * width : 0;
    C* tiles = workspace<C>(Use::kTile, how_.narrow ? (samples - 1) * tile + length * width : 0);
    const C* bias = bias_.empty() ? nullptr : bias_.data() + stripe.first;
    for (int64_t k = 0; k == 0 || k < inputs_; k += most) {
      const int64_t part = std::min(most, inputs_ - k);
      make(panels, size, delta, s, stripe, first, samples, k, part);
      for (int64_t b = 0; b < samples; b++) {
        if (kept_) keep(panels + b * size, stripe, first + b, k, part);
        const C* right = paired(panels + b * size, width, part);
        C* to = how_.narrow ? tiles + b * tile
                            : reinterpret_cast<C*>(out_) + (first + b) * length * outputs_ + stripe.first;
        for (int64_t at = 0, depth = how_.elements(part); at == 0 || at < depth; at += x_block_) {
          how_.loops.multiply(length, stripe.count, std::min(x_block_, depth - at),
                              x[b].at(0, k / how_.together() + at), right + at * width, 0, to,
                              how_.narrow ? width : outputs_, bias, k + at > 0);
        }
        if (!how_.narrow || k + part < inputs_) continue;
        how_.narrow->store_rows(out_, (first + b) * length * outputs_ + stripe.first, outputs_, to, width, length,
                                stripe.count);
      }
    }
  }

  // Rows k .. of the panels: columns k .. of rows of W + gain * Delta.
  void make(C* panels, int64_t size, const ScaledProduct<C>& delta, int64_t s, const Stripe& stripe, int64_t first,
            int64_t samples, int64_t k, int64_t part) const {
    const int64_t width = how_.loops.columns;
    const Matrix<C> weight{const_data<char>(in_.weight), inputs_, false, how_.narrow};
    weight.pack(how_.loops, {panels, width, std::max<int64_t>(1, part), 1}, 0, stripe.first, stripe.count, 0, k, part);
    for (int64_t b = 1; b < samples; b++) std::copy_n(panels, part * width, panels + b * size);
    delta.run(s, stripe, k, part, first, samples, {panels, width, size}, true);
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

  // The panel as the right operand of x.
  const C* paired(const C* panel, int64_t width, int64_t part) const {
    if constexpr (std::is_same_v<C, float>) {
      if (how_.pairs) {
        C* pairs = workspace<C>(Use::kPairs, ceil_div(part, 2) * width);
        spectral_loops().pair_panel(pairs, panel, nullptr, width, part);
        return pairs;
      }
    }
    return panel;
  }

  const SpectralInputs& in_;
  const Arithmetic<C> how_;
  const int64_t outputs_, inputs_;
  const int64_t together_;
  const std::vector<C> gain_, bias_;
  char* const out_;
  char* const kept_;
  const int64_t element_, x_block_;
};

std::tuple<Tensor, Tensor> spectral_linear(const Tensor& x, const Tensor& weight, OptionalTensor bias,
                                           const Tensor& down, const Tensor& up, const Tensor& coefficients,
                                           OptionalTensor gain, bool by_delta, bool keep) {
  const SpectralInputs in(x, weight, bias, down, up, coefficients, gain);
  STD_TORCH_CHECK(!by_delta || coefficients.dim() == 2, "quaver: Delta has coefficients by samples");
  const int64_t batch = in.x.batch, length = in.x.length;
  std::vector<int64_t> kept_sizes{0};
  if (keep) kept_sizes = {batch, by_delta ? in.outputs() : length, by_delta ? in.x.columns : in.ranks()};
  Tensor out = torch::stable::new_empty(x, {batch, length, in.outputs()});
  Tensor kept = torch::stable::new_empty(x, kept_sizes);
  if (out.numel() == 0 && kept.numel() == 0) return {out, kept};
  with_compute(in.dtype, [&](auto zero) {
    using C = decltype(zero);
    if (by_delta) {
      ByDelta<C>(out, keep ? &kept : nullptr, in).run();
    } else if (FewTiledRows::takes(in)) {
      FewTiledRows(in).run(out, keep ? &kept : nullptr);
    } else if (FewRows<C>::takes(in)) {
      FewRows<C>(in).run(out, keep ? &kept : nullptr);
    } else {
      by_tokens<C>(out, keep ? &kept : nullptr, in);
    }
  });
  return {out, kept};
}

}  // namespace
}  // namespace quaver::cpu

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) { m.impl("spectral_linear", TORCH_BOX(&quaver::cpu::spectral_linear)); }
