// What the ops of perturbed_linear know of the weights, the biases and their noise.
#pragma once
#include "common/linear_shape.h"
#include "cuda/gpu_tensor.h"
#include "cuda/noise.cuh"
#include "cuda/perturb.h"

namespace quaver::gpu {

using torch::stable::contiguous;
using torch::stable::new_empty;

// Perturbed weights of several members exist at a time up to this size; more are made in turns.
#ifdef __CUDACC__
constexpr int64_t kTransientBytes = 256 << 20;
#else
constexpr int64_t kTransientBytes = 8 << 10;  // so that the emulator's small tests take turns
#endif

// What all three ops know of the weights and their noise.
struct Weights {
  Tensor weight, sigma, seed;
  Placement place;
  SigmaShape shape;
  int64_t stream, domain, population;

  Weights(const Tensor& weight_, const Tensor& sigma_, const Tensor& seed, const Tensor& x, int64_t stream,
          int64_t domain, int64_t row_offset, int64_t column_offset, int64_t row_length)
      : weight(contiguous(weight_)),
        sigma(contiguous(sigma_)),
        seed(seed),
        place(weight, 0, row_offset, column_offset, row_length),
        shape(sigma, place, members(seed)),
        stream(stream),
        domain(domain),
        population(members(seed)) {
    const ScalarType wide = compute_dtype(x.scalar_type());
    STD_TORCH_CHECK(weight.dim() == 2, "quaver: weight must be [N, K]");
    STD_TORCH_CHECK(sigma.scalar_type() == wide, "quaver: sigma has the wrong dtype");
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() || (x.element_size() == 2 && weight.scalar_type() == wide),
                    "quaver: weight has the wrong dtype");
    check_same_device(weight, x);
  }

  Seeds seeds() const { return seeds_of(seed, weight, stream, domain); }
  bool of_signs() const { return (domain & 0xff) == kRademacher; }
  // Members whose weights are perturbed at a time.
  int64_t turn() const {
    const int64_t bytes = std::max<int64_t>(1, place.size() * int64_t(weight.element_size()));
    return std::clamp<int64_t>(kTransientBytes / bytes, 1, 65535);
  }
  // [count, N, K] of x's dtype.
  Tensor perturbed(const Tensor& x, int64_t first, int64_t count) const {
    Tensor out = new_empty(x, {count, place.rows, place.columns});
    perturb_members(out, weight, sigma, seed, place, stream, domain, first, count);
    return out;
  }
  // [N, K] of the only member.
  Tensor perturbed_matrix(const Tensor& x) const {
    return torch::stable::view(perturbed(x, 0, 1), std::vector<int64_t>{place.rows, place.columns});
  }
};

// The bias of each member, [P or 1, N] of x's dtype.
struct Biases {
  std::optional<Tensor> values;
  int64_t member_stride = 0;

  Biases(const OptionalTensor& bias_, const OptionalTensor& sigma, const Tensor& x, const Tensor& seed, int64_t stream,
         int64_t domain, int64_t row_offset) {
    if (!bias_) return;
    const Tensor bias = contiguous(*bias_);
    check_same_device(bias, x);
    const int64_t size = bias.numel();
    if (sigma) {
      Tensor out = new_empty(x, {members(seed), size});
      const Placement place(bias, 0, 0, row_offset, row_offset + size);
      perturb_members(out, bias, contiguous(*sigma), seed, place, stream, domain + 256, 0, members(seed));
      values = out;
      member_stride = size;
    } else if (bias.scalar_type() == x.scalar_type()) {
      values = bias;
    } else {
      Tensor out = new_empty(x, {size});
      torch::stable::copy_(out, bias);
      values = out;
    }
  }

  template <class T>
  const T* data() const {
    return values ? input<T>(*values) : nullptr;
  }
  // [N] of the only member.
  OptionalTensor vector() const {
    if (!values) return std::nullopt;
    return torch::stable::view(*values, std::vector<int64_t>{values->numel()});
  }
};

}  // namespace quaver::gpu
