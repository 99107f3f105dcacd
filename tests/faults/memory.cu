// Faults of memory. Each "FAULT: name" marks the line that a report must name. kNone is correct everywhere.
#include "run.h"

namespace {

enum MemoryFault {
  kNone,
  kReadRace,
  kWriteRace,
  kReuseRace,
  kWarpRace,
  kSharedBounds,
  kGlobalReadBounds,
  kGlobalWriteBounds,
  kMisaligned,
  kSharedUninitialised,
  kStaticUninitialised,
  kGlobalUninitialised,
  kInputWrite,
  kBlockRace,
  kGlobalRace,
  kAtomicRace,
  kForeignStack,
  kHelperBounds,
};

template <class T>
__device__ __forceinline__ T first_after(const T* values, int n) {
  return values[n];  // FAULT: helper
}

// Every block: out[block * blockDim + thread] = sum of the block's part of x, minus the thread's own element; and
// *total is the sum over all blocks. blockDim.x floats of dynamic shared memory.
template <class T>
__global__ void __launch_bounds__(256) sums(const T* __restrict__ x, T* out, T* total, T* slots, int n, int fault) {
  QUAVER_DYNAMIC_SHARED(T, values);
  __shared__ T partial[8];
  __shared__ T sum;
  __shared__ T* foreign;
  const int thread = int(threadIdx.x), threads = int(blockDim.x), lane = thread % warpSize, warp = thread / warpSize;
  const int i = int(blockIdx.x) * threads + thread;
  values[thread] = i < n ? x[i] : T(0);
  if (fault == kGlobalReadBounds) values[thread] = x[i];              // FAULT: global_read_bounds
  if (fault == kHelperBounds) values[thread] = first_after(x, n);     // FAULT: helper_call
  if (fault == kSharedBounds && thread == 7) values[threads] = T(1);  // FAULT: shared_bounds
  if (fault == kWriteRace) values[thread / 2] = T(1);                 // FAULT: write_race
  if (fault != kReadRace) __syncthreads();
  T own = values[threads - 1 - thread];  // FAULT: read_race
  own = values[thread];
  if (fault == kWarpRace) __syncthreads();
  if (fault == kWarpRace && warp == 0) {
    values[lane] = own;
    own = values[lane ^ 1];  // FAULT: warp_race
    __syncwarp();
    values[lane] = own;
    __syncwarp();
    own = values[lane ^ 1];
  }
  T s = own;
#pragma unroll
  for (int offset = warpSize / 2; offset > 0; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
  if (lane == 0) partial[warp] = s;
  __syncthreads();
  if (thread == 0) {
    sum = T(0);
    for (int w = 0; w < threads / warpSize; w++) sum += partial[w];
    if (fault == kStaticUninitialised) sum += partial[7];  // FAULT: static_uninitialised
  }
  if (fault != kReuseRace) __syncthreads();
  if (fault == kReuseRace && thread == 40) partial[0] = T(0);  // FAULT: reuse_race
  __syncthreads();
  if (fault == kSharedUninitialised) {
    QUAVER_DYNAMIC_SHARED(unsigned char, bytes);
    if (thread == 0) sum += T(bytes[threads * sizeof(T) + 3]);  // FAULT: shared_uninitialised
  }
  if (fault == kForeignStack) {
    if (thread == 3) foreign = &own;
    __syncthreads();
    if (thread == 4) sum += *foreign;  // FAULT: foreign_stack
  }
  if (i < n || fault == kGlobalWriteBounds) out[i] = sum - own;  // FAULT: global_write_bounds
  if (fault == kMisaligned && thread == 0) {
    *reinterpret_cast<float4*>(out + 1) = make_float4(own, own, own, own);  // FAULT: misaligned
  }
  if (fault == kGlobalUninitialised && i == 0) out[1] = out[n - 1];  // FAULT: global_uninitialised
  if (fault == kInputWrite && i == 0) const_cast<T*>(x)[0] = T(0);   // FAULT: input_write
  if (fault == kGlobalRace && i == 5) out[4] = T(0);                 // FAULT: global_race
  if (thread == 0) {
    slots[blockIdx.x] = sum;
    if (fault == kBlockRace) {
      *total += sum;  // FAULT: block_race
    } else {
      atomicAdd(total, sum);
    }
    if (fault == kAtomicRace) slots[0] = *total;  // FAULT: atomic_race
  }
}

}  // namespace

QUAVER_TEST const char* faults_sums(const float* x, float* out, float* total, float* slots, int n, int threads,
                                    int fault) {
  // kSharedUninitialised reads beyond what the kernel fills, but inside what it asked for.
  const size_t shared_bytes = size_t(threads) * sizeof(float) + (fault == kSharedUninitialised ? 16 : 0);
  return message_of([&] {
    quaver::gpu::launch(sums<float>, dim3(unsigned((n + threads - 1) / threads)), dim3(unsigned(threads)), shared_bytes,
                        nullptr, x, out, total, slots, n, fault);
  });
}
