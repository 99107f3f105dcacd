// Whole tensors between their dtype and the one that arithmetic runs in.
#pragma once
#include <algorithm>

#include "common/linear_shape.h"
#include "cpu/noise_source.h"

namespace quaver::cpu {

// x in the compute dtype, contiguous.
inline Tensor widened(const Tensor& x_) {
  const Tensor x = torch::stable::contiguous(x_);
  if (x.scalar_type() == compute_dtype(x.scalar_type())) return x;
  Tensor wide = torch::stable::new_empty(x, sizes_of(x), compute_dtype(x.scalar_type()));
  float* to = data<float>(wide);
  const char* from = const_data<char>(x);
  const auto& loops = loops_of(x.scalar_type());
  torch::stable::parallel_for(0, x.numel(), kGrain,
                              [&](int64_t begin, int64_t end) { loops.widen(to + begin, from, begin, end - begin); });
  return wide;
}

// `wide`, contiguous and of the compute dtype, as a tensor of `dtype`.
inline Tensor narrowed(const Tensor& wide, ScalarType dtype) {
  if (wide.scalar_type() == dtype) return wide;
  Tensor out = torch::stable::new_empty(wide, sizes_of(wide), dtype);
  char* to = data<char>(out);
  const float* from = const_data<float>(wide);
  const auto& loops = loops_of(dtype);
  torch::stable::parallel_for(0, out.numel(), kGrain,
                              [&](int64_t begin, int64_t end) { loops.store(to, begin, from + begin, end - begin); });
  return out;
}

}  // namespace quaver::cpu
