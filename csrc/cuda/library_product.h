// Products by torch's own GEMM (cuBLAS; the CPU's in the emulator), called through the dispatcher.
#pragma once
#include <array>

#include "common/linear_shape.h"

namespace quaver::gpu {

// x [.., K] w [N, K]^T + bias [N].
inline Tensor library_linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(w), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// left [M, N] right [N, K], in `dtype`: that of the operands or, on a GPU, the one that sums are made in.
inline Tensor library_product(const Tensor& left, const Tensor& right, ScalarType dtype) {
  if (left.scalar_type() == dtype) return torch::stable::matmul(left, right);
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(left), from(right), from(dtype)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Whether library_product can make a result of `dtype`.
inline bool library_makes(const Tensor& left, ScalarType dtype) {
#ifdef __CUDACC__
  return left.scalar_type() == dtype || dtype == ScalarType::Float;
#else
  return left.scalar_type() == dtype;
#endif
}

}  // namespace quaver::gpu
