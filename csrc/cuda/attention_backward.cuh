// The gradients of attention. Probabilities are made again. Windows that fit a tile have all their gradients made by
// one block; else one kernel has tiles of queries, with what it learns about their softmax, and another tiles of keys.
#pragma once
#include "cuda/attention.cuh"

namespace quaver::gpu {

template <class T>
struct Gradients {
  using C = compute_t<T>;
  Heads<const T> grad;  // of the outputs; null for none
  SummaryWeights<T> weights;
  Values<T> grad_summary;  // [B, H, W, d]; null for none
  C* of_weights;           // [B, H, T]: of the summary's weights; null where there is no gradient of the summary
  Heads<T> q, k, v;
  C *wide_q, *wide_k;  // of the exchange, [B, H, W, d]: of the queries, and of keys and values together
  C *log_sum, *mean;   // [B, H, T]: of each row's softmax, the mean that of the gradient of its probabilities
};

template <class T, int D>
struct BackwardShared {
  HeadTile<T, D> queries, grads, keys, values;
  ScoreTile<T> p, of_scores;
  compute_t<T> products[kTileRows<T>];  // of the values with the gradient of their window's summary
};

// A tile of gradients of the outputs of one head, from row `first` on, with what comes by way of the summary.
template <class T, int D>
__device__ void add_summary(HeadTile<T, D>& tile, const Attention<T>& attention, const Gradients<T>& gradients,
                            int64_t head, int64_t first, int rows) {
  const SummaryWeights<T>& weights = gradients.weights;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < rows * D; i += kAttentionThreads<T>) {
    const int64_t row = first + i / D;
    const int column = i % D;
    if (column >= attention.width) continue;
    T& element = tile.lines[i / D][column];
    const auto weight = weights.data[head * attention.visible.length + row];
    const int64_t window = head * weights.windows + row / weights.window;
    const auto of_summary = gradients.grad_summary[window * attention.width + column];
    element = narrow<T>(fused(weight, of_summary, widen(element)));
  }
}

// The products of a tile's values, from row `first` on, with the gradients of their windows' summaries, a warp to a
// row.
template <class T, int D>
__device__ void make_products(compute_t<T>* products, const HeadTile<T, D>& values, const Attention<T>& attention,
                              const Gradients<T>& gradients, int64_t head, int64_t first, int rows) {
  using C = compute_t<T>;
  const int lane = int(threadIdx.x) % 32;
#pragma unroll 1
  for (int line = int(threadIdx.x) / 32; line < kTileRows<T>; line += kBlocks<T>) {
    C sum = 0;
    const int64_t window = head * gradients.weights.windows + (first + line) / gradients.weights.window;
#pragma unroll 1
    for (int column = lane; line < rows && column < attention.width; column += 32) {
      const C of_summary = gradients.grad_summary[window * attention.width + column];
      sum = fused(of_summary, widen(values.lines[line][column]), sum);
    }
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) products[line] = sum;
  }
}

// What is added up over the keys of a lane's two rows, with the weights of a softmax that is not divided yet.
template <class T>
struct RowSums {
  using C = compute_t<T>;
  C mean[2] = {}, of_weight[2] = {};

  // p(i): the i-th of the lane's numbers, as they follow each other in Scores.
  template <class P>
  __device__ void add(P&& p, const Scores<T>& of_p, const C* products, const C (&factor)[2]) {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      C sums[2] = {}, weights[2] = {};
#pragma unroll
      for (int i = 0; i < kTileRows<T> / 4; i++) {
        const C value = p(i / 2 * 4 + 2 * half + i % 2);
        // Nothing that is hidden counts, though it be no number.
        if (value == 0) continue;
        sums[i % 2] = fused(value, of_p[i / 2][2 * half + i % 2], sums[i % 2]);
        if (products) weights[i % 2] = fused(value, products[i / 2 * 8 + lane % 4 * 2 + i % 2], weights[i % 2]);
      }
      mean[half] = mean[half] * factor[half] + row_sum(sums[0] + sums[1]);
      if (products) of_weight[half] = of_weight[half] * factor[half] + row_sum(weights[0] + weights[1]);
    }
  }
};

// of_p, of N times 8 keys, becomes the gradient of the scores.
template <int N, class P, class C>
__device__ void make_gradients(P&& p, C (&of_p)[N][4], const C (&mean)[2]) {
#pragma unroll
  for (int i = 0; i < 4 * N; i++) {
    const auto value = p(i);
    auto& of = of_p[i / 4][i % 4];
    of = value == 0 ? 0 : value * (of - mean[i % 4 / 2]);
  }
}

