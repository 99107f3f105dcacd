// torch.ops.quaver.perturbed_linear and its gradients on the CPU. Schemas: kernels/perturbed_linear/op.py.
#include "common/linear_shape.h"
#include "cpu/dot_rows.h"
#include "cpu/output.h"
#include "cpu/perturbed_weight.h"
#include "cpu/row_sums.h"
#include "cpu/sigma_gradient.h"

namespace {

using namespace quaver;
using torch::stable::contiguous;
using torch::stable::parallel_for;

// Calls body(C{}), C being float64 for float64 and float32 for the others.
template <class Body>
void with_compute(ScalarType dtype, Body&& body) {
  if (dtype == ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

// The 16-bit loops that a result of `dtype` is narrowed by; none for float32 and float64.
const cpu::DtypeLoops::Loops* narrow_loops(ScalarType dtype) {
  return dtype == compute_dtype(dtype) ? nullptr : &cpu::loops_of(dtype);
}

void narrow_into(Tensor& out, const Tensor& wide) {
  const auto& loops = cpu::loops_of(out.scalar_type());
  char* to = cpu::output<char>(out);
  const float* from = const_data<float>(wide);
  parallel_for(0, out.numel(), cpu::kGrain,
               [&](int64_t begin, int64_t end) { loops.store(to, begin, from + begin, end - begin); });
}

// What all three ops know of the weights and their noise. C: float, or double.
template <class C>
struct Weights {
  Tensor weight, sigma;
  Placement place;
  SigmaShape shape;
  std::vector<Source> members;
  const cpu::DtypeLoops::Loops* round;  // W' is rounded to x's type
  const cpu::PairLoops* pairs;          // how x's type is multiplied, where that is in pairs

  Weights(const Tensor& weight_, const Tensor& sigma_, const Tensor& seed, ScalarType x, int64_t stream, int64_t domain,
          int64_t row_offset, int64_t column_offset, int64_t row_length)
      : weight(contiguous(weight_)),
        sigma(contiguous(sigma_)),
        place(weight, 0, row_offset, column_offset, row_length),
        shape(sigma, place, quaver::members(seed)),
        members(cpu::sources(seed, stream, domain)),
        round(narrow_loops(x)),
        pairs(cpu::pair_loops_of(x)) {
    STD_TORCH_CHECK(weight.dim() == 2, "quaver: weight must be [N, K]");
    STD_TORCH_CHECK(sigma.scalar_type() == compute_dtype(x), "quaver: sigma has the wrong dtype");
    STD_TORCH_CHECK(compute_dtype(weight.scalar_type()) == compute_dtype(x), "quaver: weight has the wrong dtype");
  }

  cpu::PerturbedWeight<C> of(int64_t p) const {
    return {const_data<char>(weight),
            int64_t(weight.element_size()),
            &cpu::loops_of(weight.scalar_type()),
            round,
            const_data<C>(sigma) + p * shape.member_stride(),
            shape.kind,
            members[size_t(p)],
            place};
  }
};

// Calls body(p) for each member: side by side where there are several, unless one has enough work for all threads.
template <class Body>
void for_members(int64_t members, int64_t work, Body&& body) {
  constexpr int64_t kMuch = 1 << 26;  // multiply-adds: a millisecond or so
  if (members == 1 || work > kMuch) {
    for (int64_t p = 0; p < members; p++) body(p);
  } else {
    parallel_for(0, members, std::max<int64_t>(1, cpu::kSmallWork / std::max<int64_t>(1, work)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t p = begin; p < end; p++) body(p);
                 });
  }
}

// out [P, N]: every member's bias as a C, with its noise, rounded to x's type.
template <class C>
void perturbed_biases(C* out, const Tensor& bias_, const OptionalTensor& sigma_, const Tensor& seed, int64_t stream,
                      int64_t domain, int64_t row_offset, const cpu::DtypeLoops::Loops* round) {
  const Tensor bias = contiguous(bias_);
  const auto& loops = cpu::loops_of(bias.scalar_type());
  const char* from = const_data<char>(bias);
  const int64_t size = bias.numel(), population = members(seed);
  for (int64_t p = 0; p < population && !sigma_; p++) loops.widen(out + p * size, from, 0, size);
  if (sigma_) {
    const Tensor sigma = contiguous(*sigma_);
    const Placement place(bias, 0, 0, row_offset, row_offset + size);
    const SigmaShape shape(sigma, place, population);
    const auto sources = cpu::sources(seed, stream, domain + 256);
    alignas(64) float noise[cpu::kTile];
    for (int64_t p = 0; p < population; p++) {
      const C* values = const_data<C>(sigma) + p * shape.member_stride();
      cpu::for_tiles(place.first, 0, size, [&](uint64_t element, int64_t at, int64_t length) {
        cpu::philox_loops().fill(noise, length, sources[size_t(p)], element);
        const bool elementwise = shape.kind != SigmaShape::kScalar;
        loops.perturb_wide(out + p * size + at, from, at, noise, elementwise ? values + at : values, elementwise,
                           length);
      });
    }
  }
  if (round) round->round(out, population * size);
}

// Rows of x up to which dot products beat packing; tiles of bf16 beat them earlier (16 x 768 x 3072: 0.84 of the time).
constexpr int64_t kDotRows = 16, kDotRowsAmx = 4;

template <class C>
void linear_into(Tensor& out, const Rows& x, const Weights<C>& weights, const OptionalTensor& bias,
                 const OptionalTensor& bias_sigma, const Tensor& seed, int64_t stream, int64_t domain,
                 int64_t row_offset) {
  const int64_t columns = weights.place.rows, population = int64_t(weights.members.size());
  std::vector<C> biases(size_t(bias ? population * columns : 0));
  if (bias) {
    perturbed_biases(biases.data(), *bias, bias_sigma, seed, stream, domain, row_offset, weights.round);
  }
  const ScalarType dtype = out.scalar_type();
  const bool deep = weights.round && x.columns > cpu::kMostNarrowDepth;
  Tensor wide = deep ? torch::stable::new_empty(out, {population, x.rows, columns}, compute_dtype(dtype)) : out;
  char* to = cpu::output<char>(wide);
  for_members(population, x.rows * x.columns * columns, [&](int64_t p) {
    const auto weight = weights.of(p);
    const cpu::Matrix<C> left{x.of(p), x.stride, false, weights.round, weights.pairs, x.columns};
    const cpu::Result<C> result{to + p * x.rows * columns * int64_t(wide.element_size()), columns,
                                bias ? biases.data() + p * columns : nullptr, false, deep ? nullptr : weights.round};
    if (x.rows <= (weights.pairs && cpu::has_amx() ? kDotRowsAmx : kDotRows)) {
      cpu::dot_rows(x.rows, left, weight, result);
    } else {
      cpu::gemm(x.rows, columns, x.columns, left, cpu::PerturbedRows<C>{weight, weights.pairs}, result);
    }
  });
  if (deep) narrow_into(out, wide);
}

Tensor perturbed_linear(const Tensor& x_, const Tensor& weight, OptionalTensor bias, const Tensor& sigma,
                        OptionalTensor bias_sigma, const Tensor& seed, bool member_inputs, int64_t stream,
                        int64_t domain, int64_t row_offset, int64_t column_offset, int64_t row_length) {
  const Rows x(x_, member_inputs);
  STD_TORCH_CHECK(x.columns == weight.size(1), "quaver: x does not fit the weight");
  std::vector<int64_t> sizes;
  if (is_population(seed)) sizes.push_back(seed.size(0));
  Tensor out = torch::stable::new_empty(x_, with_last(x_, member_inputs ? 1 : 0, weight.size(0), sizes));
  with_compute(x_.scalar_type(), [&](auto zero) {
    using C = decltype(zero);
    const Weights<C> weights(weight, sigma, seed, x_.scalar_type(), stream, domain, row_offset, column_offset,
                             row_length);
    linear_into<C>(out, x, weights, bias, bias_sigma, seed, stream, domain, row_offset);
  });
  return out;
}

// grad W' of each member, added over members where x is shared by them.
template <class C>
void input_gradient_into(Tensor& out, const Rows& grad, const Weights<C>& weights, bool member_inputs) {
  const int64_t columns = weights.place.columns, population = int64_t(weights.members.size());
  const bool summed = population > 1 && !member_inputs;
  const bool wide_first = weights.round && (summed || grad.columns > cpu::kMostNarrowDepth);
  Tensor wide = out;
  if (wide_first) wide = torch::stable::new_empty(out, sizes_of(out), compute_dtype(out.scalar_type()));
  char* to = cpu::output<char>(wide);
  const auto member = [&](int64_t p) {
    const auto weight = weights.of(p);
    const cpu::Matrix<C> left{grad.of(p), grad.stride, false, weights.round, weights.pairs, grad.columns};
    char* of_member = to + (member_inputs ? p * grad.rows * columns * int64_t(wide.element_size()) : 0);
    const cpu::Result<C> result{of_member, columns, nullptr, summed && p > 0, wide_first ? nullptr : weights.round};
    cpu::gemm(grad.rows, columns, grad.columns, left, cpu::PerturbedColumns<C>{weight, weights.pairs}, result);
  };
  if (summed) {
    for (int64_t p = 0; p < population; p++) member(p);
  } else {
    for_members(population, grad.rows * grad.columns * columns, member);
  }
  if (population == 0 && !member_inputs) torch::stable::zero_(wide);
  if (wide_first) narrow_into(out, wide);
}

Tensor perturbed_linear_input_gradient(const Tensor& grad_, const Tensor& weight, const Tensor& sigma,
                                       const Tensor& seed, bool member_inputs, int64_t stream, int64_t domain,
                                       int64_t row_offset, int64_t column_offset, int64_t row_length) {
  const bool population = is_population(seed);
  const Rows grad(grad_, population);
  STD_TORCH_CHECK(grad.columns == weight.size(0), "quaver: grad does not fit the weight");
  std::vector<int64_t> sizes;
  if (member_inputs) sizes.push_back(seed.size(0));
  Tensor out = torch::stable::new_empty(grad_, with_last(grad_, population ? 1 : 0, weight.size(1), sizes));
  with_compute(grad_.scalar_type(), [&](auto zero) {
    using C = decltype(zero);
    const Weights<C> weights(weight, sigma, seed, grad_.scalar_type(), stream, domain, row_offset, column_offset,
                             row_length);
    input_gradient_into<C>(out, grad, weights, member_inputs);
  });
  return out;
}

// grad^T x, added over members; and of each member the sums of that times its noise over what a value of sigma covers.
// Either output may be null.
template <class C>
void weight_gradient_into(Tensor* weight_out, Tensor* sigma_out, const Rows& grad, const Rows& x,
                          const Weights<C>& weights) {
  const Placement& place = weights.place;
  const int64_t population = int64_t(weights.members.size());
  const auto fresh = [&] {
    return torch::stable::new_empty(weights.weight, {place.rows, place.columns},
                                    compute_dtype(weights.weight.scalar_type()));
  };
  const bool narrow = weight_out && weight_out->scalar_type() != compute_dtype(weight_out->scalar_type());
  // Members are told apart only for their sigmas: otherwise their gradients are added as they are made.
  const bool apart = sigma_out && population > 1;
  Tensor total = weight_out && !narrow ? *weight_out : fresh(), member = apart ? fresh() : total;
  if (population == 0) torch::stable::zero_(total);
  SigmaShape one = weights.shape;
  one.members = 1;
  std::vector<C> of_member(size_t(one.size));
  C* sigmas = sigma_out ? data<C>(*sigma_out) : nullptr;
  if (sigma_out) std::fill(sigmas, sigmas + sigma_out->numel(), C(0));
  const auto& loops = cpu::loops_of(total.scalar_type());
  for (int64_t p = 0; p < population; p++) {
    const cpu::Matrix<C> left{grad.of(p), grad.stride, true, weights.round, weights.pairs, grad.rows};
    const cpu::Matrix<C> right{x.of(p), x.stride, true, weights.round, weights.pairs, x.rows};
    const cpu::Result<C> result{cpu::output<char>(member), place.columns, nullptr, !apart && p > 0};
    cpu::gemm(place.rows, place.columns, grad.rows, left, right, result);
    if (apart && weight_out) {
      C* sum = data<C>(total);
      if (p == 0) std::fill(sum, sum + place.size(), C(0));
      parallel_for(0, place.size(), cpu::kGrain, [&](int64_t begin, int64_t end) {
        loops.accumulate(sum + begin, const_data<char>(member), begin, end - begin);
      });
    }
    if (!sigma_out) continue;
    cpu::sigma_gradient(of_member.data(), one, Gradient(member), {weights.members[size_t(p)]}, place);
    C* to = sigmas + p * weights.shape.member_stride();
    for (int64_t i = 0; i < one.size; i++) to[i] += of_member[size_t(i)];
  }
  if (narrow) narrow_into(*weight_out, total);
}

void write(Tensor& out, const std::vector<double>& values) {
  with_compute(out.scalar_type(), [&](auto zero) {
    using C = decltype(zero);
    const std::vector<C> rounded(values.begin(), values.end());
    cpu::loops_of(out.scalar_type()).store(data<char>(out), 0, rounded.data(), int64_t(rounded.size()));
  });
}

// The sums of grad over rows and members, and of each member those times the noise of its bias.
template <class C>
void bias_gradient_into(Tensor* bias_out, Tensor* sigma_out, const Rows& grad, const Tensor& seed, int64_t stream,
                        int64_t domain, int64_t row_offset) {
  const int64_t size = grad.columns, population = members(seed);
  std::vector<double> bias(size_t(size), 0.0), sigma(size_t(sigma_out ? sigma_out -> numel() : 0), 0.0);
  const auto sources = cpu::sources(seed, stream, domain + 256);
  std::vector<float> noise(static_cast<size_t>(size));
  // [1 or P, 1, 1 or N], or 0-dim
  const bool apart = sigma_out && sigma_out->dim() == 3 && sigma_out->size(0) > 1;
  const int64_t values = sigma_out ? sigma_out->numel() / (apart ? population : 1) : 0;
  for (int64_t p = 0; p < population; p++) {
    const std::vector<double> sums =
        cpu::sum_rows<C>(grad.of(p), grad.tensor.scalar_type(), grad.rows, grad.columns, grad.stride);
    for (int64_t n = 0; n < size; n++) bias[size_t(n)] += sums[size_t(n)];
    if (!sigma_out) continue;
    cpu::philox_loops().fill(noise.data(), size, sources[size_t(p)], uint64_t(row_offset));
    double* to = sigma.data() + (apart ? p * values : 0);
    for (int64_t n = 0; n < size; n++) to[values == 1 ? 0 : n] += sums[size_t(n)] * double(noise[size_t(n)]);
  }
  if (bias_out) write(*bias_out, bias);
  if (sigma_out) write(*sigma_out, sigma);
}

// The gradients of weight, sigma, bias and bias_sigma; [0] of those that are not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> perturbed_linear_parameter_gradient(
    const Tensor& grad_, const Tensor& x_, const Tensor& weight, OptionalTensor bias, const Tensor& sigma,
    OptionalTensor bias_sigma, const Tensor& seed, bool need_weight, bool need_sigma, bool need_bias,
    bool need_bias_sigma, bool member_inputs, int64_t stream, int64_t domain, int64_t row_offset, int64_t column_offset,
    int64_t row_length) {
  const Rows grad(grad_, is_population(seed)), x(x_, member_inputs);
  STD_TORCH_CHECK(grad.rows == x.rows && grad.columns == weight.size(0) && x.columns == weight.size(1),
                  "quaver: grad and x do not fit the weight");
  STD_TORCH_CHECK(grad_.scalar_type() == x_.scalar_type(), "quaver: grad and x differ in dtype");
  const auto like = [](const Tensor& tensor, bool needed) {
    return torch::stable::new_empty(tensor, needed ? sizes_of(tensor) : std::vector<int64_t>{0});
  };
  Tensor of_weight = like(weight, need_weight), of_sigma = like(sigma, need_sigma);
  Tensor of_bias = like(need_bias ? *bias : weight, need_bias);
  Tensor of_bias_sigma = like(need_bias_sigma ? *bias_sigma : sigma, need_bias_sigma);
  with_compute(x_.scalar_type(), [&](auto zero) {
    using C = decltype(zero);
    if (need_weight || need_sigma) {
      const Weights<C> weights(weight, sigma, seed, x_.scalar_type(), stream, domain, row_offset, column_offset,
                               row_length);
      weight_gradient_into<C>(need_weight ? &of_weight : nullptr, need_sigma ? &of_sigma : nullptr, grad, x, weights);
    }
    if (need_bias || need_bias_sigma) {
      bias_gradient_into<C>(need_bias ? &of_bias : nullptr, need_bias_sigma ? &of_bias_sigma : nullptr, grad, seed,
                            stream, domain, row_offset);
    }
  });
  return {of_weight, of_sigma, of_bias, of_bias_sigma};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("perturbed_linear", TORCH_BOX(&perturbed_linear));
  m.impl("perturbed_linear_input_gradient", TORCH_BOX(&perturbed_linear_input_gradient));
  m.impl("perturbed_linear_parameter_gradient", TORCH_BOX(&perturbed_linear_parameter_gradient));
}
