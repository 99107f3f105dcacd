// Tiles of attention in shared memory and the products of a warp with them: 16 rows to a warp, 16 rows of the other
// side at a time. Tensor cores multiply 16-bit types; float32 and float64 are multiplied by fused multiply-adds (no
// TF32).
#pragma once
#include "cuda/gpu_tensor.h"

namespace quaver::gpu {

// Rows of a tile, of queries and of keys. Four tiles of 64 rows of float32 would not fit an SM, nor the scores of 32
// keys in float64 a thread.
template <class T>
constexpr int kTileRows = sizeof(T) == 2   ? 64
                          : sizeof(T) == 4 ? 32
                                           : 16;
constexpr int kBlock = 16;
template <class T>
constexpr int kBlocks = kTileRows<T> / kBlock;
template <class T>
constexpr int kAttentionThreads = 32 * kBlocks<T>;
// At least so many blocks to an SM: all 255 registers may be used. Left to itself the compiler spills for a third
// block.
template <class T>
constexpr int kAttentionBlocks = 256 / kAttentionThreads<T>;
template <class T>
constexpr int kPiece = 16 / sizeof(T);

// Lines are 16 bytes longer than what they hold: eight of them then begin in different banks.
template <class T, int kColumns>
struct alignas(16) Lines {
  static constexpr int kStride = kColumns + kPiece<T>;
  T lines[kTileRows<T>][kStride];
};
template <class T, int D>
using HeadTile = Lines<T, D>;
template <class T>
using ScoreTile = Lines<T, kTileRows<T>>;

// Rows of a tensor [B, H, T, d] whose elements lie side by side; strides in elements.
template <class T>
struct Heads {
  T* data;  // null where there is none
  int64_t batch, head, token;
  bool packed;  // every 16 bytes of a row are at a multiple of 16

  __device__ T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

constexpr int64_t kZeroRow = -1, kInvalidRow = -2;

template <class T>
__device__ inline T not_a_number() {
  return narrow<T>(compute_t<T>(float_from_bits(0x7fc00000u)));
}

// Starts to fill a tile with `count` rows of a head, line i with row row_of(i); zeros beside them. NaN for kInvalidRow.
template <class T, int D, class RowOf>
__device__ void fetch(HeadTile<T, D>& tile, const Heads<const T>& heads, const T* head, int width, int count,
                      RowOf&& row_of) {
  constexpr int kPieces = D / kPiece<T>;
#pragma unroll 1  // unrolled, its addresses spill beside the sums of wide heads
  for (int i = int(threadIdx.x); i < kTileRows<T> * kPieces; i += kAttentionThreads<T>) {
    const int line = i / kPieces, at = i % kPieces * kPiece<T>;
    const int64_t row = line < count ? row_of(line) : kZeroRow;
    const int present = row < 0 ? 0 : max(0, min(kPiece<T>, width - at));
    const T* from = present ? head + row * heads.token + at : head;
    T* to = &tile.lines[line][at];
    if (heads.packed && row != kInvalidRow) {
      copy_async(to, from, present * int(sizeof(T)));
    } else {
      const T other = row == kInvalidRow ? not_a_number<T>() : T{};
      for (int j = 0; j < kPiece<T>; j++) to[j] = j < present ? from[j] : at + j < width ? other : T{};
    }
  }
}

// Writes 16 rows of a tile from `line` on, those of a warp, to rows of a head from `row` on, as many as there are.
template <class T, int D>
__device__ void store_rows(const HeadTile<T, D>& tile, int line, const Heads<T>& heads, T* head, int64_t row, int width,
                           int count) {
  constexpr int kPieces = D / kPiece<T>;
  __syncwarp();
#pragma unroll 1
  for (int i = int(threadIdx.x) % 32; i < kBlock * kPieces; i += 32) {
    const int of = line + i / kPieces, at = i % kPieces * kPiece<T>;
    const int present = of < count ? min(kPiece<T>, width - at) : 0;
    const T* from = &tile.lines[of][at];
    T* to = head + (row + of) * heads.token + at;
    if (heads.packed && present == kPiece<T>) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < present; j++) to[j] = from[j];
    }
  }
}

__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// Two numbers in one register, the first in its low half.
template <class T>
__device__ inline uint32_t pair_of(float first, float second) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
#else
  return narrow<T>(first).bits | uint32_t(narrow<T>(second).bits) << 16;
#endif
}

// Sums of 16 rows and 8 N columns, shared by the lanes of a warp as a tensor core's results: sums[j][2 h + c] of lane l
// is of row l / 4 + 8 h and column 8 j + 2 (l % 4) + c.
template <class T, int N>
using Fragments = compute_t<T>[N][4];

// 16 rows of a tile as the left side of products: kept in registers, or left where they are.
template <class T, int D>
struct LeftInRegisters {
  uint32_t values[D / kBlock][4];
  __device__ void load(const HeadTile<T, D>& tile, int row) {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int k = 0; k < D / kBlock; k++) {
      load_matrices(values[k], &tile.lines[row + lane % 16][k * kBlock + lane / 16 * 8]);
    }
  }
  __device__ void get(int k, uint32_t (&out)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = values[k][i];
  }
};
template <class T, int D>
struct LeftInPlace {
  const T (*lines)[HeadTile<T, D>::kStride];
  __device__ void load(const HeadTile<T, D>& tile, int row) { lines = tile.lines + row; }
  __device__ void get(int k, uint32_t (&out)[4]) const {
    const int lane = int(threadIdx.x) % 32;
    load_matrices(out, &lines[lane % 16][k * kBlock + lane / 16 * 8]);
  }
};
// Registers are kept for what a kernel has beside: its sums of so many columns for each row.
template <class T, int D, int kColumns>
using Left = std::conditional_t<sizeof(T) == 2 && kColumns <= 128, LeftInRegisters<T, D>, LeftInPlace<T, D>>;

