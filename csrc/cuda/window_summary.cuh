// What is done once for each window, beside its attention: the weights of its summary, sums of its rows.
#pragma once
#include "cuda/attention.cuh"
#include "cuda/reduce.cuh"

namespace quaver::gpu {

constexpr int kSummaryThreads = 128;

// The tokens of window number i of [B, H, W], as indexes of [B, H, T].
struct WindowTokens {
  int64_t length, window, windows;

  __device__ Range operator()(int64_t i) const {
    const int64_t of_head = i / windows * length, first = i % windows * window;
    return {of_head + first, of_head + min(first + window, length)};
  }
};

// This warp's first number and the step to its next one.
__device__ inline int64_t first_of_warp() { return (int64_t(blockIdx.x) * kSummaryThreads + threadIdx.x) / 32; }
__device__ inline int64_t warps_of_grid() { return int64_t(gridDim.x) * kSummaryThreads / 32; }

// weights = the softmax of select over its `most` largest in a window, ties to the lowest index, 0 elsewhere; [B, H,
// T].
template <class C>
__global__ void __launch_bounds__(kSummaryThreads)
    summary_weights_kernel(C* weights, const C* select, WindowTokens tokens, int64_t count, int64_t most) {
  const int lane = int(threadIdx.x) % 32;
  for (int64_t i = first_of_warp(); i < count; i += warps_of_grid()) {
    const Range of = tokens(i);
    C largest = -kInfinity<C>;
    for (int64_t t = of.begin + lane; t < of.end; t += 32) largest = largest < select[t] ? select[t] : largest;
    for (int distance = 16; distance > 0; distance /= 2) {
      const C other = __shfl_xor_sync(0xffffffffu, largest, distance);
      largest = largest < other ? other : largest;
    }
    double sum = 0;
    for (int64_t t = of.begin + lane; t < of.end; t += 32) {
      const C own = select[t];
      int64_t before = 0;
      for (int64_t s = of.begin; most < of.end - of.begin && s < of.end; s++) {
        before += select[s] > own || (select[s] == own && s < t);
      }
      const C weight = before < most ? exponential<C>(own - largest) : C(0);
      weights[t] = weight;
      sum += double(weight);
    }
    sum = warp_sum(sum);
    for (int64_t t = of.begin + lane; t < of.end; t += 32) weights[t] = C(double(weights[t]) / sum);
  }
}

// of_select = weights * (of_weights - the sum over the window of weights * of_weights).
template <class C>
__global__ void __launch_bounds__(kSummaryThreads)
    select_gradient_kernel(C* of_select, const C* weights, const C* of_weights, WindowTokens tokens, int64_t count) {
  const int lane = int(threadIdx.x) % 32;
  for (int64_t i = first_of_warp(); i < count; i += warps_of_grid()) {
    const Range of = tokens(i);
    double sum = 0;
    for (int64_t t = of.begin + lane; t < of.end; t += 32) sum += double(weights[t]) * double(of_weights[t]);
    sum = warp_sum(sum);
    for (int64_t t = of.begin + lane; t < of.end; t += 32) {
      of_select[t] = C(double(weights[t]) * (double(of_weights[t]) - sum));
    }
  }
}

// summary [B, H, W, d] = the sums of the parts of each window, [B, H, tiles, d].
template <class T>
__global__ void __launch_bounds__(kSummaryThreads)
    add_parts_kernel(Target<T> summary, const compute_t<T>* partial, Tiling tiling, int64_t windows, int64_t count,
                     int width) {
  for (int64_t i = int64_t(blockIdx.x) * kSummaryThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kSummaryThreads) {
    const int64_t window = i / width % windows, head = i / width / windows;
    const int64_t first = window * tiling.parts, end = min(first + tiling.parts, tiling.count);
    compute_t<T> sum = 0;
    for (int64_t tile = first; tile < end; tile++) sum += partial[(head * tiling.count + tile) * width + i % width];
    summary.store(i, sum);
  }
}

// sums [B, H, W, d] of the rows of each window.
template <class T>
__global__ void __launch_bounds__(kSummaryThreads)
    sum_rows_kernel(T* sums, Heads<const T> rows, int64_t heads, WindowTokens tokens, int64_t count, int width) {
  constexpr int kTogether = 8;  // the gradient of a gate is made of these: sums of a few rows, and of those
  for (int64_t i = int64_t(blockIdx.x) * kSummaryThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kSummaryThreads) {
    const int64_t window = i / width % tokens.windows, head = i / width / tokens.windows;
    const T* from = rows.at(head / heads, head % heads) + i % width;
    const int64_t first = window * tokens.window, end = min(first + tokens.window, tokens.length);
    compute_t<T> sum = 0;
    for (int64_t t = first; t < end; t += kTogether) {
      compute_t<T> few = 0;
      for (int64_t r = t; r < min(t + kTogether, end); r++) few += widen(from[r * rows.token]);
      sum += few;
    }
    sums[i] = narrow<T>(sum);
  }
}

// The rows of each window += gate * e; a thread to 16 bytes of a row.
template <class T>
__global__ void __launch_bounds__(kSummaryThreads)
    add_exchanged_kernel(Heads<T> out, const T* e, const compute_t<T>* gate, int64_t heads, WindowTokens tokens,
                         int64_t count, int width) {
  const int pieces = (width + kPiece<T> - 1) / kPiece<T>;
  for (int64_t i = int64_t(blockIdx.x) * kSummaryThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kSummaryThreads) {
    // Heads before tokens, as they most often lie in memory.
    const int at = int(i % pieces) * kPiece<T>;
    const int64_t head = i / pieces % heads, t = i / pieces / heads % tokens.length;
    const int64_t batch = i / pieces / heads / tokens.length;
    T* to = out.at(batch, head) + t * out.token + at;
    const T* from = e + ((batch * heads + head) * tokens.windows + t / tokens.window) * width + at;
    const auto factor = gate[head];
    const int present = min(kPiece<T>, width - at);
    if (out.packed && width % kPiece<T> == 0) {
      struct alignas(16) Piece {
        T values[kPiece<T>];
      };
      Piece sum = *reinterpret_cast<const Piece*>(to);
      const Piece added = *reinterpret_cast<const Piece*>(from);
      for (int j = 0; j < kPiece<T>; j++) {
        sum.values[j] = narrow<T>(fused(factor, widen(added.values[j]), widen(sum.values[j])));
      }
      *reinterpret_cast<Piece*>(to) = sum;
    } else {
      for (int j = 0; j < present; j++) to[j] = narrow<T>(fused(factor, widen(from[j]), widen(to[j])));
    }
  }
}

// of_z = factor * (of_keys + the of_queries of the windows whose source a window is), a warp to a row of [B, H, W, d].
// factor: gate[h], or 1 without one.
template <class T>
__global__ void __launch_bounds__(kSummaryThreads)
    source_gradient_kernel(Target<T> of_z, const compute_t<T>* of_keys, const compute_t<T>* of_queries, Sources sources,
                           const compute_t<T>* gate, int64_t heads, int64_t count, int width) {
  using C = compute_t<T>;
  constexpr int kColumns = 4;  // 128 of a row
  const int lane = int(threadIdx.x) % 32;
  for (int64_t i = first_of_warp(); i < count; i += warps_of_grid()) {
    const int64_t window = i % sources.windows, head = i / sources.windows, batch = head / heads;
    const C* queries = of_queries + head * sources.windows * width;
    C sums[kColumns];
    for (int c = 0; c < kColumns; c++) sums[c] = lane + 32 * c < width ? of_keys[i * width + lane + 32 * c] : C(0);
    // Without indexes there is one at most.
    const int64_t only = window + (sources.causal ? 1 : 0);
    const int64_t begin = sources.indexes ? 0 : only, end = sources.indexes ? sources.windows : only + 1;
    for (int64_t w = begin; w < min(end, sources.windows); w += 32) {
      const bool hit = w + lane < min(end, sources.windows) && sources.row(batch, w + lane) == window;
      for (uint32_t hits = __ballot_sync(0xffffffffu, hit); hits; hits &= hits - 1) {
        const C* row = queries + (w + __ffs(int(hits)) - 1) * width;
        for (int c = 0; c < kColumns; c++) {
          if (lane + 32 * c < width) sums[c] += row[lane + 32 * c];
        }
      }
    }
    const C factor = gate ? gate[head % heads] : C(1);
    for (int c = 0; c < kColumns; c++) {
      if (lane + 32 * c < width) of_z.store(i * width + lane + 32 * c, factor * sums[c]);
    }
  }
}

// of_gate[h], a block each: the sum of values [B, H, W] over batches and windows.
template <class C>
__global__ void __launch_bounds__(kSummaryThreads)
    gate_gradient_kernel(C* of_gate, const C* values, int64_t batches, int64_t windows) {
  const int64_t heads = gridDim.x, head = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < batches * windows; i += kSummaryThreads) {
    sum += double(values[(i / windows * heads + head) * windows + i % windows]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) of_gate[head] = C(sum);
}

template <class T>
__global__ void __launch_bounds__(kSummaryThreads) narrow_kernel(T* to, const compute_t<T>* from, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * kSummaryThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kSummaryThreads) {
    to[i] = narrow<T>(from[i]);
  }
}

}  // namespace quaver::gpu
