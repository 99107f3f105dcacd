// What perturb.cu does for the other ops of its library.
#pragma once
#include "cuda/noise.cuh"

namespace quaver::gpu {

// A CPU scalar travels by value, as a seed does.
template <class C>
struct Sigma {
  const C* values;  // null: `value`
  C value;
  SigmaShape::Kind kind;
  int64_t member_stride;
};

template <class C>
Sigma<C> sigma_of(const Tensor& sigma, const SigmaShape& shape, const Tensor& like) {
  if (sigma.dim() == 0 && sigma.is_cpu()) return {nullptr, *const_data<C>(sigma), shape.kind, 0};
  check_same_device(sigma, like);
  return {input<C>(sigma), C(0), shape.kind, shape.member_stride()};
}

// out = weight + sigma * epsilon for `count` members from `first` on, rounded once to out's dtype: the weight's, or a
// 16-bit one beside float32. The weight and sigma are contiguous; `out` may be the weight.
void perturb_members(Tensor& out, const Tensor& weight, const Tensor& sigma, const Tensor& seed, const Placement& place,
                     int64_t stream, int64_t domain, int64_t first, int64_t count);

// out[s, v] = the sum of partial[p, v, 0 .. terms - 1] over `summed` members p from s on; `size` values v, float64.
void sum_partials(Tensor& out, const Tensor& partial, int64_t size, int64_t terms, int64_t summed);

}  // namespace quaver::gpu
