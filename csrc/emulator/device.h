// CUDA C++ for g++: what a .cu file finds instead of cuda_runtime.h when the emulator compiles it.
#pragma once
#include "atomics.h"
#include "intrinsics.h"
#include "launch.h"
#include "tensor_core.h"
#include "vector_types.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
// A library's thread-local storage then holds its shared variables and nothing else, which is how the memory checks
// know them. One block runs at a time, all its threads on one thread of the host.
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// Constants to a kernel, which sees one thread only, and so never instrumented; variables to block.cpp. The asm names
// join the two declarations.
#define QUAVER_BUILTIN extern __attribute__((visibility("hidden"))) const
QUAVER_BUILTIN uint3 threadIdx asm("quaver_emulator_thread_index");
QUAVER_BUILTIN uint3 blockIdx asm("quaver_emulator_block_index");
QUAVER_BUILTIN dim3 blockDim asm("quaver_emulator_block_size");
QUAVER_BUILTIN dim3 gridDim asm("quaver_emulator_grid_size");
#undef QUAVER_BUILTIN
constexpr int warpSize = quaver::emulator::kWarp;
