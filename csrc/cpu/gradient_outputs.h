// Results of the backward ops of spectral_linear and delta_linear: those that are asked for, and how the plain ones are
// made.
#pragma once
#include "cpu/row_sums.h"
#include "cpu/spectral_products.h"

namespace quaver::cpu {

// The results as tensors, of shape [0] where they are not wanted.
template <size_t kCount>
struct GradientOutputs {
  std::vector<Tensor> tensors;

  void add(const Tensor& like, bool needed) {
    tensors.push_back(torch::stable::new_empty(like, needed ? sizes_of(like) : std::vector<int64_t>{0}));
    needed_.push_back(needed);
  }
  // Where there is nothing to be like, an empty one of `other`'s dtype.
  void add(const OptionalTensor& like, const Tensor& other, bool needed) {
    add(like ? *like : other, needed && like.has_value());
  }
  Tensor* wanted(size_t i) { return needed_[i] ? &tensors[i] : nullptr; }

 private:
  std::vector<bool> needed_;
};

// Writes the values of C in their dtype.
template <class C>
void store_all(Tensor& out, const C* values) {
  const auto& loops = loops_of(out.scalar_type());
  char* to = output<char>(out);
  parallel_for(0, out.numel(), kGrain,
               [&](int64_t begin, int64_t end) { loops.store(to, begin, values + begin, end - begin); });
}

// The gradient of a gain, [N] or of all rows together.
inline void write_gain(Tensor& out, const std::vector<double>& of_rows) {
  double total = 0;
  for (const double value : of_rows) total += value;
  const std::vector<double> one{total};
  const std::vector<double>& values = out.dim() == 1 ? of_rows : one;
  with_compute(out.scalar_type(), [&](auto zero) {
    const std::vector<decltype(zero)> rounded(values.begin(), values.end());
    store_all(out, rounded.data());
  });
}

// Where a product in C goes to in a tensor's dtype.
inline Place place_of(Tensor& out, int64_t stride) {
  return {output<char>(out), stride, narrow_loops(out.scalar_type())};
}

// The sum of all rows of grad.
template <class C>
void bias_gradient(Tensor& out, const Samples& grad) {
  const std::vector<double> sums =
      sum_rows<C>(grad.of(0), grad.tensor.scalar_type(), grad.length, grad.columns, grad.row);
  const std::vector<C> values(sums.begin(), sums.end());
  store_all(out, values.data());
}

// grad^T x over all rows.
template <class C>
void weight_gradient(Tensor& out, const Samples& grad, const Samples& x) {
  const Arithmetic<C> how(x.tensor.scalar_type());
  multiply_into<C>(grad.columns, x.columns, x.length, grad.matrix(how, 0, true), x.matrix(how, 0, true),
                   place_of(out, x.columns));
}

}  // namespace quaver::cpu
