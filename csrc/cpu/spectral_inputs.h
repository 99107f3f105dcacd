// What spectral_linear and its backward op take.
#pragma once
#include "cpu/spectral_products.h"

namespace quaver::cpu {

// Bytes of x, packed, or of its products with `down` at a time.
constexpr int64_t kProjectedBytes = 16 << 20;

// The tensors of spectral_linear, in x's dtype. Not so `up`: a float32 one beside a 16-bit x is rounded once, times the
// gain (by Delta also times the coefficients), and the gradients of coefficients and gain take it as it is.
struct SpectralInputs {
  Samples x;
  Tensor weight, down, up, coefficients;
  OptionalTensor bias, gain;
  ScalarType dtype;

  SpectralInputs(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, const Tensor& down_,
                 const Tensor& up_, const Tensor& coefficients_, const OptionalTensor& gain_)
      : x(x_),
        weight(torch::stable::contiguous(in_dtype(weight_, x_.scalar_type()))),
        down(torch::stable::contiguous(in_dtype(down_, x_.scalar_type()))),
        up(rows_of_factors(up_)),
        coefficients(torch::stable::contiguous(coefficients_)),
        bias(bias_),
        gain(gain_),
        dtype(x_.scalar_type()) {
    STD_TORCH_CHECK(x_.dim() == 3 && weight.dim() == 2 && down.dim() == 3 && up.dim() == 3, "quaver: wrong dimensions");
    STD_TORCH_CHECK(weight.size(1) == x.columns && down.size(2) == x.columns && up.size(1) == weight.size(0) &&
                        down.size(0) == up.size(0) && down.size(1) == up.size(2),
                    "quaver: x, weight and factors do not fit");
    STD_TORCH_CHECK(up.scalar_type() == dtype || up.scalar_type() == compute_dtype(dtype),
                    "quaver: up has a wrong dtype");
    STD_TORCH_CHECK(coefficients.scalar_type() == compute_dtype(dtype), "quaver: coefficients have the wrong dtype");
  }

  int64_t outputs() const { return weight.size(0); }
  int64_t rank() const { return down.size(1); }
  int64_t ranks() const { return down.size(0) * down.size(1); }
  // Rows of x that share a row of the coefficients.
  int64_t rows_of_coefficients() const { return coefficients.dim() == 3 ? 1 : x.length; }
};

}  // namespace quaver::cpu
