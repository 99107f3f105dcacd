// torch.ops.quaver.perturbed_linear and its gradients on CUDA. Schemas: kernels/perturbed_linear/op.py.
#include "common/integers.h"
#include "common/linear_shape.h"
#include "cuda/few_rows.cuh"
#include "cuda/gemm.cuh"
#include "cuda/library_product.h"
#include "cuda/linear_gradient.cuh"
#include "cuda/linear_weights.h"

namespace {

using namespace quaver;
using gpu::Biases;
using gpu::Weights;
using torch::stable::new_empty;

// Blocks that fill any GPU: a depth is split among more of them where there are fewer.
constexpr int64_t kEnoughBlocks = 264;
// Blocks of few rows that make the noise of their weights again: it costs less than to store it. See tuning.py.
constexpr int64_t kRemade = 1, kRemadeSigns = 4;

template <class T>
gpu::Operand<T> operand(const Rows& x) {
  return {gpu::input<T>(x.tensor), x.stride, x.member_stride, x.rows, x.columns};
}
template <class T>
gpu::Operand<T> by_depth(gpu::Operand<T> from) {
  std::swap(from.rows, from.depth);
  return from;
}

// ---- products ------------------------------------------------------------------------------------------------------
template <bool kAByDepth, bool kBByDepth, class T>
void gemm(const gpu::GemmResult<T>& result, const gpu::Operand<T>& a, const gpu::Operand<T>& b, int64_t members,
          int64_t summed, const Tensor& like) {
  const auto run = [&](auto shape) {
    using S = decltype(shape);
    using Buffers = typename gpu::Gemm<T, S, kAByDepth, kBByDepth>::Buffers;
    const dim3 grid(unsigned(ceil_div(a.rows, S::kRows)), unsigned(ceil_div(b.rows, S::kColumns)), unsigned(members));
    gpu::launch(gpu::gemm_kernel<T, S, kAByDepth, kBByDepth>, grid, dim3(gpu::kGemmThreads), sizeof(Buffers),
                gpu::current_stream(like), result, a, b, summed);
  };
  if constexpr (sizeof(T) == 2) {
    using Large = gpu::LargeTile;
    const int64_t tiles = ceil_div(a.rows, Large::kRows) * ceil_div(b.rows, Large::kColumns) * members;
    if (tiles >= kEnoughBlocks / 2) return run(Large{});
  }
  run(gpu::SmallTile{});
}

// Whether whole octets of weights begin at multiples of 16 bytes and of 8 elements of the stream.
bool has_octets(const Weights& weights) {
  const auto aligned = [](const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0; };
  const Placement& place = weights.place;
  return place.columns % gpu::kOctet == 0 && place.row_length % gpu::kOctet == 0 && place.first % gpu::kOctet == 0 &&
         aligned(weights.weight) && (weights.shape.kind != SigmaShape::kElement || aligned(weights.sigma));
}

struct FewLaunch {
  dim3 grid;
  int64_t splits;

