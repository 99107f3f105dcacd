// The one header every kernel file includes. nvcc and g++ both take it: g++ finds the emulator where nvcc finds CUDA.
#pragma once
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef __CUDACC__
#include <cuda_runtime.h>
// One declaration for all kernels of a file, whatever the type: aligned for any access, asynchronous copies included.
#define QUAVER_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char quaver_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(quaver_dynamic_shared)
#else
#include "../emulator/device.h"
#define QUAVER_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(::quaver::emulator::dynamic_shared())
#endif

namespace quaver::gpu {

#ifdef __CUDACC__
using Stream = cudaStream_t;

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("quaver: CUDA: ") + cudaGetErrorString(error));
}
#else
using Stream = void*;
#endif

// Starts kernel(arguments...), converted to the kernel's own parameter types, on the stream. An empty grid starts
// nothing.
template <class... K, class... A>
void launch(void (*kernel)(K...), dim3 grid, dim3 block, size_t shared_bytes, [[maybe_unused]] Stream stream,
            A&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<K>(std::forward<A>(arguments))...);
  check(cudaGetLastError());
#else
  emulator::launch(kernel, grid, block, shared_bytes, std::forward<A>(arguments)...);
#endif
}

}  // namespace quaver::gpu
