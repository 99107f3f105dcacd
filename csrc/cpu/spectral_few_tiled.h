// spectral_linear of few rows of bf16 by the tiles of AMX. The weights are the left operands, row by row where they
// lie, and x stands on the right: only the few rows are packed.
#pragma once
#include "cpu/spectral_in_order.h"

namespace quaver::cpu {

class FewTiledRows {
 public:
  static constexpr int64_t kMostRows = 64;

  static bool takes(const SpectralInputs& in) {
    const auto pairs_in = [](const Tensor& x) { return reinterpret_cast<uintptr_t>(const_data<char>(x)) % 4 == 0; };
    return pair_loops_of(in.dtype) && has_amx() && in.x.rows() <= kMostRows && in.up.scalar_type() == in.dtype &&
           in.x.columns % 2 == 0 && in.ranks() % 2 == 0 && pairs_in(in.weight) && pairs_in(in.down);
  }

  explicit FewTiledRows(const SpectralInputs& in)
      : in_(in),
        how_(in.dtype),
        x_(in.x.merged()),
        rows_(x_.length),
        panels_(ceil_div(rows_, kWidth)),
        inputs_(x_.columns),
        ranks_(in.ranks()),
        outputs_(in.outputs()),
        factors_(in.down.size(0)),
        gain_(values_of<float>(in.gain, outputs_)),
        bias_(values_of<float>(in.bias, outputs_)) {}

  // kept: z, or null.
  void run(Tensor& out, Tensor* kept) const {
    const int64_t of_inputs = inputs_ / 2;
    float* x = workspace<float>(Use::kPackedB, panels_ * of_inputs * kWidth);
    x_.matrix(how_, 0, false)
        .pack(how_.loops, Panels<float>{x, kWidth, std::max<int64_t>(1, of_inputs), panels_}, 0, 0, rows_, 0, 0,
              of_inputs);
    const std::vector<float> coefficients = by_factors();
    float* z = workspace<float>(Use::kSamples, panels_ * ranks_ / 2 * kWidth);
    for_tiles(ranks_, [&](int64_t first, int64_t count) { project(z, kept, x, coefficients, first, count); });
    char* to = output<char>(out);
    const float* of_up = InOrder<float>::takes(in_, 2) ? in_order(z) : nullptr;
    for_tiles(outputs_, [&](int64_t first, int64_t count) { multiply(to, x, z, of_up, first, count); });
  }

 private:
  // Columns of a panel, and rows of weights at a time: their products stay in the L1 cache.
  static constexpr int64_t kWidth = 32, kTall = 64;