  // `steps`: of the depth, for all warps of all blocks of a column.
  FewLaunch(int64_t rows, int64_t rows_of_block, int64_t columns, int64_t columns_of_block, int64_t steps,
            int64_t members) {
    const int64_t x = ceil_div(rows, rows_of_block) * ceil_div(members, gpu::kTogether);
    const int64_t y = ceil_div(columns, columns_of_block);
    const int64_t wanted = ceil_div(kEnoughBlocks, std::max<int64_t>(1, x * y));
    splits = std::clamp<int64_t>(steps / (2 * gpu::kFewWarps), 1, wanted);
    grid = dim3(unsigned(x), unsigned(y), unsigned(splits));
  }
};

// Calls body(V{}, Noise{}): V of the weight, T or float.
template <class T, class Body>
void dispatch_weights(const Weights& weights, Body&& body) {
  gpu::dispatch_noise(weights.domain, [&](auto noise) {
    weights.weight.scalar_type() == ScalarType::Float ? body(float{}, noise) : body(T{}, noise);
  });
}

template <class V>
gpu::FewWeights<V> few_weights(const Weights& weights) {
  return {gpu::input<V>(weights.weight), gpu::sigma_of<float>(weights.sigma, weights.shape, weights.weight),
          weights.seeds(), weights.place, weights.population};
}

template <class T>
void sum_splits(gpu::FewResult<T> result, const Tensor& partial, int64_t splits, int64_t members) {
  result.partial = const_cast<float*>(gpu::input<float>(partial));
  const int64_t size = members * result.rows * result.columns;
  gpu::launch(gpu::sum_splits_kernel<T>, dim3(unsigned(std::min<int64_t>(ceil_div(size, gpu::kThreads), 1 << 16))),
              dim3(gpu::kThreads), 0, gpu::current_stream(partial), result, splits, members);
}

// ---- x W'^T --------------------------------------------------------------------------------------------------------
template <class T>
void few_rows(Tensor& out, const gpu::Operand<T>& x, const Weights& weights, const Biases& biases) {
  constexpr int64_t kColumns = gpu::kForwardColumns;
  const FewLaunch place(x.rows, gpu::kForwardRows, weights.place.rows, kColumns, ceil_div(x.depth, gpu::kForwardDepth),
                        weights.population);
  gpu::FewResult<T> result = {gpu::output<T>(out),  nullptr, biases.data<T>(),
                              biases.member_stride, x.rows,  weights.place.rows};
  Tensor partial = new_empty(out, {place.splits > 1 ? place.splits * out.numel() : 0}, ScalarType::Float);
  if (place.splits > 1) result.partial = gpu::output<float>(partial);
  dispatch_weights<T>(weights, [&](auto element, auto noise) {
    using V = decltype(element);
    gpu::launch(gpu::few_rows_kernel<T, V, decltype(noise)>, place.grid, dim3(gpu::kFewThreads), 0,
                gpu::current_stream(out), result, x.data, x.stride, x.member_stride, few_weights<V>(weights));
  });
  if (place.splits > 1) sum_splits(result, partial, place.splits, weights.population);
}

template <class C>
void dot_rows(Tensor& out, const gpu::Operand<C>& x, const Weights& weights, const Biases& biases) {
  gpu::dispatch_noise(weights.domain, [&](auto noise) {
    const int64_t warps = weights.place.rows * weights.population;
    gpu::launch(gpu::dot_rows_kernel<C, decltype(noise)>, dim3(unsigned(ceil_div(warps, gpu::kThreads / 32))),
                dim3(gpu::kThreads), 0, gpu::current_stream(out), gpu::output<C>(out), x.data, x.stride,
                x.member_stride, x.rows, biases.data<C>(), biases.member_stride, gpu::input<C>(weights.weight),
                gpu::sigma_of<C>(weights.sigma, weights.shape, weights.weight), weights.seeds(), weights.place,
                weights.population);
  });
}

template <class T>
void many_rows(Tensor& out, gpu::Operand<T> x, const Weights& weights, const Biases& biases) {
  gpu::GemmResult<T> result = {
      {gpu::output<T>(out), false}, x.rows * weights.place.rows, biases.data<T>(), biases.member_stride, false};
  for (int64_t first = 0, count; first < weights.population; first += count) {
    count = std::min(weights.turn(), weights.population - first);
    const Tensor perturbed = weights.perturbed(out, first, count);
    const gpu::Operand<T> b(gpu::input<T>(perturbed), weights.place.columns, weights.place.size(), weights.place.rows,
                            weights.place.columns);
    gemm<false, false>(result, x, b, count, 1, out);
    x.data += count * x.member_stride;
    result.out.data = static_cast<T*>(result.out.data) + count * result.member_stride;
    if (result.bias) result.bias += count * result.bias_stride;
  }
}

Tensor perturbed_linear(const Tensor& x_, const Tensor& weight, OptionalTensor bias, const Tensor& sigma,
                        OptionalTensor bias_sigma, const Tensor& seed, bool member_inputs, int64_t stream,
                        int64_t domain, int64_t row_offset, int64_t column_offset, int64_t row_length) {
  const gpu::DeviceGuard guard(x_.get_device_index());
  const Rows x(x_, member_inputs);
  STD_TORCH_CHECK(x.columns == weight.size(1), "quaver: x does not fit the weight");
  std::vector<int64_t> sizes;
  if (is_population(seed)) sizes.push_back(seed.size(0));
  Tensor out = new_empty(x_, with_last(x_, member_inputs ? 1 : 0, weight.size(0), sizes));
  const Weights weights(weight, sigma, seed, x_, stream, domain, row_offset, column_offset, row_length);
  const Biases biases(bias, bias_sigma, x_, seed, stream, domain, row_offset);
  if (out.numel() == 0) return out;
  dispatch_floating(x_.scalar_type(), "perturbed_linear", [&](auto element) {
    using T = decltype(element);
    const gpu::Operand<T> rows = operand<T>(x);
    if constexpr (sizeof(T) == 2) {
      const int64_t most = gpu::kForwardRows * (weights.of_signs() ? kRemadeSigns : kRemade);
      if (x.rows <= most && rows.packed && has_octets(weights)) return few_rows(out, rows, weights, biases);
    } else {
      if (x.rows <= gpu::kDotRows) return dot_rows(out, rows, weights, biases);
    }
    // One member's product is the library's; those of a population, of whatever size, and their biases are ours.
    if (!is_population(seed) && x.columns > 0) {
      out = gpu::library_linear(x_, weights.perturbed_matrix(x_), biases.vector());
    } else {
      many_rows(out, rows, weights, biases);
    }
  });
  return out;
}

// ---- grad W' -------------------------------------------------------------------------------------------------------
template <class T>
void few_rows_input_gradient(Tensor& out, const gpu::Operand<T>& grad, const Weights& weights, bool summed) {
  constexpr int64_t kColumns = gpu::kBackwardColumns;
  const FewLaunch place(grad.rows, gpu::kBackwardRows, weights.place.columns, kColumns,
                        ceil_div(weights.place.rows, gpu::kBackwardDepth), weights.population);
  gpu::FewResult<T> result = {gpu::output<T>(out), nullptr, nullptr, 0, grad.rows, weights.place.columns};
  const int64_t terms = place.splits * (summed ? weights.population : 1);
  Tensor partial = new_empty(out, {terms > 1 ? terms * out.numel() : 0}, ScalarType::Float);
  if (terms > 1) result.partial = gpu::output<float>(partial);
  dispatch_weights<T>(weights, [&](auto element, auto noise) {
    using V = decltype(element);
    gpu::launch(gpu::few_rows_input_gradient_kernel<T, V, decltype(noise)>, place.grid, dim3(gpu::kFewThreads), 0,
                gpu::current_stream(out), result, grad.data, grad.stride, grad.member_stride, few_weights<V>(weights));
  });
  if (terms > 1) sum_splits(result, partial, terms, summed ? 1 : weights.population);
}

template <class T>
void many_rows_input_gradient(Tensor& out, gpu::Operand<T> grad, const Weights& weights, bool summed) {
  using C = compute_t<T>;
  const bool wide = summed && weights.population > weights.turn();
  Tensor sums = out;
  if (wide) sums = new_empty(out, sizes_of(out), compute_dtype(out.scalar_type()));
  void* const data = wide ? static_cast<void*>(gpu::output<C>(sums)) : gpu::output<T>(out);
  gpu::GemmResult<T> result = {{data, wide}, grad.rows * weights.place.columns, nullptr, 0, false};
  for (int64_t first = 0, count; first < weights.population; first += count) {
    count = std::min(weights.turn(), weights.population - first);
    const Tensor perturbed = weights.perturbed(out, first, count);
    const gpu::Operand<T> b(gpu::input<T>(perturbed), weights.place.columns, weights.place.size(),
                            weights.place.columns, weights.place.rows);
    gemm<false, true>(result, grad, b, summed ? 1 : count, summed ? count : 1, out);
    grad.data += count * grad.member_stride;
    if (!summed) result.out.data = static_cast<T*>(result.out.data) + count * result.member_stride;
    result.adds = summed;
  }
  if (wide) torch::stable::copy_(out, sums);
}

Tensor perturbed_linear_input_gradient(const Tensor& grad_, const Tensor& weight, const Tensor& sigma,
                                       const Tensor& seed, bool member_inputs, int64_t stream, int64_t domain,
                                       int64_t row_offset, int64_t column_offset, int64_t row_length) {
  const gpu::DeviceGuard guard(grad_.get_device_index());
  const bool population = is_population(seed), summed = population && !member_inputs;
  const Rows grad(grad_, population);
  STD_TORCH_CHECK(grad.columns == weight.size(0), "quaver: grad does not fit the weight");
  std::vector<int64_t> sizes;
  if (member_inputs) sizes.push_back(seed.size(0));
  Tensor out = new_empty(grad_, with_last(grad_, population ? 1 : 0, weight.size(1), sizes));
  const Weights weights(weight, sigma, seed, grad_, stream, domain, row_offset, column_offset, row_length);
  if (out.numel() == 0) return out;
  if (weights.population == 0) return torch::stable::zero_(out);
  dispatch_floating(grad_.scalar_type(), "perturbed_linear_input_gradient", [&](auto element) {
    using T = decltype(element);
    const gpu::Operand<T> rows = operand<T>(grad);
    if constexpr (sizeof(T) == 2) {
      const int64_t most = gpu::kBackwardRows * (weights.of_signs() ? kRemadeSigns : kRemade);
      if (grad.rows <= most && rows.packed && has_octets(weights)) {
        return few_rows_input_gradient(out, rows, weights, summed);
      }
    }
    if (!population) {
      out = torch::stable::matmul(grad_, weights.perturbed_matrix(grad_));
    } else {
      many_rows_input_gradient(out, rows, weights, summed);
    }
  });
  return out;
}

// ---- grad^T x ------------------------------------------------------------------------------------------------------
template <class T>
void weight_gradient(Tensor* weight_out, Tensor* sigma_out, const Rows& grad_, const Rows& x_, const Weights& weights) {
  using C = compute_t<T>;
  const Placement& place = weights.place;
  const gpu::Operand<T> grad = by_depth(operand<T>(grad_)), x = by_depth(operand<T>(x_));
  gpu::Target<T> target(nullptr, false);
  if (weight_out && weight_out->element_size() == sizeof(T)) {
    target.data = gpu::output<T>(*weight_out);
  } else if (weight_out) {
    target = {gpu::output<C>(*weight_out), true};
  }
  if (!sigma_out) return gemm<true, true>({target, 0, nullptr, 0, false}, grad, x, 1, weights.population, grad_.tensor);

  const SigmaShape& shape = weights.shape;
  using S = gpu::SmallTile;
  const dim3 grid(unsigned(ceil_div(place.columns, S::kColumns)), unsigned(ceil_div(place.rows, S::kRows)));
  const bool elementwise = shape.kind == SigmaShape::kElement;
  gpu::SigmaTarget<C> sigma = {nullptr, shape.member_stride(), nullptr, int64_t(grid.x)};
  Tensor partial =
      new_empty(*sigma_out, {elementwise ? 0 : weights.population * place.rows * sigma.chunks}, ScalarType::Double);
  if (elementwise) {
    sigma.elements = gpu::output<C>(*sigma_out);
  } else {
    sigma.partial = gpu::output<double>(partial);
  }
  gpu::dispatch_noise(weights.domain, [&](auto noise) {
    gpu::launch(gpu::parameter_gradient_kernel<T, decltype(noise)>, grid, dim3(gpu::kGemmThreads),
                gpu::kParameterShared<T>, gpu::current_stream(grad_.tensor), target, sigma, grad, x, weights.seeds(),
                place, weights.population);
  });
  if (elementwise) {
    if (weights.population == 0) torch::stable::zero_(*sigma_out);
  } else if (sigma_out->numel() > 0) {
    gpu::sum_partials(*sigma_out, partial, shape.size, place.rows * sigma.chunks / shape.size,
                      shape.members == 1 ? weights.population : 1);
  }
}

template <class T>
void bias_gradient(Tensor* bias_out, Tensor* sigma_out, const Rows& grad_, const Tensor& seed, int64_t stream,
                   int64_t domain, int64_t row_offset) {
  using C = compute_t<T>;
  const int64_t size = grad_.columns, population = members(seed);
  const int64_t rows_of_chunk = std::max<int64_t>(64, ceil_div(grad_.rows, 1024));
  const int64_t chunks = ceil_div(grad_.rows, rows_of_chunk);
  const gpu::Operand<T> grad = by_depth(operand<T>(grad_));
  const auto stream_ = gpu::current_stream(grad_.tensor);
  Tensor sums = new_empty(grad_.tensor, {population, chunks, size}, ScalarType::Double);
  gpu::launch(gpu::column_sums_kernel<T>,
              dim3(unsigned(ceil_div(size, gpu::kThreads * gpu::kGroup<T>)), unsigned(chunks),
                   unsigned(std::min<int64_t>(population, 65535))),
              dim3(gpu::kThreads), 0, stream_, gpu::output<double>(sums), grad, rows_of_chunk, population);

  const Placement place(&size, 1, 0, row_offset, row_offset + size);
  gpu::Target<T> bias(nullptr, false);
  if (bias_out && bias_out->element_size() == sizeof(T)) {
    bias.data = gpu::output<T>(*bias_out);
  } else if (bias_out) {
    bias = {gpu::output<C>(*bias_out), true};
  }
  gpu::SigmaTarget<C> sigma = {nullptr, 0, nullptr, 1};
  const SigmaShape shape = sigma_out ? SigmaShape(*sigma_out, place, population) : SigmaShape();
  const bool elementwise = shape.kind == SigmaShape::kElement;
  Tensor products = new_empty(sums, {sigma_out && !elementwise ? population * size : 0});
  if (sigma_out && elementwise) {
    sigma.elements = gpu::output<C>(*sigma_out);
    sigma.member_stride = shape.member_stride();
  } else if (sigma_out) {
    sigma.partial = gpu::output<double>(products);
  }
  gpu::dispatch_noise(domain, [&](auto noise) {
    const auto layout = gpu::layout_of(place, 4);
    gpu::launch(gpu::bias_gradient_kernel<T, decltype(noise)>, layout.grid, layout.block, 0, stream_, bias, sigma,
                gpu::input<double>(sums), chunks, gpu::seeds_of(seed, grad_.tensor, stream, domain + 256), place,
                population);
  });
  if (sigma_out && !elementwise && sigma_out->numel() > 0) {
    gpu::sum_partials(*sigma_out, products, 1, size, shape.members == 1 ? population : 1);
  }
}

// The gradients of weight, sigma, bias and bias_sigma; [0] of those that are not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> perturbed_linear_parameter_gradient(
    const Tensor& grad_, const Tensor& x_, const Tensor& weight, OptionalTensor bias, const Tensor& sigma,
    OptionalTensor bias_sigma, const Tensor& seed, bool need_weight, bool need_sigma, bool need_bias,
    bool need_bias_sigma, bool member_inputs, int64_t stream, int64_t domain, int64_t row_offset, int64_t column_offset,
    int64_t row_length) {
  const gpu::DeviceGuard guard(x_.get_device_index());
  const Rows grad(grad_, is_population(seed)), x(x_, member_inputs);
  STD_TORCH_CHECK(grad.rows == x.rows && grad.columns == weight.size(0) && x.columns == weight.size(1),
                  "quaver: grad and x do not fit the weight");
  STD_TORCH_CHECK(grad_.scalar_type() == x_.scalar_type(), "quaver: grad and x differ in dtype");
  gpu::check_same_device(grad_, x_);
  const auto like = [&](const Tensor& tensor, bool needed) {
    return new_empty(x_, needed ? sizes_of(tensor) : std::vector<int64_t>{0}, tensor.scalar_type());
  };
  Tensor of_weight = like(weight, need_weight), of_sigma = like(sigma, need_sigma);
  Tensor of_bias = like(need_bias ? *bias : weight, need_bias);
  Tensor of_bias_sigma = like(need_bias_sigma ? *bias_sigma : sigma, need_bias_sigma);
  dispatch_floating(x_.scalar_type(), "perturbed_linear_parameter_gradient", [&](auto element) {
    using T = decltype(element);
    const bool flat = (!is_population(seed) || member_inputs) && grad.columns > 0 && x.columns > 0;
    if (need_weight && !need_sigma && flat && gpu::library_makes(x_, weight.scalar_type())) {
      const auto matrix = [](const Tensor& of, int64_t columns) {
        return torch::stable::reshape(of, std::vector<int64_t>{columns ? of.numel() / columns : 0, columns});
      };
      const Tensor left = torch::stable::transpose(matrix(grad_, grad.columns), 0, 1);
      of_weight = gpu::library_product(left, matrix(x_, x.columns), weight.scalar_type());
    } else if (need_weight || need_sigma) {
      const Weights weights(weight, sigma, seed, x_, stream, domain, row_offset, column_offset, row_length);
      weight_gradient<T>(need_weight ? &of_weight : nullptr, need_sigma ? &of_sigma : nullptr, grad, x, weights);
    }
    if (need_bias || need_bias_sigma) {
      bias_gradient<T>(need_bias ? &of_bias : nullptr, need_bias_sigma ? &of_bias_sigma : nullptr, grad, seed, stream,
                       domain, row_offset);
    }
  });
  return {of_weight, of_sigma, of_bias, of_bias_sigma};
}

}  // namespace

QUAVER_GPU_LIBRARY(m) {
  m.impl("perturbed_linear", TORCH_BOX(&perturbed_linear));
  m.impl("perturbed_linear_input_gradient", TORCH_BOX(&perturbed_linear_input_gradient));
  m.impl("perturbed_linear_parameter_gradient", TORCH_BOX(&perturbed_linear_parameter_gradient));
}
