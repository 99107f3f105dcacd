// torch.ops.quaver.perturb and its family on CUDA. Schemas: kernels/perturb/op.py.
#include "cuda/perturb.cuh"

#include "cuda/moments.cuh"
#include "cuda/reduce.cuh"

using namespace quaver;
using torch::stable::contiguous;
using torch::stable::new_empty;

void gpu::perturb_members(Tensor& out, const Tensor& weight, const Tensor& sigma, const Tensor& seed,
                          const Placement& whole, int64_t stream, int64_t domain, int64_t first, int64_t count) {
  STD_TORCH_CHECK(sigma.scalar_type() == compute_dtype(weight.scalar_type()), "quaver: sigma has the wrong dtype");
  const SigmaShape shape(sigma, whole, members(seed));
  const gpu::Seeds seeds = gpu::seeds_of(seed, weight, stream, domain);
  const Placement place = gpu::placement_for(shape, whole);
  if (out.scalar_type() == weight.scalar_type()) {
    dispatch_floating(weight.scalar_type(), "perturb", [&](auto element) {
      using T = decltype(element);
      gpu::launch_perturb<T, T>(out, weight, sigma, shape, seeds, place, first, count);
    });
    return;
  }
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && out.element_size() == 2,
                  "quaver: weight has the wrong dtype");
  if (out.scalar_type() == ScalarType::BFloat16) {
    gpu::launch_perturb<bfloat16, float>(out, weight, sigma, shape, seeds, place, first, count);
  } else {
    gpu::launch_perturb<float16, float>(out, weight, sigma, shape, seeds, place, first, count);
  }
}

namespace {

void perturb_into(Tensor& out, const Tensor& weight, const Tensor& sigma, const Tensor& seed, const Placement& place,
                  int64_t stream, int64_t domain) {
  gpu::perturb_members(out, weight, contiguous(sigma), seed, place, stream, domain, 0, members(seed));
}

Tensor perturb(const Tensor& weight_, const Tensor& sigma, const Tensor& seed, int64_t stream, int64_t domain,
               int64_t row_offset, int64_t column_offset, int64_t row_length) {
  const gpu::DeviceGuard guard(weight_.get_device_index());
  const Tensor weight = contiguous(weight_);
  Tensor out = new_empty(weight, with_members(seed, weight));
  perturb_into(out, weight, sigma, seed, {weight, 0, row_offset, column_offset, row_length}, stream, domain);
  return out;
}

void perturb_(Tensor& weight, const Tensor& sigma, const Tensor& seed, int64_t stream, int64_t domain,
              int64_t row_offset, int64_t column_offset, int64_t row_length) {
  const gpu::DeviceGuard guard(weight.get_device_index());
  STD_TORCH_CHECK(members(seed) == 1, "quaver: perturb_ has room for one member");
  Tensor dense = contiguous(weight);
  perturb_into(dense, dense, sigma, seed, {weight, 0, row_offset, column_offset, row_length}, stream, domain);
  if (dense.data_ptr() != weight.data_ptr()) torch::stable::copy_(weight, dense);
}

// ---- the gradient in sigma -----------------------------------------------------------------------------------------
// One value an element: out[s] is the sum of grad_p epsilon_p over `summed` members p from s on, in order.
template <class T, class Noise>
__global__ void __launch_bounds__(gpu::kThreads)
    elementwise_gradient_kernel(compute_t<T>* out, const T* grad, int64_t grad_stride, gpu::Seeds seeds,
                                Placement place, int64_t values, int64_t summed) {
  using C = compute_t<T>;
  constexpr int G = gpu::kGroup<T>;
  for (int64_t s = blockIdx.z; s < values; s += gridDim.z) {
    C* to = out + s * place.rows * place.columns;
    gpu::for_rows(place, [&](const gpu::Row& row) {
      bool packed = row.is_packed<G>(grad + s * grad_stride, to);
      if (summed > 1) packed = packed && grad_stride * int64_t(sizeof(T)) % 16 == 0;
      gpu::for_parts<G>(row, packed, [&](const gpu::Part& part) {
        C sum[G] = {};
        for (int64_t member = s; member < s + summed; member++) {
          T of_member[G];
          gpu::load(grad + member * grad_stride, part, of_member);
          float noise[G];
          Noise::make(seeds[member], part.group, noise);
          for (int i = 0; i < G; i++) sum[i] = add(sum[i], multiply(widen(of_member[i]), C(noise[i])));
        }
        gpu::store(to, part, sum);
      });
    });
  }
}

// How a sum over the rows of every member is cut: a warp sums one chunk of a row, so that what is added to what depends
// on the shapes alone.
struct Chunks {
  int64_t groups;   // of a chunk
  int64_t per_row;  // chunks

