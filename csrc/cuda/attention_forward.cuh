// Attention of tiles of queries, the outputs of windows summed up to summaries on the way.
#pragma once
#include "cuda/attention.cuh"

namespace quaver::gpu {

template <class T>
struct ForwardResult {
  using C = compute_t<T>;
  Heads<T> out;
  SummaryWeights<T> weights;
  Target<T> summary;  // [B, H, W, d], written here where windows fit a tile
  C* partial;         // [B, H, tiles, d] of larger ones: a tile's part
};

// Where the probabilities lie for their product with the values: of 16-bit types they stay in registers.
template <class T, bool kInRegisters = sizeof(T) == 2>
struct Probabilities {
  ScoreTile<T> probabilities;
};
template <class T>
struct Probabilities<T, true> {};

template <class T, int D>
struct ForwardShared : Probabilities<T> {
  using C = compute_t<T>;
  static constexpr int kStride = D + 4;
  HeadTile<T, D> queries;
  union {
    struct {
      HeadTile<T, D> keys, values;
    };
    C weighted[kTileRows<T>][kStride];  // outputs times their weights in the summary
  };
};

// Adds up a tile's weighted outputs, window by window.
template <class T, int D>
__device__ void sum_windows(const ForwardShared<T, D>& shared, const Attention<T>& attention,
                            const ForwardResult<T>& result, const Place& place, int64_t first, int rows) {
  using C = compute_t<T>;
  const bool whole = attention.tiling.parts == 1;
  const int length = whole ? int(result.weights.window) : rows, windows = (rows + length - 1) / length;
  const int64_t head = place.batch * attention.heads + place.head;
  for (int i = int(threadIdx.x); i < windows * D; i += kAttentionThreads<T>) {
    const int window = i / D, column = i % D, end = min(window * length + length, rows);
    if (column >= attention.width) continue;
    C sum = 0;
    for (int row = window * length; row < end; row++) sum += shared.weighted[row][column];
    if (whole) {
      result.summary.store((head * result.weights.windows + first / length + window) * attention.width + column, sum);
    } else {
      result.partial[(head * attention.tiling.count + place.tile) * attention.width + column] = sum;
    }
  }
}

template <class T, int D, bool kExchange>
__global__ void __launch_bounds__(kAttentionThreads<T>, kAttentionBlocks<T>)
    attention_forward_kernel(Attention<T> attention, ForwardResult<T> result) {
  using C = compute_t<T>;
  constexpr int R = kTileRows<T>;
  using Shared = ForwardShared<T, D>;
  QUAVER_DYNAMIC_SHARED(Shared, shared);
  const Place place(attention.tiling.count, attention.heads);
  const int64_t first = attention.tiling.first(place.tile), key_head = place.head / attention.group;
  const int rows = attention.tiling.rows(place.tile), width = attention.width;
  const int lane = int(threadIdx.x) % 32, line = int(threadIdx.x) / 32 * kBlock;
  const T *q = attention.q.at(place.batch, place.head), *k = attention.k.at(place.batch, key_head);
  const T* v = attention.v.at(place.batch, key_head);
  const int64_t begin = attention.visible.keys_of(place.batch, first).begin;
  const int64_t end = attention.visible.keys_of(place.batch, first + rows - 1).end;
  const auto fetch_keys = [&](HeadTile<T, D>& tile, const Heads<const T>& heads, const T* head, int64_t key) {
    if (key < end) fetch(tile, heads, head, width, int(min(end - key, int64_t(R))), [&](int i) { return key + i; });
    commit_copies();
  };
  fetch(shared->queries, attention.q, q, width, rows,
        [&](int i) { return kExchange ? attention.sources.row(place.batch, first + i) : first + i; });
  fetch_keys(shared->keys, attention.k, k, begin);
  if (!kExchange) fetch_keys(shared->values, attention.v, v, begin);

  Left<T, D, D> queries;
  Softmax<T> softmax;
  Fragments<T, D / 8> sums = {};
  for (int64_t key = begin; key < end; key += R) {
    // The exchange's tile is keys and values at once: the next one comes to the other buffer.
    const bool other = kExchange && (key - begin) / R % 2;
    const HeadTile<T, D>& keys = other ? shared->values : shared->keys;
    const HeadTile<T, D>& values = kExchange ? keys : shared->values;
    await_copies<kExchange ? 0 : 1>();
    __syncthreads();
    if (kExchange) fetch_keys(other ? shared->keys : shared->values, attention.k, k, key + R);
    if (key == begin) queries.load(shared->queries, line);
    const Mask<T> mask(attention.visible, place.batch, first + line, rows - line, key);
    Scores<T> scores;
    make_scores<T, D>(scores, queries, keys, mask, attention.scale);
    C factor[2];
    softmax.add(scores, factor);
#pragma unroll
    for (int i = 0; i < D / 2; i++) sums[i / 4][i % 4] *= factor[i % 4 / 2];
    if (!kExchange) {
      await_copies<0>();
      __syncthreads();  // the values are there, and all are done with the keys
      fetch_keys(shared->keys, attention.k, k, key + R);
    }
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int block = 0; block < kBlocks<T>; block++) {
        if (!(mask.blocks >> block & 1u)) continue;
        const auto& low = scores[2 * block];
        const auto& high = scores[2 * block + 1];
        const uint32_t weights[4] = {pair_of<T>(low[0], low[1]), pair_of<T>(low[2], low[3]),
                                     pair_of<T>(high[0], high[1]), pair_of<T>(high[2], high[3])};
        add_weighted<T, D, D / 8>(sums, weights, values, block * kBlock, 0);
      }
    } else {
      ScoreTile<T>& tile = shared->probabilities;
      for_pairs(scores,
                [&](int row, int column, C one, C two) { put_pair(&tile.lines[line + row][column], one, two); });
      __syncwarp();
      Fragments<T, D / 8> part = {};  // sums of long rows lose less in parts
      for (int block = 0; block < kBlocks<T>; block++) {
        if (mask.blocks >> block & 1u) add_weighted<T, D, D / 8>(part, tile, line, values, block * kBlock, 0);
      }
#pragma unroll
      for (int i = 0; i < D / 2; i++) sums[i / 4][i % 4] += part[i / 4][i % 4];
    }
    if (!kExchange) {
      __syncthreads();  // all are done with the values
      fetch_keys(shared->values, attention.v, v, key + R);
    }
  }
  await_copies<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < D / 2; i++) sums[i / 4][i % 4] *= softmax.inverse(i % 4 / 2);
  if (result.weights.data) {
    C weights[2];
    for (int half = 0; half < 2; half++) {
      const int row = line + lane / 4 + 8 * half;
      const int64_t at = (place.batch * attention.heads + place.head) * attention.visible.length + first + row;
      weights[half] = row < rows ? result.weights.data[at] : C(0);
    }
    for_pairs(sums, [&](int row, int column, C one, C two) {
      C* to = &shared->weighted[line + row][column];
      const C weight = row < 8 ? weights[0] : weights[1];
      to[0] = one * weight;
      to[1] = two * weight;
    });
    __syncthreads();
    sum_windows(*shared, attention, result, place, first, rows);
  }
  for_pairs(sums,
            [&](int row, int column, C one, C two) { put_pair(&shared->queries.lines[line + row][column], one, two); });
  store_rows(shared->queries, line, result.out, result.out.at(place.batch, place.head), first, width, rows);
}

}  // namespace quaver::gpu
