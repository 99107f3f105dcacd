// torch.ops.quaver.spectral_coefficients, spectral_linear, spectral_delta, delta_linear and their gradients on CUDA.
// Schemas: kernels/spectral_linear/schemas.py.
#include "cuda/spectral_delta.h"

namespace {

using namespace quaver;
using gpu::coefficients_of;
using gpu::FactorGradients;
using gpu::FactorOperands;
using gpu::Factors;
using gpu::Linear;
using gpu::matrix_of;
using gpu::Tokens;
using torch::stable::contiguous;
using torch::stable::new_empty;

// Samples of at most this many tokens read Delta beside the weight, in one tile of rows; for more, W + gain * Delta is
// written once: as much memory as reading both once more, and half the products.
constexpr int64_t kTokensBesideDelta = 64;

// [0] where nobody asks for the gradient.
Tensor gradient_of(const Tensor& x, bool needed) {
  return new_empty(x, needed ? sizes_of(x) : std::vector<int64_t>{0}, x.scalar_type());
}
Tensor gradient_of(const OptionalTensor& x, const Tensor& other, bool needed) {
  return x ? gradient_of(*x, needed) : new_empty(other, {0});
}

template <class T>
gpu::Target<T> asked(Tensor& to, bool needed) {
  return needed ? gpu::target_of<T>(to) : gpu::Target<T>(nullptr, false);
}

// ---- Delta ---------------------------------------------------------------------------------------------------------
Tensor spectral_delta(const Tensor& down, const Tensor& up, const Tensor& coefficients_, OptionalTensor gain_) {
  const gpu::DeviceGuard guard(down.get_device_index());
  const Factors factors(down, up);
  const Tensor coefficients = contiguous(coefficients_);
  gpu::check_same_device(coefficients, down);
  Tensor out = new_empty(down, {coefficients.size(0), factors.outputs, factors.inputs});
  dispatch_floating(down.scalar_type(), "spectral_delta", [&](auto element) {
    using T = decltype(element);
    OptionalTensor kept;
    const auto gain = gpu::gain_of<T>(gain_, kept);
    gpu::make_delta<T>(out, factors, {factors, down.scalar_type()}, coefficients, gain, {nullptr, false});
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spectral_delta_backward(const Tensor& grad, const Tensor& down,
                                                                   const Tensor& up, const Tensor& coefficients_,
                                                                   OptionalTensor gain_, bool need_down, bool need_up,
                                                                   bool need_coefficients, bool need_gain) {
  const gpu::DeviceGuard guard(down.get_device_index());
  const Factors factors(down, up);
  const Tensor coefficients = contiguous(coefficients_);
  Tensor of_down = gradient_of(down, need_down), of_up = gradient_of(up, need_up);
  Tensor of_coefficients = gradient_of(coefficients, need_coefficients), of_gain = gradient_of(gain_, down, need_gain);
  dispatch_floating(down.scalar_type(), "spectral_delta_backward", [&](auto element) {
    using T = decltype(element);
    OptionalTensor kept;
    const auto gain = gpu::gain_of<T>(gain_, kept);
    gpu::factor_gradients<T>({need_down ? &of_down : nullptr, need_up ? &of_up : nullptr,
                              need_coefficients ? &of_coefficients : nullptr, need_gain && gain_ ? &of_gain : nullptr},
                             gpu::in_dtype(grad, down.scalar_type()), factors, {factors, down.scalar_type()},
                             coefficients, gain);
  });
  return {of_down, of_up, of_coefficients, of_gain};
}

// ---- spectral_linear -----------------------------------------------------------------------------------------------
std::tuple<Tensor, Tensor> spectral_linear(const Tensor& x_, const Tensor& weight, OptionalTensor bias,
                                           const Tensor& down, const Tensor& up, const Tensor& coefficients_,
                                           OptionalTensor gain, bool by_delta, bool keep) {
  const gpu::DeviceGuard guard(x_.get_device_index());
  const ScalarType dtype = x_.scalar_type();
  const Factors factors(down, up);
  const Tensor coefficients = contiguous(coefficients_);
  const int64_t batch = x_.size(0), length = x_.size(1), outputs = weight.size(0), columns = factors.columns();
  gpu::check_same_device(coefficients, x_);
  gpu::check_same_device(down, x_);
  STD_TORCH_CHECK(factors.inputs == x_.size(2) && factors.outputs == outputs, "quaver: x does not fit the factors");
  Tensor out = new_empty(x_, {batch, length, outputs}), kept = new_empty(x_, {0});
  if (keep && by_delta) kept = new_empty(x_, {batch, outputs, factors.inputs});
  if (keep && !by_delta) kept = new_empty(x_, {batch, length, columns});
  dispatch_floating(dtype, "spectral_linear", [&](auto element) {
    using T = decltype(element);
    const Linear<T> linear(x_, weight, bias, gain);
    const FactorOperands<T> of(factors, dtype);
    if (by_delta) {
      Tensor effective = keep ? kept : new_empty(x_, {batch, outputs, factors.inputs});
      gpu::make_delta<T>(effective, factors, of, coefficients, linear.gain, gpu::values_of<T>(linear.weight_));
      return gpu::multiply_members<false>(gpu::output<T>(out), linear.bias(), linear.x.template samples<T>(),
                                          linear.effective(effective), batch, x_);
    }
    const Tokens x = gpu::as_matrix(linear.x);
    Tensor scaled = new_empty(x_, {x.rows(), columns});
    gpu::project<T>({asked<T>(kept, keep),
                     gpu::target_of<T>(scaled),
                     coefficients_of<T>(coefficients, factors, length),
                     {nullptr, 1}},
                    x.all<T>(), of.down, x_);
    gpu::combine<false>({gpu::target_of<T>(out), linear.bias(), linear.gain, {nullptr, 1}},
                        matrix_of<T>(scaled, x.rows(), columns), of.up, x.all<T>(), linear.weight, 1, x_);
  });
  return {out, kept};
}

// What backward of spectral_linear makes; null: not asked for.
struct LinearGradients {
  Tensor* x;
  FactorGradients factors;
};

template <class T>
void gradients_by_tokens(const LinearGradients& out, const Tokens& grad_, const Linear<T>& linear,
                         const Factors& factors, const FactorOperands<T>& of, const Tensor& coefficients_,
                         const OptionalTensor& projected) {
  using C = compute_t<T>;
  const Tokens x = gpu::as_matrix(linear.x), grad = gpu::as_matrix(grad_);
  const Tensor& like = x.tensor;
  const int64_t rows = x.rows(), columns = factors.columns();
  const bool for_up = out.factors.up || out.factors.gain, for_coefficients = out.factors.coefficients;
  const bool of_projected = out.x || out.factors.down;
  const auto coefficients = coefficients_of<T>(coefficients_, factors, x.length);
  Tensor scaled = new_empty(like, {for_up ? rows : 0, columns});
  Tensor gradient = new_empty(like, {of_projected ? rows : 0, columns});
  if (for_up || for_coefficients || of_projected) {
    Tensor plain =
        projected ? contiguous(*projected) : new_empty(like, {for_up || for_coefficients ? rows : 0, columns});
    if (!projected && (for_up || for_coefficients)) {
      gpu::project<T>({gpu::target_of<T>(plain), {nullptr, false}, coefficients, {nullptr, 1}}, x.all<T>(), of.down,
                      like);
    }
    gpu::projected_gradient<T>({for_up || for_coefficients ? gpu::input<T>(plain) : nullptr, asked<T>(scaled, for_up),
                                asked<T>(gradient, of_projected), nullptr, coefficients},
                               grad.all<T>(), gpu::by_depth(of.up), linear.gain, out.factors.coefficients, like);
  }
  if (out.x) {
    const auto none = gpu::Gain<C>{nullptr, 0};
    gpu::combine<true>({gpu::target_of<T>(*out.x), nullptr, none, {nullptr, 1}}, matrix_of<T>(gradient, rows, columns),
                       gpu::in_one_group(gpu::by_depth(of.down)), grad.all<T>(), gpu::by_depth(linear.weight), 1, like);
  }
  if (for_up) {
    gpu::Outer<T> result = {{nullptr, false}, factors.lines(), linear.gain, gpu::values_of<T>(factors.up),
                            factors.lines(),  nullptr};
    if (out.factors.up) result.out = gpu::target_of<T>(*out.factors.up);
    gpu::outer(result, gpu::by_depth(grad.all<T>()), gpu::by_depth(matrix_of<T>(scaled, rows, columns)), 1, like,
               out.factors.gain);
  }
  if (out.factors.down) {
    gpu::plain_outer<T>(*out.factors.down, Tokens(gpu::reshaped(gradient, {1, rows, columns})), x);
  }
}

template <class T>
void gradients_by_delta(const LinearGradients& out, const Tokens& grad, const Linear<T>& linear, const Factors& factors,
                        const FactorOperands<T>& of, const Tensor& coefficients, const OptionalTensor& effective_) {
  const Tokens& x = linear.x;
  const Tensor& like = x.tensor;
  const std::vector<int64_t> sizes = {x.batch, factors.outputs, factors.inputs};
  if (out.x) {
    Tensor effective = effective_ ? contiguous(*effective_) : new_empty(like, sizes);
    if (!effective_) {
      gpu::make_delta<T>(effective, factors, of, coefficients, linear.gain, gpu::values_of<T>(linear.weight_));
    }
    gpu::multiply_members<true>(gpu::output<T>(*out.x), static_cast<const T*>(nullptr), grad.samples<T>(),
                                gpu::by_depth(linear.effective(effective)), x.batch, like);
  }
  const FactorGradients& factor = out.factors;
  if (!factor.down && !factor.up && !factor.coefficients && !factor.gain) return;
  Tensor of_delta = new_empty(like, sizes);
  const gpu::Lines lines = {factors.outputs * factors.inputs, factors.inputs, 1u << 31, 0};
  gpu::outer<T>({gpu::target_of<T>(of_delta), lines, {nullptr, 0}, {nullptr, false}, lines, nullptr},
                gpu::by_depth(grad.samples<T>()), gpu::by_depth(x.samples<T>()), x.batch, like);
  gpu::factor_gradients<T>(factor, of_delta, factors, of, coefficients, linear.gain);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> spectral_linear_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& weight, OptionalTensor bias, const Tensor& down,
    const Tensor& up, const Tensor& coefficients_, OptionalTensor gain, OptionalTensor effective,
    OptionalTensor projected, bool by_delta, bool need_x, bool need_weight, bool need_bias, bool need_down,
    bool need_up, bool need_coefficients, bool need_gain) {
  const gpu::DeviceGuard guard(x_.get_device_index());
  const ScalarType dtype = x_.scalar_type();
  const Factors factors(down, up);
  const Tensor coefficients = contiguous(coefficients_);
  Tensor of_x = gradient_of(x_, need_x), of_weight = gradient_of(weight, need_weight);
  Tensor of_bias = gradient_of(bias, x_, need_bias), of_down = gradient_of(down, need_down);
  Tensor of_up = gradient_of(up, need_up), of_coefficients = gradient_of(coefficients, need_coefficients);
  Tensor of_gain = gradient_of(gain, x_, need_gain);
  const Tokens grad(grad_.scalar_type() == dtype ? grad_ : gpu::in_dtype(grad_, dtype));
  dispatch_floating(dtype, "spectral_linear_backward", [&](auto element) {
    using T = decltype(element);
    const Linear<T> linear(x_, weight, bias, gain);
    const FactorOperands<T> of(factors, dtype);
    const auto where = [](bool needed, Tensor& to) { return needed ? &to : nullptr; };
    const LinearGradients out = {where(need_x, of_x),
                                 {where(need_down, of_down), where(need_up, of_up),
                                  where(need_coefficients, of_coefficients), where(need_gain && gain, of_gain)}};
    if (by_delta) {
      gradients_by_delta<T>(out, grad, linear, factors, of, coefficients, effective);
    } else {
      gradients_by_tokens<T>(out, grad, linear, factors, of, coefficients, projected);
    }
    if (need_weight) gpu::plain_outer<T>(of_weight, grad, linear.x);
    if (need_bias && bias) gpu::bias_gradient<T>(of_bias, grad);
  });
  return {of_x, of_weight, of_bias, of_down, of_up, of_coefficients, of_gain};
}

// ---- delta_linear --------------------------------------------------------------------------------------------------
Tensor delta_linear(const Tensor& x_, const Tensor& weight, OptionalTensor bias, const Tensor& delta_,
                    OptionalTensor gain) {
  const gpu::DeviceGuard guard(x_.get_device_index());
  Tensor out = new_empty(x_, {x_.size(0), x_.size(1), weight.size(0)});
  gpu::check_same_device(delta_, x_);
  dispatch_floating(x_.scalar_type(), "delta_linear", [&](auto element) {
    using T = decltype(element);
    const Linear<T> linear(x_, weight, bias, gain);
    const Tokens& x = linear.x;
    if (x.length > kTokensBesideDelta) {
      const Tensor effective = gpu::add_delta<T>(linear, Tokens(delta_), weight);
      return gpu::multiply_members<false>(gpu::output<T>(out), linear.bias(), x.samples<T>(),
                                          linear.effective(effective), x.batch, x_);
    }
    const bool wide = delta_.scalar_type() != x_.scalar_type();
    const Tokens delta(wide ? gpu::in_dtype(delta_, x_.scalar_type()) : delta_);
    gpu::combine<false>({gpu::target_of<T>(out), linear.bias(), linear.gain, {nullptr, 1}}, x.samples<T>(),
                        gpu::in_one_group(delta.samples<T>()), x.samples<T>(), linear.weight, x.batch, x_);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> delta_linear_backward(const Tensor& grad_, const Tensor& x_,
                                                                         const Tensor& weight, OptionalTensor bias,
                                                                         const Tensor& delta_, OptionalTensor gain,
                                                                         bool need_x, bool need_weight, bool need_bias,
                                                                         bool need_delta, bool need_gain) {
  const gpu::DeviceGuard guard(x_.get_device_index());
  Tensor of_x = gradient_of(x_, need_x), of_weight = gradient_of(weight, need_weight);
  Tensor of_bias = gradient_of(bias, x_, need_bias), of_delta = gradient_of(delta_, need_delta);
  Tensor of_gain = gradient_of(gain, x_, need_gain);
  const Tokens grad(grad_.scalar_type() == x_.scalar_type() ? grad_ : gpu::in_dtype(grad_, x_.scalar_type()));
  dispatch_floating(x_.scalar_type(), "delta_linear_backward", [&](auto element) {
    using T = decltype(element);
    const Linear<T> linear(x_, weight, bias, gain);
    const Tokens& x = linear.x;
    const Tokens delta(delta_);
    if (need_x) {
      const Tensor effective = gpu::add_delta<T>(linear, delta, weight);
      gpu::multiply_members<true>(gpu::output<T>(of_x), static_cast<const T*>(nullptr), grad.samples<T>(),
                                  gpu::by_depth(linear.effective(effective)), x.batch, x_);
    }
    const bool for_gain = need_gain && gain;
    if (need_delta || for_gain) {
      const gpu::Lines lines = {linear.outputs() * x.columns, x.columns, 1u << 31, 0};
      gpu::Outer<T> result = {{nullptr, false},
                              lines,
                              linear.gain,
                              gpu::values_of<T>(delta.tensor),
                              {delta.sample_stride, delta.stride, 1u << 31, 0},
                              nullptr};
      if (need_delta) result.out = gpu::target_of<T>(of_delta);
      gpu::outer(result, gpu::by_depth(grad.samples<T>()), gpu::by_depth(x.samples<T>()), x.batch, x_,
                 for_gain ? &of_gain : nullptr);
    }
    if (need_weight) gpu::plain_outer<T>(of_weight, grad, x);
    if (need_bias && bias) gpu::bias_gradient<T>(of_bias, grad);
  });
  return {of_x, of_weight, of_bias, of_delta, of_gain};
}

// ---- spectral_coefficients -----------------------------------------------------------------------------------------
template <class F>
void dispatch_wide(ScalarType dtype, F&& f) {
  dtype == ScalarType::Double ? f(double{}) : f(float{});
}

Tensor spectral_coefficients(const Tensor& theta_, const Tensor& directions_) {
  const gpu::DeviceGuard guard(theta_.get_device_index());
  const Tensor theta = contiguous(theta_), directions = contiguous(directions_);
  gpu::check_same_device(directions, theta);
  const int64_t n = directions.size(0), depth = directions.size(1), rows = product(theta, 0, theta.dim() - 1);
  Tensor out = new_empty(theta, with_last(theta, 0, 2 * n, {}));
  dispatch_wide(theta.scalar_type(), [&](auto element) {
    using C = decltype(element);
    using S = gpu::SmallTile;
    using Product = gpu::Gemm<C, S, false, false>;
    const auto x = matrix_of<C>(theta, rows, depth);
    const int64_t splits = gpu::splits_of<S>(rows, n, 1, Product::steps(x));
    Tensor angles = new_empty(theta, {splits, rows, n});
    gpu::launch(
        gpu::project_kernel<C, S>, gpu::tile_grid<S>(rows, n, 1, splits), dim3(gpu::kGemmThreads),
        sizeof(typename Product::Buffers), gpu::current_stream(theta),
        gpu::Projected<C>{{nullptr, false}, {nullptr, false}, {nullptr, 0, 1, 1}, {gpu::output<C>(angles), splits}}, x,
        matrix_of<C>(directions, n, depth));
    const gpu::Parts<C> parts = {const_cast<C*>(gpu::input<C>(angles)), splits};
    gpu::launch(gpu::waves_kernel<C>, gpu::element_grid(rows * n), dim3(gpu::kSpectralThreads), 0,
                gpu::current_stream(theta), gpu::output<C>(out), parts, rows, n);
  });
  return out;
}

std::tuple<Tensor, Tensor> spectral_coefficients_backward(const Tensor& grad_, const Tensor& coefficients_,
                                                          const Tensor& theta_, const Tensor& directions_,
                                                          bool need_theta, bool need_directions) {
  const gpu::DeviceGuard guard(theta_.get_device_index());
  const Tensor grad = contiguous(grad_), coefficients = contiguous(coefficients_);
  const Tensor theta = contiguous(theta_), directions = contiguous(directions_);
  const int64_t n = directions.size(0), depth = directions.size(1), rows = product(theta, 0, theta.dim() - 1);
  Tensor of_theta = gradient_of(theta, need_theta), of_directions = gradient_of(directions, need_directions);
  Tensor of_angles = new_empty(theta, {rows, n});
  dispatch_wide(theta.scalar_type(), [&](auto element) {
    using C = decltype(element);
    gpu::launch(gpu::angle_gradient_kernel<C>, gpu::element_grid(rows * n), dim3(gpu::kSpectralThreads), 0,
                gpu::current_stream(theta), gpu::output<C>(of_angles), gpu::input<C>(grad), gpu::input<C>(coefficients),
                rows, n);
    const auto angles = matrix_of<C>(of_angles, rows, n);
    if (need_theta) {
      gpu::multiply_members<true>(gpu::output<C>(of_theta), static_cast<const C*>(nullptr), angles,
                                  gpu::by_depth(matrix_of<C>(directions, n, depth)), 1, theta);
    }
    if (need_directions) {
      // Ours, not the library's: angles are never rounded to TF32, whatever torch is told to do with matrix products.
      const gpu::Lines lines = {0, depth, 1u << 31, 0};
      gpu::outer<C>({gpu::target_of<C>(of_directions), lines, {nullptr, 0}, {nullptr, false}, lines, nullptr},
                    gpu::by_depth(angles), gpu::by_depth(matrix_of<C>(theta, rows, depth)), 1, theta);
    }
  });
  return {of_theta, of_directions};
}

}  // namespace

QUAVER_GPU_LIBRARY(m) {
  m.impl("spectral_coefficients", TORCH_BOX(&spectral_coefficients));
  m.impl("spectral_coefficients_backward", TORCH_BOX(&spectral_coefficients_backward));
  m.impl("spectral_linear", TORCH_BOX(&spectral_linear));
  m.impl("spectral_linear_backward", TORCH_BOX(&spectral_linear_backward));
  m.impl("spectral_delta", TORCH_BOX(&spectral_delta));
  m.impl("spectral_delta_backward", TORCH_BOX(&spectral_delta_backward));
  m.impl("delta_linear", TORCH_BOX(&delta_linear));
  m.impl("delta_linear_backward", TORCH_BOX(&delta_linear_backward));
}
