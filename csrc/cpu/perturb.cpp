// torch.ops.quaver.perturb and its family on the CPU. Schemas: kernels/perturb/op.py.
#include "common/perturb_shape.h"
#include "cpu/output.h"
#include "cpu/placed_noise.h"
#include "cpu/sigma_gradient.h"

namespace {

using namespace quaver;
using torch::stable::contiguous;
using torch::stable::parallel_for;

template <class C>
void perturb_into(char* to, const char* from, int64_t element_size, const cpu::DtypeLoops::Loops& loops,
                  const Tensor& sigma_tensor, const Tensor& seed, const Placement& place, int64_t stream,
                  int64_t domain) {
  const auto members = cpu::sources(seed, stream, domain);
  const Tensor sigma = contiguous(sigma_tensor);
  const SigmaShape shape(sigma, place, int64_t(members.size()));
  const C* values = const_data<C>(sigma);
  const auto& philox = cpu::philox_loops();
  const int64_t size = place.size();
  parallel_for(0, int64_t(members.size()) * size, cpu::kGrain, [&](int64_t begin, int64_t end) {
    alignas(64) float noise[cpu::kTile];
    alignas(64) C scale[cpu::kTile];
    while (begin < end) {
      const int64_t p = begin / size, start = p * size, stop = std::min(end, start + size);
      const C* of_member = values + p * shape.member_stride();
      cpu::for_placed_tiles(place, begin - start, stop - start, [&](uint64_t element, int64_t at, int64_t length) {
        cpu::prefetch(from + at * element_size, to + (start + at) * element_size, length * element_size);
        philox.fill(noise, length, members[size_t(p)], element);
        loops.perturb(to, start + at, from, at, noise,
                      cpu::sigma_at(of_member, shape.kind, place.columns, at, length, scale),
                      shape.kind != SigmaShape::kScalar, length);
      });
      begin = stop;
    }
  });
}

void perturb_checked(Tensor& out, const Tensor& weight, const Tensor& sigma, const Tensor& seed, const Placement& place,
                     int64_t stream, int64_t domain) {
  const auto& loops = cpu::loops_of(weight.scalar_type());
  STD_TORCH_CHECK(sigma.scalar_type() == compute_dtype(weight.scalar_type()), "quaver: sigma has the wrong dtype");
  const auto run = weight.scalar_type() == ScalarType::Double ? perturb_into<double> : perturb_into<float>;
  run(cpu::output<char>(out), const_data<char>(weight), weight.element_size(), loops, sigma, seed, place, stream,
      domain);
}

Tensor perturb(const Tensor& weight_, const Tensor& sigma, const Tensor& seed, int64_t stream, int64_t domain,
               int64_t row_offset, int64_t column_offset, int64_t row_length) {
  const Tensor weight = contiguous(weight_);
  Tensor out = torch::stable::new_empty(weight, with_members(seed, weight));
  perturb_checked(out, weight, sigma, seed, {weight, 0, row_offset, column_offset, row_length}, stream, domain);
  return out;
}

void perturb_(Tensor& weight, const Tensor& sigma, const Tensor& seed, int64_t stream, int64_t domain,
              int64_t row_offset, int64_t column_offset, int64_t row_length) {
  const Placement place(weight, 0, row_offset, column_offset, row_length);
  Tensor dense = contiguous(weight);
  perturb_checked(dense, dense, sigma, seed, place, stream, domain);
  if (dense.data_ptr() != weight.data_ptr()) torch::stable::copy_(weight, dense);
}

Tensor perturb_sigma_gradient(const Tensor& grad_, const Tensor& sigma, const Tensor& seed, int64_t stream,
                              int64_t domain, int64_t row_offset, int64_t column_offset, int64_t row_length) {
  const Gradient grad(grad_, seed);
  const auto members = cpu::sources(seed, stream, domain);
  const Placement place(grad_, is_population(seed) ? 1 : 0, row_offset, column_offset, row_length);
  const SigmaShape shape(sigma, place, int64_t(members.size()));
  Tensor out = torch::stable::empty_like(contiguous(sigma));
  if (out.scalar_type() == ScalarType::Double) {
    cpu::sigma_gradient(data<double>(out), shape, grad, members, place);
  } else {
    cpu::sigma_gradient(data<float>(out), shape, grad, members, place);
  }
  return out;
}

template <class C>
void sum_members(char* to, const char* from, int64_t members, int64_t size, const cpu::DtypeLoops::Loops& loops) {
  parallel_for(0, size, cpu::kGrain, [&](int64_t begin, int64_t end) {
    cpu::for_tiles(0, begin, end, [&](uint64_t, int64_t at, int64_t length) {
      alignas(64) C sum[cpu::kTile] = {};
      for (int64_t p = 0; p < members; p++) loops.accumulate(sum, from, p * size + at, length);
      loops.store(to, at, sum, length);
    });
  });
}

// The sum of grad [P, ..] over its members, in order.
Tensor perturb_weight_gradient(const Tensor& grad_) {
  const Tensor grad = contiguous(grad_);
  const auto sizes = grad.sizes();
  Tensor out = torch::stable::new_empty(grad, std::vector<int64_t>(sizes.begin() + 1, sizes.end()));
  const auto run = grad.scalar_type() == ScalarType::Double ? sum_members<double> : sum_members<float>;
  run(cpu::output<char>(out), const_data<char>(grad), grad.size(0), out.numel(), cpu::loops_of(grad.scalar_type()));
  return out;
}

template <class C>
void accumulate_noise(C* out, const C* coefficients, const std::vector<Source>& members, const Placement& place,
                      void (*accumulate)(C*, C, const float*, int64_t)) {
  const auto& philox = cpu::philox_loops();
  parallel_for(0, place.size(), std::max<int64_t>(cpu::kTile, cpu::kGrain / std::max<size_t>(1, members.size())),
               [&](int64_t begin, int64_t end) {
                 cpu::for_placed_tiles(place, begin, end, [&](uint64_t element, int64_t at, int64_t length) {
                   alignas(64) float noise[cpu::kTile];
                   std::fill(out + at, out + at + length, C(0));
                   for (size_t p = 0; p < members.size(); p++) {
                     philox.fill(noise, length, members[p], element);
                     accumulate(out + at, coefficients[p], noise, length);
                   }
                 });
               });
}

Tensor perturbation_gradient(const Tensor& coefficients_, const Tensor& seeds, std::vector<int64_t> shape,
                             int64_t stream, int64_t domain, int64_t row_offset, int64_t column_offset,
                             int64_t row_length) {
  const Tensor coefficients = contiguous(coefficients_);
  const auto members = cpu::sources(seeds, stream, domain);
  Tensor out = torch::stable::new_empty(coefficients, shape);
  const Placement place(shape.data(), int64_t(shape.size()), row_offset, column_offset, row_length);
  const auto& loops = cpu::dtype_loops();
  if (coefficients.scalar_type() == ScalarType::Double) {
    accumulate_noise(cpu::output<double>(out), const_data<double>(coefficients), members, place,
                     loops.accumulate_scaled_f64);
  } else {
    accumulate_noise(cpu::output<float>(out), const_data<float>(coefficients), members, place,
                     loops.accumulate_scaled_f32);
  }
  return out;
}

struct Moments {
  double mean = 0, squares = 0;
};

// The mean and the sum of squares about it: of blocks of fixed size, combined in order (Chan, Golub, LeVeque 1979).
Moments moments(const Tensor& x) {
  constexpr int64_t kBlock = 4096;
  const int64_t n = x.numel(), blocks = (n + kBlock - 1) / kBlock;
  std::vector<Moments> partial(static_cast<size_t>(blocks));
  const auto& loops = cpu::loops_of(x.scalar_type());
  const char* from = const_data<char>(x);
  parallel_for(0, blocks, cpu::kGrain / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      Moments& m = partial[size_t(b)];
      loops.moments(from, b * kBlock, std::min(kBlock, n - b * kBlock), m.mean, m.squares);
    }
  });
  Moments all;
  double count = 0;
  for (int64_t b = 0; b < blocks; b++) {
    const double more = double(std::min(kBlock, n - b * kBlock)), total = count + more;
    const double delta = partial[size_t(b)].mean - all.mean;
    all.squares += partial[size_t(b)].squares + delta * delta * count * more / total;
    all.mean += delta * more / total;
    count = total;
  }
  return all;
}