// sums += the 16 rows times rows `row` .. row + 15 of the tile, over all their elements.
template <class T, int D, class Rows>
__device__ void add_scores(compute_t<T> (*sums)[4], const Rows& left, const HeadTile<T, D>& tile, int row) {
  const int lane = int(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < D / kBlock; k++) {
      uint32_t a[4], b[4];
      left.get(k, a);
      load_matrices(b, &tile.lines[row + lane % 8 + lane / 16 * 8][k * kBlock + lane / 8 % 2 * 8]);
      multiply_add<T>(sums[0], a, b[0], b[1]);
      multiply_add<T>(sums[1], a, b[2], b[3]);
    }
  } else {
    const T* of_rows = left.lines[lane / 4];
    const T* of_columns = tile.lines[row + lane % 4 * 2];
#pragma unroll 4
    for (int k = 0; k < D; k++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const T a = of_rows[i / 2 % 2 * 8 * HeadTile<T, D>::kStride + k];
        const T b = of_columns[(i / 4 * 8 + i % 2) * HeadTile<T, D>::kStride + k];
        sums[i / 4][i % 4] = fused(a, b, sums[i / 4][i % 4]);
      }
    }
  }
}

// sums [16, 8 N] += weights [16, 16] times rows `row` .. row + 15 of the tile, from `column` on. The weights are the
// warp's 16 lines of `scores` from `line` on, columns `row` .. row + 15; or, of 16-bit types, given in registers.
template <class T, int D, int N>
__device__ void add_weighted(Fragments<T, N>& sums, const uint32_t (&weights)[4], const HeadTile<T, D>& tile, int row,
                             int column) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    uint32_t b[4];
    load_transposed(b, &tile.lines[row + lane % 16][column + 8 * j + lane / 16 * 8]);
    multiply_add<T>(sums[j], weights, b[0], b[1]);
    multiply_add<T>(sums[j + 1], weights, b[2], b[3]);
  }
}
template <class T, int D, int N>
__device__ void add_weighted(Fragments<T, N>& sums, const ScoreTile<T>& scores, int line, const HeadTile<T, D>& tile,
                             int row, int column) {
  const int lane = int(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t weights[4];
    load_matrices(weights, &scores.lines[line + lane % 16][row + lane / 16 * 8]);
    add_weighted<T, D, N>(sums, weights, tile, row, column);
  } else {
#pragma unroll 2
    for (int k = 0; k < kBlock; k++) {
      const T first = scores.lines[line + lane / 4][row + k], second = scores.lines[line + lane / 4 + 8][row + k];
      const T* b = &tile.lines[row + k][column + lane % 4 * 2];
#pragma unroll
      for (int i = 0; i < 4 * N; i++) {
        sums[i / 4][i % 4] = fused(i % 4 < 2 ? first : second, b[i / 4 * 8 + i % 2], sums[i / 4][i % 4]);
      }
    }
  }
}

// sums [16, 8 N] += the transpose of scores [line .. line + 15, column .. column + 15] times rows line .. line + 15 of
// the tile, from `from` on.
template <class T, int D, int N>
__device__ void add_transposed(Fragments<T, N>& sums, const ScoreTile<T>& scores, int line, int column,
                               const HeadTile<T, D>& tile, int from) {
  const int lane = int(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t weights[4];
    load_transposed(weights, &scores.lines[line + lane % 8 + lane / 16 * 8][column + lane / 8 % 2 * 8]);
    add_weighted<T, D, N>(sums, weights, tile, line, from);
  } else {
#pragma unroll 2
    for (int k = 0; k < kBlock; k++) {
      const T *a = &scores.lines[line + k][column + lane / 4], *b = &tile.lines[line + k][from + lane % 4 * 2];
#pragma unroll
      for (int i = 0; i < 4 * N; i++) {
        sums[i / 4][i % 4] = fused(a[i / 2 % 2 * 8], b[i / 4 * 8 + i % 2], sums[i / 4][i % 4]);
      }
    }
  }
}

// Calls body(row, column, first, second) for the pairs of columns of a lane.
template <class C, int N, class Body>
__device__ void for_pairs(C (&sums)[N][4], Body&& body) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < N; j++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      body(lane / 4 + 8 * half, 8 * j + lane % 4 * 2, sums[j][2 * half], sums[j][2 * half + 1]);
    }
  }
}

template <class T>
__device__ void put_pair(T* to, compute_t<T> first, compute_t<T> second) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(to) = pair_of<T>(first, second);
  } else {
    to[0] = first;
    to[1] = second;
  }
}

// exp(x), x <= 0: of what is rounded to 16 bits the fast one, within 2^-21.
template <class T>
__device__ compute_t<T> exponential(compute_t<T> x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) return __expf(x);
#endif
  if constexpr (sizeof(T) == 8) {
    return exp(x);
  } else {
    return expf(x);
  }
}

// Over the four lanes that share a row.
template <class C>
__device__ C row_sum(C x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
template <class C>
__device__ C row_max(C x) {
  const C other = __shfl_xor_sync(0xffffffffu, x, 1);
  x = x < other ? other : x;
  const C third = __shfl_xor_sync(0xffffffffu, x, 2);
  return x < third ? third : x;
}

}  // namespace quaver::gpu
