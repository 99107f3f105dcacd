// spectral_linear of few rows, as a decoder has them: dot products with the weights where they are, nothing packed.
#pragma once
#include "cpu/dot_products.h"
#include "cpu/spectral_in_order.h"

namespace quaver::cpu {

// Rows up to which dot products are taken instead of packing; fewer where tiles multiply bf16. Those of
// perturbed_linear.
constexpr int64_t kMostRows = 16, kMostRowsAmx = 4;

template <class C>
class FewRows {
 public:
  static bool takes(const SpectralInputs& in) {
    const bool tiles = pair_loops_of(in.dtype) && has_amx();
    return in.x.rows() <= (tiles ? kMostRowsAmx : kMostRows);
  }

  explicit FewRows(const SpectralInputs& in)
      : in_(in),
        how_(in.dtype),
        x_(in.x.merged()),
        rows_(x_.length),
        inputs_(x_.columns),
        ranks_(in.ranks()),
        outputs_(in.outputs()),
        stride_(dot_stride(inputs_ + ranks_)) {}

  // kept: z, or null.
  void run(Tensor& out, Tensor* kept) const {
    // x beside c z, in C: z is never rounded for what is multiplied on.
    C* both = workspace<C>(Use::kPackedA, rows_ * stride_);
    widen_rows(both, stride_, x_.matrix(how_, 0, false), rows_, inputs_);
    project(both, kept);
    const std::vector<C> gain = values_of<C>(in_.gain, outputs_), bias = values_of<C>(in_.bias, outputs_);
    const Result<C> result{output<char>(out), outputs_, pointer(bias), false, how_.narrow};
    // z up^T, where up is read in the order of memory; else it is multiplied in the same pass as W.
    const C* of_up = InOrder<C>::takes(in_, 1) ? InOrder<C>(in_, 1).run(both + inputs_, stride_) : nullptr;
    for_dot_tiles<C>(
        rows_, outputs_, of_up ? inputs_ : inputs_ + ranks_, [&](int64_t n, int64_t height, C* sums, C* totals) {
          add_rows(sums, in_.weight, n, height, both);
          if (!of_up) {
            const Rows up = rows_of_up(n, height, pointer(gain));
            dot_loops_of<C>().add(sums, up.data, up.stride, height, both + inputs_, stride_, rows_, ranks_);
          }
          dot_loops_of<C>().total(totals, sums, height * rows_);
          for (int64_t i = 0; of_up && i < height; i++) {
            const C scale = gain.empty() ? C(1) : gain[size_t(n + i)];
            for (int64_t m = 0; m < rows_; m++) totals[i * rows_ + m] += scale * of_up[m * outputs_ + n + i];
          }
          store_dots(result, totals, n, height, rows_);
        });
  }

 private:
  // z = x down^T: as it is to `kept`, times the coefficients beside x.
  void project(C* both, Tensor* kept) const {
    const Result<C> keep{kept ? output<char>(*kept) : nullptr, ranks_, nullptr, false, how_.narrow};
    const C* coefficients = const_data<C>(in_.coefficients);
    const int64_t factors = in_.down.size(0), rank = in_.rank(), shared = in_.rows_of_coefficients();
    for_dot_tiles<C>(rows_, ranks_, inputs_, [&](int64_t r, int64_t height, C* sums, C* totals) {
      add_rows(sums, in_.down, r, height, both);
      dot_loops_of<C>().total(totals, sums, height * rows_);
      if (kept) store_dots(keep, totals, r, height, rows_);
      for (int64_t m = 0; m < rows_; m++) {
        const C* of_row = coefficients + m / shared * factors;
        C* to = both + m * stride_ + inputs_ + r;
        for (int64_t i = 0; i < height; i++) to[i] = totals[i * rows_ + m] * of_row[(r + i) / rank];
      }
    });
  }

  // Adds the products of x with rows n .. n + height - 1 of a contiguous matrix [.., K].
  void add_rows(C* sums, const Tensor& matrix, int64_t n, int64_t height, const C* x) const {
    const auto& loops = dot_loops_of<C>();
    if (!how_.narrow) {
      const C* from = const_data<C>(matrix) + n * inputs_;
      return loops.add(sums, from, inputs_, height, x, stride_, rows_, inputs_);
    }
    constexpr int64_t kStep = 512;  // columns: eight rows of them and the inputs beside take half of the L1 cache
    C* wide = workspace<C>(Use::kRows, kDotTileRows * kStep);
    for (int64_t k = 0; k < inputs_; k += kStep) {
      const int64_t length = std::min(kStep, inputs_ - k);
      for (int64_t i = 0; i < height; i++) {
        how_.narrow->widen(wide + i * length, const_data<char>(matrix), (n + i) * inputs_ + k, length);
      }
      loops.add(sums, wide, length, height, x + k, stride_, rows_, length);
    }
  }

  struct Rows {
    const C* data;
    int64_t stride;
  };

  // Rows n .. n + height - 1 of gain * up, R elements each: where they lie, or gathered.
  Rows rows_of_up(int64_t n, int64_t height, const C* gain) const {
    const Tensor& up = in_.up;
    if (up.stride(0) == in_.rank() && up.scalar_type() == compute_dtype(in_.dtype) && !gain) {
      return {const_data<C>(up) + n * up.stride(1), up.stride(1)};
    }
    C* made = workspace<C>(Use::kFactors, kDotTileRows * ranks_);
    gather_rows(made, ranks_, up, n, height, gain);
    return {made, ranks_};
  }

  const SpectralInputs& in_;
  const Arithmetic<C> how_;
  const Samples x_;
  const int64_t rows_, inputs_, ranks_, outputs_, stride_;
};

}  // namespace quaver::cpu