void write_scalar(Tensor& out, double value) {
  if (out.scalar_type() == ScalarType::Double) {
    *data<double>(out) = value;
  } else {
    *data<float>(out) = float(value);
  }
}

Tensor weight_scale(const Tensor& weight_) {
  const Tensor weight = contiguous(weight_);
  Tensor out = torch::stable::new_empty(weight, {}, compute_dtype(weight.scalar_type()));
  const double n = double(weight.numel());
  write_scalar(out, n < 2 ? 0.0 : __builtin_sqrt(moments(weight).squares / (n - 1)));
  return out;
}

double read_scalar(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? *const_data<double>(value) : double(*const_data<float>(value));
}

// grad (w - mean) / ((n - 1) scale), 0 where the scale is 0.
Tensor weight_scale_gradient(const Tensor& grad, const Tensor& weight_, const Tensor& scale) {
  const Tensor weight = contiguous(weight_);
  Tensor out = torch::stable::empty_like(weight);
  const double n = double(weight.numel()), deviation = read_scalar(scale);
  const double factor = n < 2 || deviation == 0 ? 0.0 : read_scalar(grad) / ((n - 1) * deviation);
  const double mean = factor == 0 ? 0.0 : moments(weight).mean;
  const auto& loops = cpu::loops_of(weight.scalar_type());
  const char* from = const_data<char>(weight);
  char* to = cpu::output<char>(out);
  parallel_for(0, weight.numel(), cpu::kGrain,
               [&](int64_t begin, int64_t end) { loops.scale_about(to, from, begin, mean, factor, end - begin); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("perturb", TORCH_BOX(&perturb));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("perturb_sigma_gradient", TORCH_BOX(&perturb_sigma_gradient));
  m.impl("perturb_weight_gradient", TORCH_BOX(&perturb_weight_gradient));
  m.impl("perturbation_gradient", TORCH_BOX(&perturbation_gradient));
  m.impl("weight_scale", TORCH_BOX(&weight_scale));
  m.impl("weight_scale_gradient", TORCH_BOX(&weight_scale_gradient));
}
