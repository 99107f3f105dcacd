// torch.ops.quaver.spectral_linear_backward on the CPU. Schema: kernels/spectral_linear/schemas.py.
#include "cpu/gradients_by_factor.h"
#include "cpu/spectral_inputs.h"

namespace quaver::cpu {
namespace {

// What is wanted; null where it is not.
struct Gradients {
  Tensor *x = nullptr, *weight = nullptr, *bias = nullptr;
  FactorGradients factors;
};

// By tokens: dz = g (gain up), z = x down^T.
template <class C>
class BackwardByTokens {
 public:
  BackwardByTokens(const SpectralInputs& in, const Samples& grad, const OptionalTensor& projected, const Gradients& out)
      : in_(in),
        how_(in.dtype),
        x_(in.x.merged()),
        grad_(grad.merged()),
        out_(out),
        rows_(x_.length),
        inputs_(in.x.columns),
        outputs_(in.outputs()),
        ranks_(in.ranks()),
        element_(int64_t(x_.tensor.element_size())),
        gain_(values_of<C>(in.gain, outputs_)),
        projected_(projected) {}

  void run() const {
    const FactorGradients& factors = out_.factors;
    if (out_.weight) weight_gradient<C>(*out_.weight, grad_, x_);
    if (out_.bias) bias_gradient<C>(*out_.bias, grad_);
    if (!out_.x && !factors.any()) return;
    C* plain = workspace<C>(Use::kUp, (in_.gain ? 2 : 1) * outputs_ * ranks_);
    concatenate(plain, in_.up, static_cast<const C*>(nullptr));
    // g beside dz, so that one sum makes the gradient of x.
    const int64_t offset = round_up(outputs_, how_.together()), depth = offset + ranks_, stride = padded(depth);
    char* both = workspace<char>(Use::kSamples, rows_ * stride * element_);
    char* of_projected = both + offset * element_;
    project_gradient(plain, of_projected, stride);
    if (factors.of_products()) {
      const int64_t z_stride = padded(ranks_);
      char* z = workspace<char>(Use::kProducts, rows_ * z_stride * element_);
      project(z, z_stride);
      coefficients_and_scaling(of_projected, stride, z, z_stride);
      if (factors.up || factors.gain) products(plain, z, z_stride);
    } else {
      scale(of_projected, stride);
    }
    if (factors.down) {
      multiply_into<C>(ranks_, inputs_, rows_, matrix_of(how_, of_projected, stride, true, rows_),
                       x_.matrix(how_, 0, true), place_of(*factors.down, inputs_));
    }
    if (out_.x) input_gradient(both, offset, depth, stride);
  }

 private:
  int64_t padded(int64_t depth) const { return round_up(depth, 2) + (depth * element_ % 4096 < 64 ? 32 : 0); }

  // dz, not scaled yet.
  void project_gradient(C* plain, char* to, int64_t stride) const {
    C* up = plain;
    if (in_.gain) {
      up = plain + outputs_ * ranks_;
      concatenate(up, in_.up, gain_.data());
    }
    auto* narrow = workspace<uint16_t>(Use::kNarrow, how_.pairs ? outputs_ * ranks_ : 0);
    multiply_into<C>(rows_, ranks_, outputs_, grad_.matrix(how_, 0, false),
                     multiplied_as(how_, up, outputs_, ranks_, ranks_, true, narrow), {to, stride, how_.narrow});
  }

  void project(char* z, int64_t stride) const {
    if (projected_) {
      const Tensor kept = torch::stable::contiguous(*projected_);
      const char* from = const_data<char>(kept);
      for_rows(rows_, ranks_, [&](int64_t r) {
        std::memcpy(z + r * stride * element_, from + r * ranks_ * element_, size_t(ranks_ * element_));
      });
      return;
    }
    multiply_into<C>(rows_, ranks_, inputs_, x_.matrix(how_, 0, false),
                     matrix_of(how_, const_data<char>(in_.down), inputs_, false, inputs_), {z, stride, how_.narrow});
  }

  // The row of coefficients of row r of x, each `rank` times.
  const C* line_of(int64_t r) const {
    const int64_t factors = in_.down.size(0), rank = in_.rank();
    const C* from = const_data<C>(in_.coefficients) + r / in_.rows_of_coefficients() * factors;
    C* line = workspace<C>(Use::kLine, ranks_);
    for (int64_t f = 0; f < factors; f++) std::fill_n(line + f * rank, rank, from[f]);
    return line;
  }

  // A row as Cs, and back.
  C* widened_row(const char* from, int64_t at, Use use) const {
    C* row = workspace<C>(use, ranks_);
    loops_of(in_.dtype).widen(row, from, at, ranks_);
    return row;
  }

