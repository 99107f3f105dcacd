// The one header every kernel file includes. nvcc and g++ both take it: g++ finds the emulator where nvcc finds CUDA.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/dtype.h"

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

#ifdef __CUDACC__
// ---- instructions that CUDA C++ has no name for --------------------------------------------------------------------
// The emulator's are in ../emulator/tensor_core.h.

__device__ inline uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Starts to copy 16 bytes from global to shared memory, both aligned to 16: the first `bytes` of them, then zeros.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
// The same of 8 bytes, aligned to 8.
__device__ inline void copy_async_8(void* to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
// Makes a group of the copies that this thread has started since the last group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the latest N. What others have copied is there after a barrier.
template <int N>
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix l / 8, 16
// bytes aligned to 16, and gets of matrix i the elements 2 (l % 4) and + 1 of row l / 4, in out[i]. Whole warps only.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices: rows 2 (l % 4) and + 1 of column l / 4.
__device__ inline void load_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a [16, 16], b [16, 8], c [16, 8] of a warp, T bfloat16 or float16. With g = lane / 4 and t = lane % 4 a
// lane has of a the pairs (row, columns) (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); of b those of rows 2t and
// 2t + 8 in column g; of c (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). PTX ISA, mma.m16n8k16.
template <class T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
#endif

}  // namespace quaver::gpu
