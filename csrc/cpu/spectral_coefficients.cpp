// torch.ops.quaver.spectral_coefficients and its backward op on the CPU. Schemas: kernels/spectral_linear/schemas.py.
#include "cpu/spectral_products.h"

namespace quaver::cpu {
namespace {

using torch::stable::contiguous;

// Rows of theta or of coefficients, [.., columns].
int64_t rows_of(const Tensor& x) { return product(x, 0, x.dim() - 1); }

template <class C>
Matrix<C> matrix(const Tensor& x, bool transposed) {
  return {const_data<char>(x), x.size(x.dim() - 1), transposed};
}

Tensor spectral_coefficients(const Tensor& theta_, const Tensor& directions_) {
  STD_TORCH_CHECK(theta_.dim() >= 1 && directions_.dim() == 2 && theta_.size(theta_.dim() - 1) == directions_.size(1) &&
                      theta_.scalar_type() == directions_.scalar_type(),
                  "quaver: theta and directions do not fit");
  const Tensor theta = contiguous(theta_), directions = contiguous(directions_);
  const int64_t rows = rows_of(theta), angles = directions.size(0);
  Tensor out = torch::stable::new_empty(theta, with_last(theta, 0, 2 * angles, {}));
  with_compute(theta.scalar_type(), [&](auto zero) {
    using C = decltype(zero);
    C* to = output<C>(out);
    // The angles where the sines go.
    gemm<C>(rows, angles, theta.size(theta.dim() - 1), matrix<C>(theta, false), matrix<C>(directions, false),
            Result<C>{to + angles, 2 * angles});
    for_rows(rows, 32 * angles, [&](int64_t r) {
      C* line = to + r * 2 * angles;
      spectral_loops_of<C>().turn(line, line + angles, angles);
    });
  });
  return out;
}

// Of an angle a: -sin a times the gradient of its cosine, plus cos a times that of its sine.
std::tuple<Tensor, Tensor> spectral_coefficients_backward(const Tensor& grad_, const Tensor& coefficients_,
                                                          const Tensor& theta_, const Tensor& directions_,
                                                          bool need_theta, bool need_directions) {
  const Tensor grad = contiguous(grad_), coefficients = contiguous(coefficients_);
  const Tensor theta = contiguous(theta_), directions = contiguous(directions_);
  const int64_t rows = rows_of(theta), angles = directions.size(0), columns = directions.size(1);
  STD_TORCH_CHECK(grad.numel() == rows * 2 * angles && coefficients.numel() == rows * 2 * angles &&
                      grad.scalar_type() == theta.scalar_type(),
                  "quaver: grad does not fit");
  const auto like = [](const Tensor& x, bool needed) {
    return torch::stable::new_empty(x, needed ? sizes_of(x) : std::vector<int64_t>{0});
  };
  Tensor of_theta = like(theta, need_theta), of_directions = like(directions, need_directions);
  with_compute(theta.scalar_type(), [&](auto zero) {
    using C = decltype(zero);
    C* of_angles = workspace<C>(Use::kProducts, rows * angles);
    const C *g = const_data<C>(grad), *c = const_data<C>(coefficients);
    for_rows(rows, 4 * angles, [&](int64_t r) {
      const C *of = g + r * 2 * angles, *is = c + r * 2 * angles;
      for (int64_t i = 0; i < angles; i++) of_angles[r * angles + i] = is[i] * of[angles + i] - is[angles + i] * of[i];
    });
    const auto* left = reinterpret_cast<const char*>(of_angles);
    if (need_theta) {
      gemm<C>(rows, columns, angles, Matrix<C>{left, angles, false}, matrix<C>(directions, true),
              Result<C>{output<C>(of_theta), columns});
    }
    if (need_directions) {
      gemm<C>(angles, columns, rows, Matrix<C>{left, angles, true}, matrix<C>(theta, true),
              Result<C>{output<C>(of_directions), columns});
    }
  });
  return {of_theta, of_directions};
}

}  // namespace
}  // namespace quaver::cpu

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("spectral_coefficients", TORCH_BOX(&quaver::cpu::spectral_coefficients));
  m.impl("spectral_coefficients_backward", TORCH_BOX(&quaver::cpu::spectral_coefficients_backward));
}
