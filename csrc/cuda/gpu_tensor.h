// Host code of the CUDA ops: torch tensors, through the LibTorch Stable ABI only. The emulator builds the same code for
// CPU tensors, under the namespace quaver_emulated, and learns here what each kernel may touch.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "gpu.h"

#ifdef __CUDACC__
#define QUAVER_GPU_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(quaver, CUDA, m)
#else
#include "../emulator/regions.h"
#define QUAVER_GPU_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(quaver_emulated, CPU, m)
#endif

namespace quaver::gpu {

using torch::stable::Tensor;

#ifdef __CUDACC__
using torch::stable::accelerator::DeviceGuard;

inline Stream current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}
#else
// There is one device and one stream.
struct DeviceGuard {
  explicit DeviceGuard(torch::stable::accelerator::DeviceIndex) {}
};

inline Stream current_stream(const Tensor&) { return nullptr; }

inline void register_tensor(const Tensor& tensor, const void* data, emulator::Use use) {
  emulator::register_tensor(data, size_t(tensor.element_size()), tensor.sizes().data(), tensor.strides().data(),
                            tensor.dim(), use);
}
#endif

template <class T>
void check_element(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.element_size() == int64_t(sizeof(T)), "quaver: expected elements of ", sizeof(T),
                  " bytes, got ", tensor.element_size());
}

// The data of a tensor that kernels only read. T may be a 16-bit type of our own, which torch's typed data_ptr refuses.
template <class T>
const T* input(const Tensor& tensor) {
  check_element<T>(tensor);
  const void* const data = tensor.const_data_ptr();
#ifndef __CUDACC__
  register_tensor(tensor, data, emulator::Use::kInput);
#endif
  return static_cast<const T*>(data);
}

// The data of a tensor that was just allocated: kernels write it before they read it.
template <class T>
T* output(Tensor& tensor) {
  check_element<T>(tensor);
  void* const data = tensor.mutable_data_ptr();
#ifndef __CUDACC__
  register_tensor(tensor, data, emulator::Use::kOutput);
#endif
  return static_cast<T*>(data);
}

// The data of a tensor that has contents, which kernels read and write.
template <class T>
T* updated(Tensor& tensor) {
  check_element<T>(tensor);
  void* const data = tensor.mutable_data_ptr();
#ifndef __CUDACC__
  register_tensor(tensor, data, emulator::Use::kUpdated);
#endif
  return static_cast<T*>(data);
}

}  // namespace quaver::gpu
