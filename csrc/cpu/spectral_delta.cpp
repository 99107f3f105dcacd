// torch.ops.quaver.spectral_delta, delta_linear and their backward ops on the CPU. Schemas:
// kernels/spectral_linear/schemas.py.
#include "cpu/gradient_outputs.h"
#include "cpu/gradients_by_factor.h"

namespace quaver::cpu {
namespace {

using torch::stable::contiguous;

void check_factors(const Tensor& down, const Tensor& up, const Tensor& coefficients) {
  STD_TORCH_CHECK(down.dim() == 3 && up.dim() == 3 && down.size(0) == up.size(0) && down.size(1) == up.size(2) &&
                      coefficients.dim() == 2 && coefficients.size(1) == down.size(0),
                  "quaver: the factors do not fit");
  STD_TORCH_CHECK(
      down.scalar_type() == up.scalar_type() && coefficients.scalar_type() == compute_dtype(down.scalar_type()),
      "quaver: wrong dtypes");
}

Tensor spectral_delta(const Tensor& down_, const Tensor& up_, const Tensor& coefficients, OptionalTensor gain_) {
  check_factors(down_, up_, coefficients);
  const Tensor down = contiguous(down_), up = rows_of_factors(up_);
  const int64_t samples = coefficients.size(0);
  Tensor out = torch::stable::new_empty(down, {samples, up.size(1), down.size(2)});
  if (out.numel() == 0) return out;
  with_compute(down.scalar_type(), [&](auto zero) {
    using C = decltype(zero);
    const std::vector<C> gain = values_of<C>(gain_, up.size(1));
    EffectiveWeight<C>(down, up, coefficients, pointer(gain), nullptr).run(output<char>(out), 0, samples);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spectral_delta_backward(const Tensor& grad, const Tensor& down_,
                                                                   const Tensor& up_, const Tensor& coefficients,
                                                                   OptionalTensor gain_, bool need_down, bool need_up,
                                                                   bool need_coefficients, bool need_gain) {
  check_factors(down_, up_, coefficients);
  const Tensor down = contiguous(down_), up = rows_of_factors(up_);
  const Samples g(grad);
  STD_TORCH_CHECK(g.batch == coefficients.size(0) && g.length == up.size(1) && g.columns == down.size(2) &&
                      grad.scalar_type() == down.scalar_type(),
                  "quaver: grad does not fit");
  GradientOutputs<4> out;
  out.add(down_, need_down);
  out.add(up_, need_up);
  out.add(coefficients, need_coefficients);
  out.add(gain_, down_, need_gain);
  with_compute(down.scalar_type(), [&](auto zero) {
    using C = decltype(zero);
    const FactorGradients wanted{out.wanted(0), out.wanted(1), out.wanted(2), out.wanted(3)};
    const std::vector<C> gain = values_of<C>(gain_, g.length);
    const int64_t stride = GradientsOfFactors<C>::stride_of(g.columns);
    const bool pairs = pair_loops_of(down.scalar_type()) != nullptr;
    const int64_t together = samples_together(coefficients, down.size(1), pairs);
    const int64_t group = samples_at_a_time<C>(g.length, stride, together);
    const auto factors = gradients_of_factors(down, up, coefficients, gain, wanted);
    const auto& loops = loops_of(grad.scalar_type());
    const bool is_there = sizeof(C) == grad.element_size() && g.row == stride && g.sample == g.length * stride;
    for (int64_t first = 0; first < g.batch; first += group) {
      const int64_t samples = std::min(group, g.batch - first);
      if (is_there) {
        factors->add(reinterpret_cast<const C*>(g.of(first)), stride, first, samples);
        continue;
      }
      C* wide = workspace<C>(Use::kProducts, samples * g.length * stride);
      for_rows(samples * g.length, g.columns, [&](int64_t r) {
        loops.widen(wide + r * stride, g.of(first + r / g.length), r % g.length * g.row, g.columns);
      });
      factors->add(wide, stride, first, samples);
    }
    factors->finish();
  });
  return {out.tensors[0], out.tensors[1], out.tensors[2], out.tensors[3]};
}

// W + gain * Delta_b, made as it is packed: (i, k) is its row i and column k, or the other way round.
template <class C>
struct ShiftedWeight {
  const Arithmetic<C>& how;
  const char* weight;
  const DtypeLoops::Loops* weight_loops;
  const char* delta;
  const DtypeLoops::Loops* delta_loops;
  const C* gain;  // of each row, or null
  int64_t rows, columns;
  bool transposed;

  static constexpr int64_t kPackingWork = 8;
  int64_t step(const GemmLoopsOf<C>& loops) const { return transposed ? 4 * loops.columns : loops.columns; }
  int64_t depth_step(const GemmLoopsOf<C>& loops) const { return loops.depth; }

  void pack(const GemmLoopsOf<C>& loops, const Panels<C>& panels, int64_t panel, int64_t i, int64_t count, int64_t to,
            int64_t k, int64_t length) const {
    const int64_t at_a_time = transposed ? count : panels.width;
    for (int64_t first = 0; first < count; first += at_a_time, panel++) {
      const int64_t now = std::min(at_a_time, count - first);
      for_blocks(panels, to, k, length, [&](int64_t to_k, int64_t from_k, int64_t part) {
        C* out = panels.at(panel, to_k);
        if (transposed) return pack_columns(loops, out, panels, i, count, from_k, part);
        const int64_t together = how.together(), single = from_k * together;
        const int64_t singles = std::min(part * together, columns - single);
        const C* made = make(i + first, now, single, singles, part);
        loops.pack_rows(out, panels.width, made, part, now, part);
      });
    }
  }

 private:
  // `count` rows of `singles` elements, as elements of panels of which a row has `length`.
  const C* make(int64_t row, int64_t count, int64_t column, int64_t singles, int64_t length) const {
    C* made = workspace<C>(Use::kRows, count * length);
    if (!how.narrow) {
      const int64_t at = row * columns + column;
      spectral_loops_of<C>().shift_rows(made, length, reinterpret_cast<const C*>(weight) + at,
                                        reinterpret_cast<const C*>(delta) + at, columns, gain ? gain + row : nullptr,
                                        count, singles);
      return made;
    }
    C* wide = workspace<C>(Use::kPairs, singles);
    for (int64_t r = 0; r < count; r++) {
      if (how.pairs) {
        auto* to = reinterpret_cast<uint16_t*>(made + r * length);
        make_row(wide, row + r, column, singles);
        how.narrow->store(to, 0, wide, singles);
        std::fill(to + singles, to + 2 * length, uint16_t(0));
      } else {
        make_row(made + r * length, row + r, column, singles);
      }
    }
    return made;
  }

  void make_row(C* to, int64_t row, int64_t column, int64_t count) const {
    const int64_t at = row * columns + column;
    C* shift = workspace<C>(Use::kLine, count);
    const C *base = reinterpret_cast<const C*>(weight) + at, *from = reinterpret_cast<const C*>(delta) + at;
    if (weight_loops) {
      weight_loops->widen(to, weight, at, count);
      base = to;
    }
    if (delta_loops) {
      delta_loops->widen(shift, delta, at, count);
      from = shift;
    }
    spectral_loops_of<C>().shift_rows(to, 0, base, from, 0, gain ? gain + row : nullptr, 1, count);
    if (how.narrow) how.narrow->round(to, count);
  }

  void pack_columns(const GemmLoopsOf<C>& loops, C* out, const Panels<C>& panels, int64_t i, int64_t count, int64_t k,
                    int64_t length) const {
    const int64_t few = std::max<int64_t>(1, 4096 / count);
    const int64_t most = how.pairs ? round_up(few, kPairsTogether) : few;
    for (int64_t done = 0; done < length; done += most) {
      const int64_t part = std::min(most, length - done);
      C* made = workspace<C>(Use::kRows, part * count);
      if (how.pairs) {
        auto* singles = workspace<uint16_t>(Use::kNarrow, 2 * count);
        C* wide = workspace<C>(Use::kPairs, count);
        for (int64_t r = 0; r < part; r++) {
          const int64_t row = 2 * (k + done + r);
          for (int64_t odd = 0; odd < 2 && row + odd < rows; odd++) {
            make_row(wide, row + odd, i, count);
            how.narrow->store(singles, odd * count, wide, count);
          }
          how.pairs->zip(made + r * count, singles, row + 1 < rows ? singles + count : nullptr, count);
        }
      } else {
        for (int64_t r = 0; r < part; r++) make_row(made + r * count, k + done + r, i, count);
      }
      loops.pack_columns(out + done * panels.width, panels.size(), panels.width, made, count, count, part);
    }
  }
};

// The tensors of delta_linear.
struct DeltaInputs {
  Samples x;
  Tensor weight, delta;
  OptionalTensor gain;
  ScalarType dtype;

  DeltaInputs(const Tensor& x_, const Tensor& weight_, const Tensor& delta_, const OptionalTensor& gain_)
      : x(x_), weight(contiguous(weight_)), delta(contiguous(delta_)), gain(gain_), dtype(x_.scalar_type()) {
    STD_TORCH_CHECK(x_.dim() == 3 && weight.dim() == 2 && delta.dim() == 3, "quaver: wrong dimensions");
    STD_TORCH_CHECK(weight.size(1) == x.columns && delta.size(0) == x.batch && delta.size(1) == weight.size(0) &&
                        delta.size(2) == x.columns,
                    "quaver: x, weight and delta do not fit");
  }

  int64_t outputs() const { return weight.size(0); }

  template <class C>
  ShiftedWeight<C> of(const Arithmetic<C>& how, int64_t b, const C* gain_of_rows, bool transposed) const {
    const int64_t at = b * weight.numel() * int64_t(delta.element_size());
    return {how,
            const_data<char>(weight),
            narrow_loops(weight.scalar_type()),
            const_data<char>(delta) + at,
            narrow_loops(delta.scalar_type()),
            gain_of_rows,
            outputs(),
            x.columns,
            transposed};
  }
};

// Calls body(b) for each sample: a thread has whole ones where that leaves none idle for long, else shares each.
template <class Body>
void for_samples(int64_t batch, Body&& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t grain = batch % threads == 0 || batch >= 8 * threads ? 1 : std::max<int64_t>(1, batch);
  parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) body(b);
  });
}

Tensor delta_linear(const Tensor& x, const Tensor& weight, OptionalTensor bias_, const Tensor& delta,
                    OptionalTensor gain_) {
  const DeltaInputs in(x, weight, delta, gain_);
  const int64_t length = in.x.length, outputs = in.outputs(), inputs = in.x.columns;
  Tensor out = torch::stable::new_empty(x, {in.x.batch, length, outputs});
  with_compute(in.dtype, [&](auto zero) {
    using C = decltype(zero);
    const Arithmetic<C> how(in.dtype);
    const std::vector<C> gain = values_of<C>(gain_, outputs), bias = values_of<C>(bias_, outputs);
    char* to = output<char>(out);
    for_samples(in.x.batch, [&](int64_t b) {
      multiply_into<C>(length, outputs, inputs, in.x.matrix(how, b, false), in.of(how, b, pointer(gain), false),
                       {to + b * length * outputs * int64_t(out.element_size()), outputs, how.narrow}, pointer(bias));
    });
  });
  return out;
}

// Of weight, delta and gain, from G_b = grad_b^T x_b.
template <class C>
void weight_gradients(const DeltaInputs& in, const Samples& grad, const std::vector<C>& gain, Tensor* of_weight,
                      Tensor* of_delta, Tensor* of_gain) {
  const Arithmetic<C> how(in.dtype);
  const int64_t outputs = in.outputs(), inputs = in.x.columns;
  const int64_t group = samples_at_a_time<C>(outputs, inputs, 1);
  Tensor sums;
  if (of_weight) sums = torch::stable::new_zeros(in.weight, {outputs, inputs}, compute_dtype(in.dtype));
  std::vector<double> dots(size_t(of_gain ? outputs : 0));
  const auto& spectral = spectral_loops_of<C>();
  const auto &wide = loops_of(compute_dtype(in.dtype)), &of_deltas = loops_of(in.delta.scalar_type());
  char* to = of_delta ? output<char>(*of_delta) : nullptr;
  for (int64_t first = 0; first < in.x.batch; first += group) {
    const int64_t samples = std::min(group, in.x.batch - first);
    C* g = workspace<C>(Use::kProducts, samples * outputs * inputs);
    for (int64_t b = 0; b < samples; b++) {
      multiply_into<C>(outputs, inputs, in.x.length, grad.matrix(how, first + b, true),
                       in.x.matrix(how, first + b, true), {reinterpret_cast<char*>(g + b * outputs * inputs), inputs});
    }
    for_rows(outputs, samples * inputs, [&](int64_t n) {
      for (int64_t b = 0; b < samples; b++) {
        const int64_t at = ((first + b) * outputs + n) * inputs;
        C* row = g + (b * outputs + n) * inputs;
        if (of_weight) wide.accumulate(data<C>(sums) + n * inputs, row, 0, inputs);
        if (of_gain) {
          C* shift = workspace<C>(Use::kLine, inputs);
          of_deltas.widen(shift, const_data<char>(in.delta), at, inputs);
          dots[size_t(n)] += spectral.dot(row, shift, inputs);
        }
        if (!of_delta) continue;
        if (!gain.empty()) spectral.scale_panel(row, row, gain.data() + n, inputs, 1);
        of_deltas.store(to, at, row, inputs);
      }
    });
  }
  if (of_weight) store_all(*of_weight, data<C>(sums));
  if (of_gain) write_gain(*of_gain, dots);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> delta_linear_backward(const Tensor& grad_, const Tensor& x,
                                                                         const Tensor& weight, OptionalTensor bias,
                                                                         const Tensor& delta, OptionalTensor gain_,
                                                                         bool need_x, bool need_weight, bool need_bias,
                                                                         bool need_delta, bool need_gain) {
  const DeltaInputs in(x, weight, delta, gain_);
  const Samples grad(grad_);
  const int64_t length = in.x.length, outputs = in.outputs(), inputs = in.x.columns;
  STD_TORCH_CHECK(
      grad_.scalar_type() == in.dtype && grad.batch == in.x.batch && grad.length == length && grad.columns == outputs,
      "quaver: grad does not fit");
  GradientOutputs<5> out;
  out.add(x, need_x);
  out.add(weight, need_weight);
  out.add(bias, x, need_bias);
  out.add(delta, need_delta);
  out.add(gain_, x, need_gain);
  with_compute(in.dtype, [&](auto zero) {
    using C = decltype(zero);
    const Arithmetic<C> how(in.dtype);
    const std::vector<C> gain = values_of<C>(gain_, outputs);
    if (Tensor* of_bias = out.wanted(2)) bias_gradient<C>(*of_bias, grad.merged());
    if (Tensor* of_x = out.wanted(0)) {
      char* to = output<char>(*of_x);
      for_samples(in.x.batch, [&](int64_t b) {
        multiply_into<C>(length, inputs, outputs, grad.matrix(how, b, false), in.of(how, b, pointer(gain), true),
                         {to + b * length * inputs * int64_t(of_x->element_size()), inputs, how.narrow});
      });
    }
    if (out.wanted(3) || out.wanted(4)) {
      weight_gradients<C>(in, grad, gain, out.wanted(1), out.wanted(3), out.wanted(4));
    } else if (Tensor* of_weight = out.wanted(1)) {
      weight_gradient<C>(*of_weight, grad.merged(), in.x.merged());
    }
  });
  return {out.tensors[0], out.tensors[1], out.tensors[2], out.tensors[3], out.tensors[4]};
}

}  // namespace
}  // namespace quaver::cpu

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("spectral_delta", TORCH_BOX(&quaver::cpu::spectral_delta));
  m.impl("spectral_delta_backward", TORCH_BOX(&quaver::cpu::spectral_delta_backward));
  m.impl("delta_linear", TORCH_BOX(&quaver::cpu::delta_linear));
  m.impl("delta_linear_backward", TORCH_BOX(&quaver::cpu::delta_linear_backward));
}