// p = exp(scores - log_sum).
template <class T, int N, class C>
__device__ void make_probabilities(C (&scores)[N][4], const C (&log_sum)[2]) {
#pragma unroll
  for (int i = 0; i < 4 * N; i++) {
    auto& x = scores[i / 4][i % 4];
    x = exponential<T>(x - log_sum[i % 4 / 2]);
  }
}

template <class T, int N, class C>
__device__ void put_scores(ScoreTile<T>& tile, int line, int first_column, C (&scores)[N][4]) {
  for_pairs(scores, [&](int row, int column, C one, C two) {
    put_pair(&tile.lines[line + row][first_column + column], one, two);
  });
}

// Columns at a time of a product that is written at once: as registers, all of 128 would be too many.
template <int D>
constexpr int kChunk = D < 64    ? D
                       : D == 96 ? 48
                                 : 64;

// tile, the warp's lines of it, = factor * of_scores [16, R] times the keys.
template <class T, int D>
__device__ void make_query_gradients(HeadTile<T, D>& tile, const ScoreTile<T>& of_scores, const HeadTile<T, D>& keys,
                                     int line, uint32_t blocks, compute_t<T> factor) {
  constexpr int N = kChunk<D> / 8;
#pragma unroll 1
  for (int column = 0; column < D; column += kChunk<D>) {
    Fragments<T, N> sums = {};
    for (int block = 0; block < kBlocks<T>; block++) {
      if (blocks >> block & 1u) add_weighted<T, D, N>(sums, of_scores, line, keys, block * kBlock, column);
    }
    for_pairs(sums, [&](int row, int at, auto one, auto two) {
      put_pair(&tile.lines[line + row][column + at], one * factor, two * factor);
    });
  }
}

// The gradients of the 16 keys of a warp, from line `line` on: sums += the transposes of p and of_scores times the
// gradients of the outputs and the queries.
template <class T, int D>
struct KeyGradients {
  Fragments<T, D / 8> keys = {}, values = {};

  __device__ void add_values(const BackwardShared<T, D>& shared, int line, const Visible& visible, int64_t batch,
                             int64_t row, int rows, int64_t key) {
    for_blocks(line, visible, batch, row, rows, key,
               [&](int block) { add_transposed<T, D, D / 8>(values, shared.p, block, line, shared.grads, 0); });
  }
  __device__ void add_keys(const BackwardShared<T, D>& shared, int line, const Visible& visible, int64_t batch,
                           int64_t row, int rows, int64_t key) {
    for_blocks(line, visible, batch, row, rows, key,
               [&](int block) { add_transposed<T, D, D / 8>(keys, shared.of_scores, block, line, shared.queries, 0); });
  }

 private:
  // Of queries, those blocks of which a row sees one of this block of keys.
  template <class Body>
  __device__ static void for_blocks(int line, const Visible& visible, int64_t batch, int64_t row, int rows, int64_t key,
                                    Body&& body) {
#pragma unroll 1  // unrolled it spills beside the sums of 128 columns
    for (int block = 0; block < kTileRows<T>; block += kBlock) {
      const uint32_t seen = Mask<T>::blocks_of(visible, batch, row + block, rows - block, key);
      if (seen >> line / kBlock & 1u) body(block);
    }
  }
};

template <class T, int D>
__device__ void put_rows(HeadTile<T, D>& tile, int line, Fragments<T, D / 8>& sums, compute_t<T> factor) {
  for_pairs(sums, [&](int row, int column, auto one, auto two) {
    put_pair(&tile.lines[line + row][column], one * factor, two * factor);
  });
}

