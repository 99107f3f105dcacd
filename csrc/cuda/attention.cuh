// What the kernels of attention share: the arguments, and the scores of a tile of queries with a tile of keys.
#pragma once
#include "cuda/attention_rows.h"
#include "cuda/attention_tile.cuh"
#include "cuda/target.cuh"

namespace quaver::gpu {

template <class C>
constexpr C kInfinity = C(__builtin_huge_val());

// The window whose row of z is a window's query.
struct Sources {
  const int64_t* indexes;  // [W] or [B, W]; null: the window itself, or that before it where causal
  int64_t batch_stride, windows;
  bool causal;

  __device__ int64_t row(int64_t batch, int64_t window) const {
    if (causal && window == 0) return kZeroRow;
    if (!indexes) return window - (causal ? 1 : 0);
    const int64_t row = indexes[batch * batch_stride + window];
    return row < 0 || row >= (causal ? window : windows) ? kInvalidRow : row;
  }
};

// kExchange: keys and values are one tensor, and so, by `sources`, are the queries.
template <class T>
struct Attention {
  Heads<const T> q, k, v;
  Sources sources;
  Visible visible;
  Tiling tiling;
  int64_t heads, group;  // query heads, of which so many share a key head
  int width;
  compute_t<T> scale;
};

// The weights of the summaries: [B, H, T] of C, null for none; the summaries: [B, H, W, d].
template <class T>
struct SummaryWeights {
  const compute_t<T>* data;
  int64_t windows, window;
};

// A block's place: 1-dimensional grids, tiles first.
struct Place {
  int64_t tile, head, batch;
  __device__ Place(int64_t tiles, int64_t heads)
      : tile(blockIdx.x % tiles), head(blockIdx.x / tiles % heads), batch(blockIdx.x / tiles / heads) {}
};

// The keys, within a tile, that a lane's two rows see, and the blocks of 16 of them that some row of the warp sees.
template <class T>
struct Mask {
  int begin[2], end[2];
  uint32_t blocks;

  // row: of the first of the warp's rows; `rows` of all there are, counted from it. Rows that are not there see none:
  // they are zeros and would add nothing, but without the bound the kernels of gradients need up to 36 registers more.
  __device__ Mask(const Visible& visible, int64_t batch, int64_t row, int64_t rows, int64_t key) {
    const int lane = int(threadIdx.x) % 32;
    for (int half = 0; half < 2; half++) {
      const int64_t at = lane / 4 + 8 * half;
      const Range keys = at < rows ? visible.keys_of(batch, row + at) : Range{0, 0};
      begin[half] = within(keys.begin - key);
      end[half] = within(keys.end - key);
    }
    blocks = blocks_of(visible, batch, row, rows, key);
  }
  // Monotone in the rows: the first and the last of them bound the keys of all.
  __device__ static uint32_t blocks_of(const Visible& visible, int64_t batch, int64_t row, int64_t rows, int64_t key) {
    if (rows <= 0) return 0;
    const int first = within(visible.keys_of(batch, row).begin - key);
    const int last = within(visible.keys_of(batch, row + min(rows, int64_t(kBlock)) - 1).end - key);
    if (first >= last) return 0;
    return (2u << (last - 1) / kBlock) - (1u << first / kBlock);
  }
  __device__ bool sees(int half, int column) const { return column >= begin[half] && column < end[half]; }

 private:
  __device__ static int within(int64_t key) { return int(max(int64_t(0), min(key, int64_t(kTileRows<T>)))); }
};

template <class T>
using Scores = Fragments<T, kTileRows<T> / 8>;

// scores, of keys from `column` of the tile on, *= scale; -infinity where they are not seen.
template <class T, int N, class C>
__device__ void hide(C (&scores)[N][4], const Mask<T>& mask, int column, C scale) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 4 * N; i++) {
    const bool seen = mask.sees(i % 4 / 2, column + i / 4 * 8 + lane % 4 * 2 + i % 2);
    scores[i / 4][i % 4] = seen ? scores[i / 4][i % 4] * scale : -kInfinity<C>;
  }
}

// scores = the products of the 16 rows with those of the tile, in the given blocks of it; 0 in the others.
template <class T, int D, class Rows>
__device__ void multiply_blocks(Scores<T>& scores, const Rows& left, const HeadTile<T, D>& tile, uint32_t blocks) {
#pragma unroll
  for (int block = 0; block < kBlocks<T>; block++) {
#pragma unroll
    for (int i = 0; i < 8; i++) scores[2 * block + i / 4][i % 4] = 0;
    if (blocks >> block & 1u) add_scores<T, D>(scores + 2 * block, left, tile, block * kBlock);
  }
}

// scores = scale * left . keys, -infinity where they are not seen.
template <class T, int D, class Rows>
__device__ void make_scores(Scores<T>& scores, const Rows& left, const HeadTile<T, D>& keys, const Mask<T>& mask,
                            compute_t<T> scale) {
  multiply_blocks<T, D>(scores, left, keys, mask.blocks);
  hide(scores, mask, 0, scale);
}

// The softmax of a lane's two rows, a tile of keys at a time.
template <class T>
struct Softmax {
  using C = compute_t<T>;
  C largest[2], sum[2];

  __device__ Softmax() {
    for (int half = 0; half < 2; half++) {
      largest[half] = -kInfinity<C>;
      sum[half] = 0;
    }
  }

  // scores become exp(scores - largest); `factor` is what sums over the tiles before are multiplied by.
  __device__ void add(Scores<T>& scores, C (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      C most = largest[half];
#pragma unroll
      for (int i = 0; i < kTileRows<T> / 4; i++) {
        const C x = scores[i / 2][2 * half + i % 2];
        most = most < x ? x : most;
      }
      most = row_max(most);
      const C zero = most == -kInfinity<C> ? C(0) : most;  // nothing seen yet
      factor[half] = exponential<T>(largest[half] - zero);
      largest[half] = most;
      C parts[2] = {};
#pragma unroll
      for (int i = 0; i < kTileRows<T> / 4; i++) {
        C& x = scores[i / 2][2 * half + i % 2];
        x = exponential<T>(x - zero);
        parts[i % 2] += x;
      }
      sum[half] = sum[half] * factor[half] + row_sum(parts[0] + parts[1]);
    }
  }
  // 0 where nothing was seen.
  __device__ C inverse(int half) const { return sum[half] == 0 ? C(0) : 1 / sum[half]; }
};

}  // namespace quaver::gpu
