// Delta on the host: made from the factors, added to the weight, and from its gradient to those of the factors.
#pragma once
#include "cuda/spectral.h"

namespace quaver::gpu {

// [B, 2n], or [B, T, 2n] by tokens.
template <class T>
Coefficients<compute_t<T>> coefficients_of(const Tensor& contiguous_, const Factors& factors, int64_t length) {
  const int64_t rows = contiguous_.dim() == 3 ? 1 : std::max<int64_t>(1, length);
  return {input<compute_t<T>>(contiguous_), factors.factors, rows, factors.divisor()};
}

template <class T>
Operand<T> matrix_of(const Tensor& x, int64_t rows, int64_t columns, int64_t member_stride = 0) {
  return {input<T>(x), columns, member_stride, rows, columns};
}

// What the linear ops know of their arguments.
template <class T>
struct Linear {
  using C = compute_t<T>;
  Tokens x;
  Tensor weight_;
  OptionalTensor bias_, gain_;
  Operand<T> weight;
  Gain<C> gain;

  Linear(const Tensor& x_, const Tensor& weight_in, const OptionalTensor& bias, const OptionalTensor& gain_in)
      : x(x_),
        weight_(in_dtype(weight_in, x_.scalar_type())),
        weight(matrix_of<T>(weight_, weight_in.size(0), weight_in.size(1))),
        gain(gain_of<T>(gain_in, gain_)) {
    if (bias) bias_ = in_dtype(*bias, x_.scalar_type());
    STD_TORCH_CHECK(weight_in.size(1) == x.columns, "quaver: x does not fit the weight");
    check_same_device(weight_, x_);
  }

  const T* bias() const { return bias_ ? input<T>(*bias_) : nullptr; }
  int64_t outputs() const { return weight.rows; }
  // Of [B, N, K].
  Operand<T> effective(const Tensor& of) const { return matrix_of<T>(of, outputs(), x.columns, outputs() * x.columns); }
};

// out [B, N, K] = gain * up diag(c_b) down, added to the weight if there is one.
template <class T>
void make_delta(Tensor& out, const Factors& factors, const FactorOperands<T>& of, const Tensor& coefficients,
                const Gain<compute_t<T>>& gain, const Values<T>& weight) {
  using C = compute_t<T>;
  const int64_t samples = coefficients.size(0), size = samples * factors.columns();
  Tensor spread = new_empty(coefficients, {size});
  launch(spread_kernel<C>, element_grid(size), dim3(kSpectralThreads), 0, current_stream(out), output<C>(spread),
         input<C>(coefficients), size, factors.divisor());
  with_tile<T>(factors.outputs, factors.inputs, samples, [&](auto shape) {
    using S = decltype(shape);
    launch(delta_kernel<T, S>, tile_grid<S>(factors.outputs, factors.inputs, samples), dim3(kGemmThreads),
           sizeof(typename Gemm<T, S, false, true>::Buffers), current_stream(out), target_of<T>(out), weight, gain,
           of.up, by_depth(of.down), input<C>(spread));
  });
}

// Where the gradients of the factors, the coefficients and the gain go; null: not asked for.
struct FactorGradients {
  Tensor *down, *up, *coefficients, *gain;
};

// From the gradient of W + Delta, [B, N, K] of T.
template <class T>
void factor_gradients(const FactorGradients& out, const Tensor& grad_, const Factors& factors,
                      const FactorOperands<T>& of, const Tensor& coefficients_, const Gain<compute_t<T>>& gain) {
  using C = compute_t<T>;
  using S = SmallTile;
  const int64_t samples = grad_.size(0), outputs = factors.outputs, columns = factors.columns();
  const auto coefficients = coefficients_of<T>(coefficients_, factors, 1);
  const auto grad = matrix_of<T>(grad_, outputs, factors.inputs, outputs * factors.inputs);
  const auto stream = current_stream(grad_);
  if (out.up || out.coefficients || out.gain) {
    const dim3 grid = tile_grid<S>(outputs, columns, 1);
    const int64_t of_rows = int64_t(grid.x) * 2, of_columns = int64_t(grid.y) * 2;
    Tensor for_gain = new_empty(grad_, {out.gain ? of_columns * outputs : 0}, ScalarType::Double);
    Tensor for_coefficients = new_empty(coefficients_, {out.coefficients ? samples * of_rows * columns : 0});
    UpGradient<T> result = {{nullptr, false}, values_of<T>(factors.up), factors.lines(), nullptr, nullptr, gain,
                            coefficients};
    if (out.up) result.out = target_of<T>(*out.up);
    if (out.gain) result.of_gain = output<double>(for_gain);
    if (out.coefficients) result.of_coefficients = output<C>(for_coefficients);
    launch(up_gradient_kernel<T, S>, grid, dim3(kGemmThreads), sizeof(typename Gemm<T, S, false, false>::Buffers),
           stream, result, grad, of.down, samples);
    if (out.gain) sum_terms<T>(*out.gain, for_gain, of_columns, outputs);
    if (out.coefficients) {
      sum_parts(*out.coefficients, input<C>(for_coefficients),
                {samples, factors.factors, of_rows * columns, factors.rank, of_rows, columns, factors.rank, 1, 0});
    }
  }
  if (out.down) {
    launch(down_gradient_kernel<T, S>, tile_grid<S>(columns, factors.inputs, 1), dim3(kGemmThreads),
           sizeof(typename Gemm<T, S, true, true>::Buffers), stream, target_of<T>(*out.down), by_depth(of.up),
           by_depth(grad), gain, coefficients, samples);
  }
}

// W + gain * delta, [B, N, K].
template <class T>
Tensor add_delta(const Linear<T>& linear, const Tokens& delta, const Tensor& weight_) {
  const Tensor weight = contiguous(weight_);
  const int64_t batch = linear.x.batch, outputs = linear.outputs(), inputs = linear.x.columns;
  constexpr int64_t G = kGroup<T>;
  Tensor out = new_empty(linear.x.tensor, {batch, outputs, inputs});
  const StridedRows<T> rows = {values_of<T>(delta.tensor), delta.sample_stride, delta.stride};
  const auto aligned = [](const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; };
  const bool packed = inputs % G == 0 && rows.stride % G == 0 && rows.member_stride % G == 0 && aligned(delta.tensor) &&
                      aligned(weight) && aligned(out);
  const int64_t size = batch * outputs * ceil_div(inputs, G);
  launch(add_delta_kernel<T>, element_grid(size), dim3(kSpectralThreads), 0, current_stream(out), output<T>(out),
         values_of<T>(weight), rows, linear.gain, batch, outputs, inputs, packed);
  return out;
}

}  // namespace quaver::gpu
