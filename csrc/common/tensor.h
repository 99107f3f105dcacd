// Host code that the CPU and the CUDA ops share: torch tensors, through the LibTorch Stable ABI only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/dtype.h"

namespace quaver {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f(T{}) with the element type of `dtype`.
template <class F>
void dispatch_floating(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    case ScalarType::Half:
      return f(float16{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float64, float32, bfloat16 or float16");
  }
}

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A seed is 0-dim, or [P] for a population.
inline bool is_population(const Tensor& seed) { return seed.dim() == 1; }
inline int64_t members(const Tensor& seed) { return is_population(seed) ? seed.size(0) : 1; }

// The bytes, whatever T our code calls them: torch checks data_ptr<T> against its own 16-bit types, not ours.
template <class T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace quaver