  Chunks(const Placement& place, int group) {
    // Four groups a lane, more where a row would have more than 4096 chunks.
    const int64_t all = std::max<int64_t>(1, gpu::most_groups(place, group));
    const int64_t turns = std::max<int64_t>(4, (all + 4096 * gpu::kWarp - 1) / (4096 * gpu::kWarp));
    groups = turns * gpu::kWarp;
    per_row = (all + groups - 1) / groups;
  }
};

// partial[(member * rows + row) * per_row + chunk] = the sum of grad epsilon over a chunk.
template <class T, class Noise>
__global__ void __launch_bounds__(gpu::kThreads)
    dot_kernel(double* partial, const T* grad, int64_t grad_stride, gpu::Seeds seeds, Placement place, Chunks chunks,
               int64_t members) {
  using C = compute_t<T>;
  constexpr int G = gpu::kGroup<T>;
  const int lane = int(threadIdx.x) % gpu::kWarp;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x,
                warps = int64_t(gridDim.x) * blockDim.x / gpu::kWarp;
  for (int64_t task = thread / gpu::kWarp; task < members * place.rows * chunks.per_row; task += warps) {
    const int64_t line = task / chunks.per_row, member = line / place.rows, row = line % place.rows;
    const gpu::Row run(place, row);
    const T* of_member = grad + member * grad_stride;
    const bool packed = run.is_packed<G>(of_member);
    const int64_t first = task % chunks.per_row * chunks.groups;
    const int64_t last = min(first + chunks.groups, run.groups<G>());
    const Source source = seeds[member];
    double sum = 0;
    for (int64_t g = first + lane; g < last; g += gpu::kWarp) {
      const gpu::Part part = gpu::part_of<G>(run, packed, g);
      T values[G];
      gpu::load(of_member, part, values);
      float noise[G];
      Noise::make(source, part.group, noise);
      C products = 0;
      for (int i = 0; i < G; i++) products = add(products, multiply(widen(values[i]), C(noise[i])));
      sum = add(sum, double(products));
    }
    sum = gpu::warp_sum(sum);
    if (lane == 0) partial[task] = sum;
  }
}

}  // namespace

