// An op as the real ones are written, to test cuda/gpu_tensor.h. Each "FAULT: name" marks the line a report must name.
#include <torch/csrc/stable/ops.h>

#include "cuda/gpu_tensor.h"

namespace {

using namespace quaver;
using torch::stable::Tensor;

enum CopyFault { kNone, kGap, kInputWrite, kUninitialised };

// torch has another type for these bits, as it has for our bfloat16.
struct Bits16 {
  uint16_t bits;
};

template <class T>
__global__ void copy_rows(T* out, const T* x, int64_t columns, int64_t row_stride, int64_t fault) {
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) {
    if (fault == kUninitialised) out[row * columns] = out[row * columns + i];  // FAULT: uninitialised
    out[row * columns + i] = x[row * row_stride + i];
  }
  if (fault == kGap && threadIdx.x == 0) out[row * columns] = x[row * row_stride + columns];  // FAULT: gap
  if (fault == kInputWrite && threadIdx.x == 0)
    const_cast<T*>(x)[row * row_stride] = out[columns];  // FAULT: input_write
}

__global__ void double_in_place(float* x, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) x[i] += x[i];
}

constexpr int kThreads = 64;

template <class T>
void copy_as(Tensor& out, const Tensor& x, int64_t fault) {
  gpu::launch(copy_rows<T>, dim3(unsigned(x.size(0))), dim3(kThreads), 0, gpu::current_stream(x), gpu::output<T>(out),
              gpu::input<T>(x), x.size(1), x.stride(0), fault);
}

Tensor copy(const Tensor& x, int64_t fault) {
  const gpu::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const auto run = x.element_size() == 2 ? copy_as<Bits16> : copy_as<float>;
  run(out, x, fault);
  return out;
}

void twice_(Tensor& x) {
  const gpu::DeviceGuard guard(x.get_device_index());
  gpu::launch(double_in_place, dim3(unsigned((x.numel() + kThreads - 1) / kThreads)), dim3(kThreads), 0,
              gpu::current_stream(x), gpu::updated<float>(x), x.numel());
}

}  // namespace

QUAVER_GPU_LIBRARY(m) {
  m.impl("faults_copy", TORCH_BOX(&copy));
  m.impl("faults_twice_", TORCH_BOX(&twice_));
}
