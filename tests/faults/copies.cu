// Faults of asynchronous copies and matrix instructions. Each "FAULT: name" marks the line that a report must name.
#include "run.h"

namespace {

using namespace quaver;

enum CopyFault {
  kNone,
  kNotAwaited,
  kGroupShort,
  kOpenGroup,
  kOwnCopy,
  kOverwritten,
  kNoBarrier,
  kReused,
  kSourceBounds,
  kSourceTail,
  kTargetBounds,
  kSourceMisaligned,
  kHalfMisaligned,
  kHalfBounds,
  kTargetMisaligned,
  kRowMisaligned,
  kRowBounds,
  kRowUninitialised,
  kDivergentLoad,
  kDivergentProduct,
};

constexpr int kWarps = 2, kRows = 16 * kWarps, kColumns = 8, kDepth = 16, kLine = kDepth + 8, kThreads = 32 * kWarps;

struct Buffers {
  bfloat16 a[2][kRows][kLine], b[2][kColumns][kLine], b_by_depth[2][kDepth][kColumns];
};

// c [32, 8] = a b for a [32, depth], b as [8, depth] or, `by_depth`, as [depth, 8]; two buffers, filled a step ahead.
template <bool kByDepth>
__global__ void products(float* c, const bfloat16* a, const bfloat16* b, int depth, int fault) {
  QUAVER_DYNAMIC_SHARED(Buffers, buffers);
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const auto fetch = [&](int step) {
    const int buffer = step % 2, row = thread / 2, column = thread % 2 * 8, k = step * kDepth + column;
    const int bytes = k < depth ? min(8, depth - k) * 2 : 0;
    const bfloat16* from = bytes ? a + row * depth + k : a;
    if (fault == kSourceBounds && step == 1) from += (kRows - row) * depth;
    if (fault == kSourceMisaligned && thread == 5) from += 1;
    if (fault == kSourceTail && step == 2) {
      gpu::copy_async(&buffers->a[buffer][row][column], a + row * depth + k, 16);  // FAULT: source_tail
    } else if (fault == kTargetBounds && thread == 9) {
      gpu::copy_async(buffers + 1, from, bytes);  // FAULT: target_bounds
    } else if (fault == kTargetMisaligned && thread == 9) {
      gpu::copy_async(&buffers->a[buffer][row][column + 4], from, bytes);  // FAULT: target_misaligned
    } else {
      gpu::copy_async(&buffers->a[buffer][row][column], from, bytes);  // FAULT: source
    }
    if (kByDepth && thread < kDepth) {
      const int kk = step * kDepth + thread;
      gpu::copy_async(&buffers->b_by_depth[buffer][thread][0], kk < depth ? b + kk * kColumns : b, kk < depth ? 16 : 0);
    } else if (!kByDepth && thread < 2 * kColumns) {
      for (int half = 0; half < 8; half += 4) {
        const int of_half = max(0, min(8, bytes - 2 * half));
        const bfloat16* source = of_half ? b + row * depth + k + half : b;
        if (fault == kHalfMisaligned && thread == 5) source += 2;
        if (fault == kHalfBounds && thread == 5) source += kColumns * depth;
        gpu::copy_async_8(&buffers->b[buffer][row][column + half], source, of_half);  // FAULT: half
      }
    }
    if (fault != kOpenGroup) gpu::commit_copies();
  };
  float sums[4] = {};
  const int steps = (depth + kDepth - 1) / kDepth;
  fetch(0);
  for (int step = 0; step < steps; step++) {
    const int buffer = step % 2;
    if (step + 1 < steps) {
      fetch(step + 1);
    } else {
      gpu::commit_copies();
    }
    if (fault == kOwnCopy) sums[0] = float(buffers->a[buffer][thread / 2][thread % 2 * 8].bits);  // FAULT: own_copy
    if (fault == kOverwritten) buffers->a[buffer][thread / 2][thread % 2 * 8].bits = 0;           // FAULT: overwritten
    if (fault == kGroupShort) gpu::await_copies<2>();
    if (fault == kOpenGroup) gpu::await_copies<0>();
    if (fault != kNotAwaited && fault != kGroupShort && fault != kOpenGroup) gpu::await_copies<1>();
    if (fault != kNoBarrier) __syncthreads();
    uint32_t of_a[4], of_b[4];
    const bfloat16* row = &buffers->a[buffer][warp * 16 + lane % 16][lane / 16 * 8];
    if (fault == kRowMisaligned && lane == 3) row += 1;
    if (fault == kRowBounds && lane == 3) row = a;
    if (fault == kDivergentLoad) {
      if (lane != 7) gpu::load_matrices(of_a, row);  // FAULT: divergent_load
    } else if (fault == kRowUninitialised) {
      gpu::load_matrices(of_a, row + 8);  // FAULT: row_uninitialised
    } else {
      gpu::load_matrices(of_a, row);  // FAULT: row
    }
    if (kByDepth) {
      gpu::load_transposed(of_b, &buffers->b_by_depth[buffer][lane % 16][0]);
    } else {
      gpu::load_matrices(of_b, &buffers->b[buffer][lane % 8][lane / 8 % 2 * 8]);
    }
    if (fault != kDivergentProduct || lane < 31) {
      gpu::multiply_add<bfloat16>(sums, of_a, of_b[0], of_b[1]);  // FAULT: divergent_product
    }
    if (fault != kReused) __syncthreads();
  }
  const int row = warp * 16 + lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * kColumns + column + i % 2] = sums[i];
}

__global__ void one_product(float* c) {
  float sums[4] = {};
  const uint32_t a[4] = {};
  gpu::multiply_add<bfloat16>(sums, a, 0, 0);  // FAULT: part_of_a_warp
  c[threadIdx.x] = sums[0];
}

// c = a b of one warp, from its registers: lane l's are a[l][4], b[l][2] and c[l][4].
__global__ void float16_product(float* c, const uint32_t* a, const uint32_t* b) {
  const int lane = int(threadIdx.x);
  uint32_t of_a[4];
  float sums[4];
  for (int i = 0; i < 4; i++) of_a[i] = a[4 * lane + i];
  for (int i = 0; i < 4; i++) sums[i] = c[4 * lane + i];
  gpu::multiply_add<float16>(sums, of_a, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; i++) c[4 * lane + i] = sums[i];
}

}  // namespace

QUAVER_TEST const char* faults_products(float* c, const bfloat16* a, const bfloat16* b, int depth, int by_depth,
                                        int fault) {
  return message_of([&] {
    const auto kernel = by_depth ? products<true> : products<false>;
    gpu::launch(kernel, dim3(1), dim3(kThreads), sizeof(Buffers), nullptr, c, a, b, depth, fault);
  });
}

QUAVER_TEST const char* faults_part_of_a_warp(float* c, int threads) {
  return message_of([&] { gpu::launch(one_product, dim3(1), dim3(unsigned(threads)), 0, nullptr, c); });
}

QUAVER_TEST const char* values_float16_product(float* c, const uint32_t* a, const uint32_t* b) {
  return message_of([&] { gpu::launch(float16_product, dim3(1), dim3(32), 0, nullptr, c, a, b); });
}