void gpu::sum_partials(Tensor& out, const Tensor& partial, int64_t size, int64_t terms, int64_t summed) {
  const auto run = [&](auto element) {
    using C = decltype(element);
    gpu::launch(gpu::sum_partials_kernel<C>, dim3(unsigned(out.numel())),
                dim3(summed * terms > 64 ? gpu::kCombine : gpu::kWarp), 0, gpu::current_stream(out),
                gpu::output<C>(out), gpu::input<double>(partial), size, terms, summed);
  };
  out.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

namespace {

template <class T, class Noise>
void elementwise_gradient(Tensor& out, const SigmaShape& shape, const Gradient& grad, const gpu::Seeds& seeds,
                          const Placement& place, int64_t summed) {
  const auto layout = gpu::layout_of(place, gpu::kGroup<T>, shape.members);
  gpu::launch(elementwise_gradient_kernel<T, Noise>, layout.grid, layout.block, 0, gpu::current_stream(out),
              gpu::output<compute_t<T>>(out), gpu::input<T>(grad.tensor), grad.member_stride, seeds, place,
              shape.members, summed);
}

template <class T, class Noise>
void summed_gradient(Tensor& out, const SigmaShape& shape, const Gradient& grad, const gpu::Seeds& seeds,
                     const Placement& place, int64_t count, int64_t summed) {
  const Chunks chunks(place, gpu::kGroup<T>);
  const int64_t tasks = count * place.rows * chunks.per_row, warps = gpu::kThreads / gpu::kWarp;
  Tensor partial = new_empty(out, {tasks}, ScalarType::Double);
  gpu::launch(dot_kernel<T, Noise>, dim3(unsigned(std::min<int64_t>((tasks + warps - 1) / warps, 1 << 16))),
              dim3(gpu::kThreads), 0, gpu::current_stream(out), gpu::output<double>(partial),
              gpu::input<T>(grad.tensor), grad.member_stride, seeds, place, chunks, count);
  gpu::sum_partials(out, partial, shape.size, place.rows * chunks.per_row / shape.size, summed);
}

Tensor perturb_sigma_gradient(const Tensor& grad_, const Tensor& sigma, const Tensor& seed, int64_t stream,
                              int64_t domain, int64_t row_offset, int64_t column_offset, int64_t row_length) {
  STD_TORCH_CHECK(sigma.scalar_type() == compute_dtype(grad_.scalar_type()), "quaver: sigma has the wrong dtype");
  const gpu::DeviceGuard guard(grad_.get_device_index());
  const Gradient grad(grad_, seed);
  const Placement whole(grad_, is_population(seed) ? 1 : 0, row_offset, column_offset, row_length);
  const SigmaShape shape(sigma, whole, members(seed));
  const Placement place = gpu::placement_for(shape, whole);
  const gpu::Seeds seeds = gpu::seeds_of(seed, grad_, stream, domain);
  const int64_t count = members(seed), summed = shape.members == 1 ? count : 1;  // members that share one sigma
  const auto sizes = sigma.sizes();
  Tensor out = new_empty(grad_, sizes, sigma.scalar_type());
  dispatch_floating(grad_.scalar_type(), "perturb_sigma_gradient", [&](auto element) {
    using T = decltype(element);
    gpu::dispatch_noise(domain, [&](auto noise) {
      using Noise = decltype(noise);
      if (shape.kind == SigmaShape::kElement) {
        elementwise_gradient<T, Noise>(out, shape, grad, seeds, place, summed);
      } else if (out.numel() > 0) {
        summed_gradient<T, Noise>(out, shape, grad, seeds, place, count, summed);
      }
    });
  });
  return out;
}

// ---- sums over members ---------------------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(gpu::kThreads)
    sum_members_kernel(T* out, const T* grad, int64_t members, Placement place) {
  using C = compute_t<T>;
  constexpr int G = gpu::kGroup<T>;
  gpu::for_rows(place, [&](const gpu::Row& row) {
    const bool packed = row.is_packed<G>(grad, out) && (members == 1 || place.columns * int64_t(sizeof(T)) % 16 == 0);
    gpu::for_parts<G>(row, packed, [&](const gpu::Part& part) {
      C sum[G] = {};
      T values[G];
      for (int64_t member = 0; member < members; member++) {
        gpu::load(grad + member * place.columns, part, values);
        for (int i = 0; i < G; i++) sum[i] += widen(values[i]);
      }
      for (int i = 0; i < G; i++) values[i] = narrow<T>(sum[i]);
      gpu::store(out, part, values);
    });
  });
}

// The sum of grad [P, ..] over its members, in order.
Tensor perturb_weight_gradient(const Tensor& grad_) {
  const gpu::DeviceGuard guard(grad_.get_device_index());
  const Tensor grad = contiguous(grad_);
  const auto sizes = grad.sizes();
  Tensor out = new_empty(grad, std::vector<int64_t>(sizes.begin() + 1, sizes.end()));
  const Placement place = gpu::one_run(out.numel(), 0);
  dispatch_floating(grad.scalar_type(), "perturb_weight_gradient", [&](auto element) {
    using T = decltype(element);
    const auto layout = gpu::layout_of(place, gpu::kGroup<T>);
    gpu::launch(sum_members_kernel<T>, layout.grid, layout.block, 0, gpu::current_stream(grad), gpu::output<T>(out),
                gpu::input<T>(grad), grad.size(0), place);
  });
  return out;
}

// Elements a thread sums. Nothing is read for each, so that making a block of 128 signs counts: with 16 a thread it is
// made 8 times, and the loop over members has 9.8 instructions an element (sm_90), against 26 with 4 a thread.
template <class C, class Noise>
constexpr int kSummed = std::is_same_v<Noise, gpu::Signs> ? 16 : gpu::kGroup<C>;

template <class C, class Noise>
__global__ void __launch_bounds__(gpu::kThreads)
    perturbation_gradient_kernel(C* out, const C* coefficients, gpu::Seeds seeds, Placement place, int64_t members) {
  constexpr int G = kSummed<C, Noise>;
  gpu::for_rows(place, [&](const gpu::Row& row) {
    gpu::for_parts<G>(row, row.is_packed<G>(out), [&](const gpu::Part& part) {
      C sum[G] = {};
      for (int64_t member = 0; member < members; member++) {
        float noise[G];
        Noise::make(seeds[member], part.group, noise);
        for (int i = 0; i < G; i++) sum[i] = add(sum[i], multiply(coefficients[member], C(noise[i])));
      }
      gpu::store(out, part, sum);
    });
  });
}

Tensor perturbation_gradient(const Tensor& coefficients_, const Tensor& seeds_, std::vector<int64_t> shape,
                             int64_t stream, int64_t domain, int64_t row_offset, int64_t column_offset,
                             int64_t row_length) {
  const gpu::DeviceGuard guard(coefficients_.get_device_index());
  const Tensor coefficients = contiguous(coefficients_);
  STD_TORCH_CHECK(coefficients.numel() == members(seeds_), "quaver: expected a coefficient for every seed");
  Tensor out = new_empty(coefficients, shape);
  const gpu::Seeds seeds = gpu::seeds_of(seeds_, coefficients, stream, domain);
  const Placement place = gpu::as_one_run({shape.data(), int64_t(shape.size()), row_offset, column_offset, row_length});
  const auto run = [&](auto element) {
    using C = decltype(element);
    gpu::dispatch_noise(domain, [&](auto noise) {
      const auto layout = gpu::layout_of(place, kSummed<C, decltype(noise)>);
      gpu::launch(perturbation_gradient_kernel<C, decltype(noise)>, layout.grid, layout.block, 0,
                  gpu::current_stream(coefficients), gpu::output<C>(out), gpu::input<C>(coefficients), seeds, place,
                  members(seeds_));
    });
  };
  coefficients.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return out;
}

// ---- the scale of a weight -----------------------------------------------------------------------------------------
template <class C>
__global__ void __launch_bounds__(gpu::kCombine) scale_kernel(C* scale, const double* partial, int64_t n) {
  const gpu::Moments all = gpu::combine(partial, n);
  if (threadIdx.x == 0) *scale = n < 2 ? C(0) : C(sqrt(all.squares / double(n - 1)));
}

Tensor weight_scale(const Tensor& weight_) {
  const gpu::DeviceGuard guard(weight_.get_device_index());
  const Tensor weight = contiguous(weight_);
  Tensor out = new_empty(weight, {}, compute_dtype(weight.scalar_type()));
  const Tensor partial = gpu::partial_moments(weight);
  const auto run = [&](auto element) {
    using C = decltype(element);
    gpu::launch(scale_kernel<C>, dim3(1), dim3(gpu::kCombine), 0, gpu::current_stream(weight), gpu::output<C>(out),
                gpu::input<double>(partial), weight.numel());
  };
  out.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return out;
}

// What scale_gradient_kernel takes, {mean, what its rounding has lost, factor}, made once: double divisions are slow on
// many GPUs.
template <class C>
__global__ void __launch_bounds__(gpu::kCombine)
    scale_factor_kernel(C* line, const double* partial, const C* grad, const C* scale, int64_t n) {
  const gpu::Moments all = gpu::combine(partial, n);
  if (threadIdx.x > 0) return;
  const bool flat = n < 2 || *scale == 0;
  line[0] = flat ? C(0) : C(all.mean);
  line[1] = flat ? C(0) : C(all.mean - double(C(all.mean)));
  line[2] = flat ? C(0) : C(double(*grad) / (double(n - 1) * double(*scale)));
}

template <class T>
__global__ void __launch_bounds__(gpu::kThreads)
    scale_gradient_kernel(T* out, const T* weight, const compute_t<T>* line, Placement place) {
  constexpr int G = gpu::kGroup<T>;
  const compute_t<T> mean = line[0], rest = line[1], factor = line[2];
  gpu::for_rows(place, [&](const gpu::Row& row) {
    gpu::for_parts<G>(row, row.is_packed<G>(weight, out), [&](const gpu::Part& part) {
      T values[G];
      gpu::load(weight, part, values);
      for (int i = 0; i < G; i++) values[i] = narrow<T>(((widen(values[i]) - mean) - rest) * factor);
      gpu::store(out, part, values);
    });
  });
}

// grad (w - mean) / ((n - 1) scale), 0 where the scale is 0.
Tensor weight_scale_gradient(const Tensor& grad, const Tensor& weight_, const Tensor& scale) {
  const gpu::DeviceGuard guard(weight_.get_device_index());
  const Tensor weight = contiguous(weight_);
  const ScalarType compute = compute_dtype(weight.scalar_type());
  STD_TORCH_CHECK(grad.scalar_type() == compute && scale.scalar_type() == compute,
                  "quaver: grad and scale have the wrong dtype");
  gpu::check_same_device(grad, weight);
  gpu::check_same_device(scale, weight);
  Tensor out = torch::stable::empty_like(weight), line = new_empty(weight, {3}, compute);
  const Tensor partial = gpu::partial_moments(weight);
  const Placement place = gpu::one_run(weight.numel(), 0);
  dispatch_floating(weight.scalar_type(), "weight_scale_gradient", [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    const auto stream = gpu::current_stream(weight);
    gpu::launch(scale_factor_kernel<C>, dim3(1), dim3(gpu::kCombine), 0, stream, gpu::output<C>(line),
                gpu::input<double>(partial), gpu::input<C>(grad), gpu::input<C>(scale), weight.numel());
    const auto layout = gpu::layout_of(place, gpu::kGroup<T>);
    gpu::launch(scale_gradient_kernel<T>, layout.grid, layout.block, 0, stream, gpu::output<T>(out),
                gpu::input<T>(weight), gpu::input<C>(line), place);
  });
  return out;
}

}  // namespace

QUAVER_GPU_LIBRARY(m) {
  m.impl("perturb", TORCH_BOX(&perturb));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("perturb_sigma_gradient", TORCH_BOX(&perturb_sigma_gradient));
  m.impl("perturb_weight_gradient", TORCH_BOX(&perturb_weight_gradient));
  m.impl("perturbation_gradient", TORCH_BOX(&perturbation_gradient));
  m.impl("weight_scale", TORCH_BOX(&weight_scale));
  m.impl("weight_scale_gradient", TORCH_BOX(&weight_scale_gradient));
}