  template <class Body>
  void for_tiles(int64_t count, Body&& body) const {
    parallel_for(0, ceil_div(count, kTall), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) body(t * kTall, std::min(kTall, count - t * kTall));
    });
  }

  // The coefficients of each factor, for all columns of a panel: [panels, factors, kWidth].
  std::vector<float> by_factors() const {
    const float* from = const_data<float>(in_.coefficients);
    std::vector<float> to(size_t(panels_ * factors_ * kWidth));
    for (int64_t m = 0; m < rows_; m++) {
      const float* row = from + m / in_.rows_of_coefficients() * factors_;
      float* column = to.data() + m / kWidth * factors_ * kWidth + m % kWidth;
      for (int64_t f = 0; f < factors_; f++) column[f * kWidth] = row[f];
    }
    return to;
  }

  // tile [count, kWidth] = (accumulate: +) rows of `left`, `depth` elements each, times panel `p` of `right`.
  void product(float* tile, const void* left, int64_t depth, int64_t stride, int64_t count, const float* right,
               int64_t p, bool accumulate) const {
    const LeftBlock<float> rows{static_cast<const float*>(left), how_.loops.rows * stride / 2, stride / 2, true};
    how_.loops.multiply(count, kWidth, depth / 2, rows, right + p * depth / 2 * kWidth, 0, tile, kWidth, nullptr,
                        accumulate);
  }

  // Columns `first` on of the results, [rows, count] of a result with `columns` of them, from those of a panel.
  void write(char* to, int64_t columns, const float* tile, int64_t p, int64_t first, int64_t count,
             const float* bias) const {
    float* turned = workspace<float>(Use::kRows, kWidth * kTall);
    spectral_loops().f32.transpose(turned, kTall, tile, kWidth, count, kWidth);
    for (int64_t m = p * kWidth; m < std::min(rows_, (p + 1) * kWidth); m++) {
      float* line = turned + m % kWidth * kTall;
      for (int64_t i = 0; bias && i < count; i++) line[i] += bias[first + i];
      how_.narrow->store(to, m * columns + first, line, count);
    }
  }

  // z, as it is to `kept` and times the coefficients as a right operand.
  void project(float* z, Tensor* kept, const float* x, const std::vector<float>& coefficients, int64_t first,
               int64_t count) const {
    const int64_t rank = in_.rank();
    float* tile = workspace<float>(Use::kTile, kTall * kWidth);
    for (int64_t p = 0; p < panels_; p++) {
      product(tile, row_of(in_.down, first), inputs_, inputs_, count, x, p, false);
      if (kept) write(output<char>(*kept), ranks_, tile, p, first, count, nullptr);
      for (int64_t done = 0; done < count;) {
        const int64_t f = (first + done) / rank, part = std::min((f + 1) * rank - first, count) - done;
        spectral_loops().f32.scale_columns(tile + done * kWidth, kWidth,
                                           coefficients.data() + (p * factors_ + f) * kWidth, part, kWidth);
        done += part;
      }
      spectral_loops().pair_panel(z + (p * ranks_ + first) / 2 * kWidth, tile, nullptr, kWidth, count);
    }
  }

  // z up^T [rows, outputs] of a few rows, all in one panel of z.
  const float* in_order(const float* z) const {
    const int64_t pairs = ranks_ / 2;
    float* by_row = workspace<float>(Use::kSums, rows_ * pairs);
    spectral_loops().f32.transpose(by_row, pairs, z, kWidth, pairs, rows_);
    return InOrder<float>(in_, 2).run(by_row, pairs);
  }

  // of_up: z up^T where that has been made already, or null.
  void multiply(char* out, const float* x, const float* z, const float* of_up, int64_t first, int64_t count) const {
    float* tile = workspace<float>(Use::kTile, kTall * kWidth);
    const auto [up, stride] = of_up ? std::pair<const void*, int64_t>() : rows_of_up(first, count);
    for (int64_t p = 0; p < panels_; p++) {
      if (of_up) {
        std::fill_n(tile, count * kWidth, 0.0f);
        for (int64_t m = 0; m < rows_; m++) {
          for (int64_t i = 0; i < count; i++) tile[i * kWidth + m] = of_up[m * outputs_ + first + i];
        }
      } else {
        product(tile, up, ranks_, stride, count, z, p, false);
      }
      if (!gain_.empty()) spectral_loops().f32.scale_panel(tile, tile, gain_.data() + first, kWidth, count);
      product(tile, row_of(in_.weight, first), inputs_, inputs_, count, x, p, true);
      write(out, outputs_, tile, p, first, count, pointer(bias_));
    }
  }

  const char* row_of(const Tensor& matrix, int64_t row) const { return const_data<char>(matrix) + row * inputs_ * 2; }

  // Rows of up with their factors side by side and the distance between them: where they lie, or gathered.
  std::pair<const void*, int64_t> rows_of_up(int64_t first, int64_t count) const {
    const Tensor& up = in_.up;
    const char* from = const_data<char>(up) + first * up.stride(1) * 2;
    const bool adjacent = up.stride(0) == in_.rank();
    if (adjacent && up.stride(1) % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0) return {from, up.stride(1)};
    char* made = workspace<char>(Use::kNarrow, kTall * ranks_ * 2);
    // A few rows at a time: what is written to all of them by turns stays in the L1 cache.
    constexpr int64_t kFew = 16;
    for (int64_t i = 0; i < count; i += kFew) {
      spectral_loops().gather(made + i * ranks_ * 2, ranks_ * 2, from + i * up.stride(1) * 2, up.stride(0) * 2,
                              up.stride(1) * 2, (adjacent ? ranks_ : in_.rank()) * 2, adjacent ? 1 : factors_,
                              std::min(kFew, count - i));
    }
    return {made, ranks_};
  }

  const SpectralInputs& in_;
  const Arithmetic<float> how_;
  const Samples x_;
  const int64_t rows_, panels_, inputs_, ranks_, outputs_, factors_;
  const std::vector<float> gain_, bias_;
};

}  // namespace quaver::cpu