// All gradients of the windows of a tile and of the query heads that share its key head.
template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreads<T>, kAttentionBlocks<T>)
    window_backward_kernel(Attention<T> attention, Gradients<T> gradients) {
  using C = compute_t<T>;
  using Shared = BackwardShared<T, D>;
  QUAVER_DYNAMIC_SHARED(Shared, shared);
  const Place place(attention.tiling.count, attention.heads / attention.group);
  const int64_t first = attention.tiling.first(place.tile), batch = place.batch;
  const int rows = attention.tiling.rows(place.tile), width = attention.width;
  const int lane = int(threadIdx.x) % 32, line = int(threadIdx.x) / 32 * kBlock;
  const uint32_t blocks = Mask<T>::blocks_of(attention.visible, batch, first + line, rows - line, first);
  const auto row_of = [&](int i) { return first + i; };
  fetch(shared->keys, attention.k, attention.k.at(batch, place.head), width, rows, row_of);
  fetch(shared->values, attention.v, attention.v.at(batch, place.head), width, rows, row_of);
  KeyGradients<T, D> of;
  for (int64_t member = 0; member < attention.group; member++) {
    const int64_t head = place.head * attention.group + member, of_rows = batch * attention.heads + head;
    fetch(shared->queries, attention.q, attention.q.at(batch, head), width, rows, row_of);
    fetch(shared->grads, gradients.grad, gradients.grad.at(batch, head), width, gradients.grad.data ? rows : 0, row_of);
    commit_copies();
    await_copies<0>();
    __syncthreads();
    if (gradients.of_weights) {
      add_summary(shared->grads, attention, gradients, of_rows, first, rows);
      make_products(shared->products, shared->values, attention, gradients, of_rows, first, rows);
      __syncthreads();
    }
    {
      Scores<T> p, of_p;
      Left<T, D, 2 * D> left;
      left.load(shared->queries, line);
      {
        const Mask<T> mask(attention.visible, batch, first + line, rows - line, first);
        make_scores<T, D>(p, left, shared->keys, mask, attention.scale);
      }
      Softmax<T> softmax;
      C factor[2];
      softmax.add(p, factor);
#pragma unroll
      for (int i = 0; i < kTileRows<T> / 2; i++) p[i / 4][i % 4] *= softmax.inverse(i % 4 / 2);
      put_scores<T>(shared->p, line, 0, p);
      left.load(shared->grads, line);
      multiply_blocks<T, D>(of_p, left, shared->values, blocks);
      // Registers for both p and its gradient are not there beside wide sums: p is then read back, as it was rounded.
      constexpr bool kReadBack = sizeof(T) == 8 || (sizeof(T) == 2 && D > 96);
      const T* put = &shared->p.lines[line + lane / 4][lane % 4 * 2];
      const auto p_of = [&](int i) -> C {
        return kReadBack ? widen(put[i % 4 / 2 * 8 * ScoreTile<T>::kStride + i / 4 * 8 + i % 2]) : p[i / 4][i % 4];
      };
      RowSums<T> sums;
      sums.add(p_of, of_p, gradients.of_weights ? shared->products : nullptr, factor);
      make_gradients(p_of, of_p, sums.mean);
      for (int half = 0; half < 2 && gradients.of_weights && lane % 4 == 0; half++) {
        const int row = line + lane / 4 + 8 * half;
        if (row < rows) gradients.of_weights[of_rows * attention.visible.length + first + row] = sums.of_weight[half];
      }
      put_scores<T>(shared->of_scores, line, 0, of_p);
    }
    __syncthreads();
    of.add_values(*shared, line, attention.visible, batch, first, rows, first);
    of.add_keys(*shared, line, attention.visible, batch, first, rows, first);
    __syncthreads();  // all are done with the gradients of the outputs: those of the queries take their place
    make_query_gradients(shared->grads, shared->of_scores, shared->keys, line, blocks, attention.scale);
    store_rows(shared->grads, line, gradients.q, gradients.q.at(batch, head), first, width, rows);
    __syncthreads();
  }
  put_rows(shared->queries, line, of.keys, attention.scale);
  put_rows(shared->grads, line, of.values, C(1));
  store_rows(shared->queries, line, gradients.k, gradients.k.at(batch, place.head), first, width, rows);
  store_rows(shared->grads, line, gradients.v, gradients.v.at(batch, place.head), first, width, rows);
}

