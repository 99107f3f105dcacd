// Accesses of known cost. Each "COUNT: name" marks a line that the counter must name.
#include "run.h"

namespace {

using namespace quaver;

constexpr int kTile = 32;

// out = x transposed, [32, 32] by 8 warps; kPadded: rows of shared memory that are no multiple of 32 banks apart.
template <int kPadded>
__global__ void transpose(float* out, const float* x) {
  __shared__ float tile[kTile][kTile + kPadded];
  const int lane = int(threadIdx.x), warp = int(threadIdx.y);
  for (int row = warp; row < kTile; row += int(blockDim.y)) {
    tile[row][lane] = x[row * kTile + lane];  // COUNT: rows_in
  }
  __syncthreads();
  for (int row = warp; row < kTile; row += int(blockDim.y)) {
    out[row * kTile + lane] = tile[lane][row];  // COUNT: columns_out
  }
}

// One warp: every `stride`-th of x, and the first one to all.
__global__ void strided(float* out, const float* x, int stride) {
  const int lane = int(threadIdx.x);
  const float own = x[lane * stride];  // COUNT: strided
  __syncwarp();
  const float first = x[0];     // COUNT: broadcast
  out[lane + 1] = own + first;  // COUNT: shifted
  atomicAdd(&out[0], 1.0f);     // counted where it stands in atomics.cpp
}

// One warp: 16 bytes a lane of shared memory, `stride` quads apart; odd lanes go round the loop once more.
__global__ void quads(float4* out, int stride) {
  QUAVER_DYNAMIC_SHARED(float4, shared);
  const int lane = int(threadIdx.x);
  shared[lane * stride] = make_float4(1, 2, 3, 4);  // COUNT: quads
  __syncwarp();
  for (int i = 0; i < 1 + lane % 2; i++) out[lane] = shared[lane * stride];  // COUNT: uneven
}

// One warp: four matrices of 8 rows, `line` elements apart.
__global__ void matrices(uint32_t* out, const bfloat16* x, int line) {
  QUAVER_DYNAMIC_SHARED(bfloat16, rows);
  const int lane = int(threadIdx.x);
  gpu::copy_async(rows + lane * line, x + lane * 8, 16);  // COUNT: copied
  gpu::commit_copies();
  gpu::await_copies<0>();
  __syncthreads();
  uint32_t found[4];
  gpu::load_matrices(found, rows + lane * line);  // COUNT: matrices
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = found[i];
}

}  // namespace

QUAVER_TEST const char* traffic_transpose(float* out, const float* x, int padded) {
  return message_of([&] { gpu::launch(padded ? transpose<1> : transpose<0>, 1, dim3(kTile, 8), 0, nullptr, out, x); });
}
QUAVER_TEST const char* traffic_strided(float* out, const float* x, int stride) {
  return message_of([&] { gpu::launch(strided, 1, 32, 0, nullptr, out, x, stride); });
}
QUAVER_TEST const char* traffic_quads(float4* out, int stride) {
  return message_of([&] { gpu::launch(quads, 1, 32, size_t(32 * stride) * sizeof(float4), nullptr, out, stride); });
}
QUAVER_TEST const char* traffic_matrices(uint32_t* out, const bfloat16* x, int line) {
  return message_of([&] { gpu::launch(matrices, 1, 32, size_t(32 * line) * sizeof(bfloat16), nullptr, out, x, line); });
}