  void scale(char* dz, int64_t stride) const {
    for_rows(rows_, ranks_, [&](int64_t r) {
      C* row = widened_row(dz, r * stride, Use::kRows);
      spectral_loops_of<C>().scale_columns(row, 0, line_of(r), 1, ranks_);
      loops_of(in_.dtype).store(dz, r * stride, row, ranks_);
    });
  }

  // The sums of dz * z for each coefficient, then both times the coefficients. Of a sample in blocks of rows, whose
  // sums are added in float64.
  void coefficients_and_scaling(char* dz, int64_t stride, char* z, int64_t z_stride) const {
    constexpr int64_t kBlock = 32;
    const int64_t shared = in_.rows_of_coefficients(), factors = in_.down.size(0), rank = in_.rank();
    const int64_t blocks = ceil_div(shared, kBlock), count = shared == 0 ? 0 : rows_ / shared * blocks;
    const bool wanted = out_.factors.coefficients;
    std::vector<double> partial(size_t(wanted ? count * factors : 0));
    const auto& spectral = spectral_loops_of<C>();
    const auto& loops = loops_of(in_.dtype);
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const int64_t first = t / blocks * shared + t % blocks * kBlock;
        const int64_t last = std::min(first + kBlock, (t / blocks + 1) * shared);
        const C* line = line_of(first);
        C* sums = workspace<C>(Use::kTile, ranks_);
        std::fill_n(sums, ranks_, C(0));
        for (int64_t r = first; r < last; r++) {
          C* of_z = widened_row(z, r * z_stride, Use::kRows);
          C* of_dz = widened_row(dz, r * stride, Use::kPanel);
          if (wanted) spectral.add_scaled_columns(sums, 0, of_z, 0, of_dz, 1, ranks_);
          spectral.scale_columns(of_z, 0, line, 1, ranks_);
          spectral.scale_columns(of_dz, 0, line, 1, ranks_);
          loops.store(z, r * z_stride, of_z, ranks_);
          loops.store(dz, r * stride, of_dz, ranks_);
        }
        for (int64_t f = 0; f < (wanted ? factors : 0); f++) {
          double sum = 0;
          for (int64_t j = 0; j < rank; j++) sum += double(sums[f * rank + j]);
          partial[size_t(t * factors + f)] = sum;
        }
      }
    });
    if (!wanted) return;
    C* to = data<C>(*out_.factors.coefficients);
    const int64_t samples = out_.factors.coefficients->numel() / std::max<int64_t>(1, factors);
    for (int64_t i = 0; i < samples * factors; i++) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; b++) sum += partial[size_t((i / factors * blocks + b) * factors + i % factors)];
      to[i] = C(sum);
    }
  }

  // grad^T (c z): of up and gain.
  void products(const C* plain, const char* z, int64_t z_stride) const {
    C* sums = workspace<C>(Use::kFactors, outputs_ * ranks_);
    multiply_into<C>(outputs_, ranks_, rows_, grad_.matrix(how_, 0, true), matrix_of(how_, z, z_stride, true, rows_),
                     {reinterpret_cast<char*>(sums), ranks_});
    write_up_and_gain(out_.factors, sums, plain, pointer(gain_), outputs_, ranks_);
  }

  void input_gradient(char* both, int64_t offset, int64_t depth, int64_t stride) const {
    const char* from = grad_.of(0);
    for_rows(rows_, outputs_, [&](int64_t r) {
      std::memcpy(both + r * stride * element_, from + r * grad_.row * element_, size_t(outputs_ * element_));
      std::memset(both + (r * stride + outputs_) * element_, 0, size_t((offset - outputs_) * element_));
    });
    const auto weight = matrix_of(how_, const_data<char>(in_.weight), inputs_, true, outputs_);
    const auto down = matrix_of(how_, const_data<char>(in_.down), inputs_, true, ranks_);
    const Stacked<C, Matrix<C>, Matrix<C>> right{weight, down, offset / how_.together()};
    multiply_into<C>(rows_, inputs_, depth, matrix_of(how_, both, stride, false, depth), right,
                     place_of(*out_.x, inputs_));
  }

  const SpectralInputs& in_;
  const Arithmetic<C> how_;
  const Samples x_, grad_;
  const Gradients& out_;
  const int64_t rows_, inputs_, outputs_, ranks_, element_;
  const std::vector<C> gain_;
  const OptionalTensor& projected_;
};