// The gradients of a tile of queries, and of each row what the gradients of the keys need of its softmax.
template <class T, int D, bool kExchange>
__global__ void __launch_bounds__(kAttentionThreads<T>, kAttentionBlocks<T>)
    query_gradient_kernel(Attention<T> attention, Gradients<T> gradients) {
  using C = compute_t<T>;
  using Shared = BackwardShared<T, D>;
  QUAVER_DYNAMIC_SHARED(Shared, shared);
  const Place place(attention.tiling.count, attention.heads);
  const int64_t first = attention.tiling.first(place.tile), batch = place.batch, head = place.head;
  const int64_t key_head = head / attention.group, of_rows = batch * attention.heads + head;
  const int rows = attention.tiling.rows(place.tile), width = attention.width;
  const int lane = int(threadIdx.x) % 32, line = int(threadIdx.x) / 32 * kBlock;
  const int64_t begin = attention.visible.keys_of(batch, first).begin;
  const int64_t end = attention.visible.keys_of(batch, first + rows - 1).end;
  const HeadTile<T, D>& values = kExchange ? shared->keys : shared->values;
  fetch(shared->queries, attention.q, attention.q.at(batch, head), width, rows,
        [&](int i) { return kExchange ? attention.sources.row(batch, first + i) : first + i; });
  fetch(shared->grads, gradients.grad, gradients.grad.at(batch, head), width, gradients.grad.data ? rows : 0,
        [&](int i) { return first + i; });
  commit_copies();
  await_copies<0>();
  const bool summarized = !kExchange && gradients.of_weights;
  if (summarized) {
    __syncthreads();
    add_summary(shared->grads, attention, gradients, of_rows, first, rows);
    __syncthreads();
  }
  // Calls body(scores, gradients of the probabilities, blocks that are seen) for each tile of keys.
  const auto for_keys = [&](bool products, auto&& body) {
    for (int64_t key = begin; key < end; key += kTileRows<T>) {
      const int count = int(min(end - key, int64_t(kTileRows<T>)));
      const auto row_of = [&](int i) { return key + i; };
      fetch(shared->keys, attention.k, attention.k.at(batch, key_head), width, count, row_of);
      if (!kExchange) fetch(shared->values, attention.v, attention.v.at(batch, key_head), width, count, row_of);
      commit_copies();
      await_copies<0>();
      __syncthreads();
      if (products) {
        make_products(shared->products, values, attention, gradients, of_rows, key, count);
        __syncthreads();
      }
      const Mask<T> mask(attention.visible, batch, first + line, rows - line, key);
      Scores<T> p, of_p;
      Left<T, D, D> left;
      left.load(shared->queries, line);
      make_scores<T, D>(p, left, shared->keys, mask, attention.scale);
      left.load(shared->grads, line);
      multiply_blocks<T, D>(of_p, left, values, mask.blocks);
      body(p, of_p, mask.blocks);
      __syncthreads();  // all are done with the keys
    }
  };
  Softmax<T> softmax;
  RowSums<T> sums;
  for_keys(summarized, [&](Scores<T>& p, Scores<T>& of_p, uint32_t) {
    C factor[2];
    softmax.add(p, factor);
    const auto p_of = [&](int i) { return p[i / 4][i % 4]; };
    sums.add(p_of, of_p, summarized ? shared->products : nullptr, factor);
  });
  C log_sum[2];
  for (int half = 0; half < 2; half++) {
    const C inverse = softmax.inverse(half);
    log_sum[half] = softmax.sum[half] == 0 ? C(0) : softmax.largest[half] + log(softmax.sum[half]);
    sums.mean[half] *= inverse;
    const int row = line + lane / 4 + 8 * half;
    const int64_t at = of_rows * attention.visible.length + first + row;
    if (lane % 4 || row >= rows) continue;
    gradients.log_sum[at] = log_sum[half];
    gradients.mean[at] = sums.mean[half];
    if (summarized) gradients.of_weights[at] = sums.of_weight[half] * inverse;
  }
  Fragments<T, D / 8> of_queries = {};
  for_keys(false, [&](Scores<T>& p, Scores<T>& of_p, uint32_t blocks) {
    make_probabilities<T>(p, log_sum);
    make_gradients([&](int i) { return p[i / 4][i % 4]; }, of_p, sums.mean);
    put_scores<T>(shared->of_scores, line, 0, of_p);
    __syncwarp();
    for (int block = 0; block < kBlocks<T>; block++) {
      if (blocks >> block & 1u) {
        add_weighted<T, D, D / 8>(of_queries, shared->of_scores, line, shared->keys, block * kBlock, 0);
      }
    }
  });
  if constexpr (kExchange) {
    for_pairs(of_queries, [&](int row, int column, C one, C two) {
      C* to = gradients.wide_q + (of_rows * attention.visible.length + first + line + row) * width;
      if (line + row >= rows) return;
      if (column < width) to[column] = one * attention.scale;
      if (column + 1 < width) to[column + 1] = two * attention.scale;
    });
  } else {
    put_rows(shared->queries, line, of_queries, attention.scale);
    store_rows(shared->queries, line, gradients.q, gradients.q.at(batch, head), first, width, rows);
  }
}

