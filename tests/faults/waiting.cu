// Faults of threads that wait for each other. Each "FAULT: name" marks the line that a report must name.
#include "run.h"

namespace {

enum WaitingFault {
  kNone,
  kDivergentBarrier,
  kEarlyExit,
  kBarrierDeadlock,
  kShuffleDeadlock,
  kExitedLane,
  kInactiveLane,
  kNotInOwnMask,
  kMasksDiffer,
};

// out[i] = number of threads of the block + the lane's neighbour's number.
__global__ void waiting(int* out, int fault) {
  const int thread = int(threadIdx.x), lane = thread % warpSize;
  int neighbour = 0;
  if (fault == kEarlyExit && thread >= 32) return;
  if (fault == kExitedLane && lane == 9) return;
  if (fault == kDivergentBarrier) {
    if (thread < 32) {
      __syncthreads();
    } else {
      __syncthreads();  // FAULT: divergent_barrier
    }
  }
  if (fault == kBarrierDeadlock && lane < 16) {
    __syncwarp();  // FAULT: barrier_deadlock
  }
  if (fault == kShuffleDeadlock) {
    if (lane < 16) neighbour = __shfl_xor_sync(0xffffffffu, lane, 1);  // FAULT: shuffle_deadlock
    if (lane >= 16) neighbour = __shfl_xor_sync(0xffffffffu, lane, 1);
  } else if (fault == kInactiveLane) {
    if (lane < 16) neighbour = __shfl_xor_sync(0x0000ffffu, lane, 16);  // FAULT: inactive_lane
  } else if (fault == kNotInOwnMask) {
    neighbour = __shfl_xor_sync(0x0000ffffu, lane, 1);  // FAULT: not_in_own_mask
  } else if (fault == kMasksDiffer) {
    const unsigned mask = lane < 16 ? 0xffffffffu : 0xfffffffeu;
    neighbour = __shfl_xor_sync(mask, lane, 1);  // FAULT: masks_differ
  } else {
    neighbour = __shfl_xor_sync(0xffffffffu, lane, 1);  // FAULT: exited_lane
  }
  const int count = __syncthreads_count(1);  // FAULT: early_exit
  out[blockIdx.x * blockDim.x + threadIdx.x] = count + neighbour;
}

__global__ void nothing() {}

}  // namespace

QUAVER_TEST const char* faults_waiting(int* out, int blocks, int threads, int fault) {
  return message_of(
      [&] { quaver::gpu::launch(waiting, dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, nullptr, out, fault); });
}

QUAVER_TEST const char* faults_launch(unsigned grid_x, unsigned grid_y, unsigned block_x, unsigned block_z,
                                      size_t shared_bytes) {
  return message_of(
      [&] { quaver::gpu::launch(nothing, dim3(grid_x, grid_y), dim3(block_x, 1, block_z), shared_bytes, nullptr); });
}