// By way of G_b = grad_b^T x_b, the gradient of W + gain * Delta_b.
template <class C>
void backward_by_delta(const SpectralInputs& in, const Samples& grad, const OptionalTensor& effective,
                       const Gradients& out) {
  const Arithmetic<C> how(in.dtype);
  const int64_t inputs = in.x.columns, outputs = in.outputs(), batch = in.x.batch;
  const int64_t stride = GradientsOfFactors<C>::stride_of(inputs);
  const int64_t together = samples_together(in.coefficients, in.rank(), how.pairs != nullptr);
  const int64_t group = samples_at_a_time<C>(outputs, stride, together);
  const std::vector<C> gain = values_of<C>(in.gain, outputs);
  if (out.bias) bias_gradient<C>(*out.bias, grad.merged());
  if (out.x) {
    OptionalTensor kept = effective;
    if (kept) kept = torch::stable::contiguous(*kept);
    const EffectiveWeight<C> again(in.down, in.up, in.coefficients, pointer(gain), &in.weight);
    const int64_t element = int64_t(out.x->element_size());
    char* to = output<char>(*out.x);
    for (int64_t first = 0; first < batch; first += group) {
      const int64_t samples = std::min(group, batch - first);
      const char* weights = nullptr;
      if (kept) {
        weights = const_data<char>(*kept) + first * outputs * inputs * element;
      } else {
        char* made = workspace<char>(Use::kProducts, samples * outputs * inputs * element);
        again.run(made, first, samples);
        weights = made;
      }
      for (int64_t b = 0; b < samples; b++) {
        multiply_into<C>(in.x.length, inputs, outputs, grad.matrix(how, first + b, false),
                         matrix_of(how, weights + b * outputs * inputs * element, inputs, true, outputs),
                         {to + (first + b) * in.x.length * inputs * element, inputs, how.narrow});
      }
    }
  }
  if (!out.factors.any()) {
    if (out.weight) weight_gradient<C>(*out.weight, grad.merged(), in.x.merged());
    return;
  }
  const auto factors = gradients_of_factors(in.down, in.up, in.coefficients, gain, out.factors);
  Tensor of_weight;
  if (out.weight) of_weight = torch::stable::new_zeros(in.weight, {outputs, inputs}, compute_dtype(in.dtype));
  for (int64_t first = 0; first < batch; first += group) {
    const int64_t samples = std::min(group, batch - first);
    C* g = workspace<C>(Use::kProducts, samples * outputs * stride);
    for (int64_t b = 0; b < samples; b++) {
      multiply_into<C>(outputs, inputs, in.x.length, grad.matrix(how, first + b, true),
                       in.x.matrix(how, first + b, true), {reinterpret_cast<char*>(g + b * outputs * stride), stride});
    }
    factors->add(g, stride, first, samples);
    if (!out.weight) continue;
    C* sums = data<C>(of_weight);
    const auto& loops = loops_of(of_weight.scalar_type());
    for_rows(outputs, inputs * samples, [&](int64_t n) {
      for (int64_t b = 0; b < samples; b++) {
        loops.accumulate(sums + n * inputs, g, (b * outputs + n) * stride, inputs);
      }
    });
  }
  factors->finish();
  if (out.weight) store_all(*out.weight, const_data<C>(of_weight));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> spectral_linear_backward(
    const Tensor& grad_, const Tensor& x, const Tensor& weight, OptionalTensor bias, const Tensor& down,
    const Tensor& up, const Tensor& coefficients, OptionalTensor gain, OptionalTensor effective,
    OptionalTensor projected, bool by_delta, bool need_x, bool need_weight, bool need_bias, bool need_down,
    bool need_up, bool need_coefficients, bool need_gain) {
  const SpectralInputs in(x, weight, bias, down, up, coefficients, gain);
  STD_TORCH_CHECK(!by_delta || coefficients.dim() == 2, "quaver: Delta has coefficients by samples");
  STD_TORCH_CHECK(grad_.scalar_type() == in.dtype && grad_.dim() == 3 && grad_.size(2) == in.outputs(),
                  "quaver: grad does not fit");
  const Samples grad(grad_);
  GradientOutputs<7> results;
  results.add(x, need_x);
  results.add(weight, need_weight);
  results.add(bias, x, need_bias);
  results.add(down, need_down);
  results.add(up, need_up);
  results.add(coefficients, need_coefficients);
  results.add(gain, x, need_gain);
  const Gradients out{results.wanted(0),
                      results.wanted(1),
                      results.wanted(2),
                      {results.wanted(3), results.wanted(4), results.wanted(5), results.wanted(6)}};
  with_compute(in.dtype, [&](auto zero) {
    using C = decltype(zero);
    if (by_delta) {
      backward_by_delta<C>(in, grad, effective, out);
    } else {
      BackwardByTokens<C>(in, grad, projected, out).run();
    }
  });
  const auto& t = results.tensors;
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6]};
}

}  // namespace
}  // namespace quaver::cpu

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("spectral_linear_backward", TORCH_BOX(&quaver::cpu::spectral_linear_backward));
}