// The gradients of a tile of keys and of its values, over the query heads that share the key head.
template <class T, int D, bool kExchange>
__global__ void __launch_bounds__(kAttentionThreads<T>, kAttentionBlocks<T>)
    key_gradient_kernel(Attention<T> attention, Gradients<T> gradients) {
  using C = compute_t<T>;
  using Shared = BackwardShared<T, D>;
  constexpr int R = kTileRows<T>;
  QUAVER_DYNAMIC_SHARED(Shared, shared);
  const Place place(attention.tiling.count, attention.heads / attention.group);
  const int64_t first = attention.tiling.first(place.tile), batch = place.batch;
  const int rows = attention.tiling.rows(place.tile), width = attention.width;
  const int lane = int(threadIdx.x) % 32, line = int(threadIdx.x) / 32 * kBlock;
  const HeadTile<T, D>& values = kExchange ? shared->keys : shared->values;
  const auto key_of = [&](int i) { return first + i; };
  fetch(shared->keys, attention.k, attention.k.at(batch, place.head), width, rows, key_of);
  if (!kExchange) fetch(shared->values, attention.v, attention.v.at(batch, place.head), width, rows, key_of);
  const Range seeing = attention.visible.queries_of(batch, first, first + rows - 1);
  KeyGradients<T, D> of;
  for (int64_t member = 0; member < attention.group; member++) {
    const int64_t head = place.head * attention.group + member, of_rows = batch * attention.heads + head;
    for (int64_t query = seeing.begin; query < seeing.end; query += R) {
      const int count = int(min(seeing.end - query, int64_t(R)));
      fetch(shared->queries, attention.q, attention.q.at(batch, head), width, count,
            [&](int i) { return kExchange ? attention.sources.row(batch, query + i) : query + i; });
      fetch(shared->grads, gradients.grad, gradients.grad.at(batch, head), width, gradients.grad.data ? count : 0,
            [&](int i) { return query + i; });
      commit_copies();
      await_copies<0>();
      __syncthreads();
      if (!kExchange && gradients.of_weights) {
        add_summary(shared->grads, attention, gradients, of_rows, query, count);
        __syncthreads();
      }
      {
        C log_sum[2], mean[2];
        for (int half = 0; half < 2; half++) {
          const int row = line + lane / 4 + 8 * half;
          const int64_t at = of_rows * attention.visible.length + query + row;
          log_sum[half] = row < count ? gradients.log_sum[at] : C(0);
          mean[half] = row < count ? gradients.mean[at] : C(0);
        }
        const Mask<T> mask(attention.visible, batch, query + line, count - line, first);
        Left<T, D, 2 * D> of_queries, of_grads;
        of_queries.load(shared->queries, line);
        of_grads.load(shared->grads, line);
        // A block of keys at a time: fewer registers.
#pragma unroll 1
        for (int block = 0; block < kBlocks<T>; block++) {
          if (!(mask.blocks >> block & 1u)) continue;
          Fragments<T, 2> p = {}, of_p = {};
          add_scores<T, D>(p, of_queries, shared->keys, block * kBlock);
          add_scores<T, D>(of_p, of_grads, values, block * kBlock);
          hide(p, mask, block * kBlock, attention.scale);
          make_probabilities<T>(p, log_sum);
          make_gradients([&](int i) { return p[i / 4][i % 4]; }, of_p, mean);
          put_scores<T>(shared->p, line, block * kBlock, p);
          put_scores<T>(shared->of_scores, line, block * kBlock, of_p);
        }
      }
      __syncthreads();
      of.add_values(*shared, line, attention.visible, batch, query, count, first);
      of.add_keys(*shared, line, attention.visible, batch, query, count, first);
      __syncthreads();  // all are done with these queries
    }
  }
  if constexpr (kExchange) {
    for (int i = 0; i < D / 2; i++) {
      C& value = of.values[i / 4][i % 4];
      value = fused(of.keys[i / 4][i % 4], attention.scale, value);
    }
    for_pairs(of.values, [&](int row, int column, C one, C two) {
      C* to = gradients.wide_k +
              ((batch * attention.heads + place.head) * attention.visible.length + first + line + row) * width;
      if (line + row >= rows) return;
      if (column < width) to[column] = one;
      if (column + 1 < width) to[column + 1] = two;
    });
  } else {
    put_rows(shared->queries, line, of.keys, attention.scale);
    put_rows(shared->grads, line, of.values, C(1));
    store_rows(shared->queries, line, gradients.k, gradients.k.at(batch, place.head), first, width, rows);
    store_rows(shared->grads, line, gradients.v, gradients.v.at(batch, place.head), first, width, rows);
  }
}

}  // namespace quaver::gpu
