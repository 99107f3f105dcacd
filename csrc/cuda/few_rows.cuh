// Products with perturbed weights for few rows of x: a weight is read once, its noise made once in the registers of the
// thread that multiplies it, on tensor cores. Nothing of the weight's size is stored and no thread waits for another
// before its sums are whole. Bound by the noise (normals) or by memory (signs).
#pragma once
#include "cuda/gpu_tensor.h"
#include "cuda/perturb.h"
#include "cuda/reduce.cuh"

namespace quaver::gpu {

constexpr int kFewThreads = 256, kFewWarps = kFewThreads / 32;
constexpr int kOctet = 8;     // weights that a thread reads and perturbs at a time: 16 bytes of 16-bit ones
constexpr int kTogether = 2;  // members whose products share the weights in registers, and the noise of one seed

// What these kernels read of the weights. C is float: float64 takes another way.
template <class V>
struct FewWeights {
  const V* data;
  Sigma<float> sigma;
  Seeds seeds;
  Placement place;
  int64_t members;
};

// Weights of T (or float32) in octets, two in a 32-bit register as T.
template <class T>
struct Octet {
  uint32_t pairs[kOctet / 2];
};

template <class T>
__device__ uint32_t pair_of(float first, float second) {
  return narrow<T>(first).bits | uint32_t(narrow<T>(second).bits) << 16;
}

template <class T>
__device__ void load_octet(const T* from, T (&out)[kOctet]) {
  constexpr int kSize = Pack<T>::kSize;
#pragma unroll
  for (int i = 0; i < kOctet / kSize; i++) {
    const Pack<T> pack = reinterpret_cast<const Pack<T>*>(from)[i];
#pragma unroll
    for (int j = 0; j < kSize; j++) out[i * kSize + j] = pack.values[j];
  }
}

// The noise of an octet. A block of signs lasts for 16 octets: the last one is kept, for the next octet of the row.
template <class Noise>
struct OctetNoise {
  __device__ void make(const Source& source, uint64_t element, float (&out)[kOctet]) {
    Noise::make(source, element / kOctet, out);
  }
};
template <>
struct OctetNoise<Signs> {
  Words words;
  uint64_t block = ~uint64_t(0);
  uint64_t seed = 0;

  __device__ void make(const Source& source, uint64_t element, float (&out)[kOctet]) {
    if (element / 128 != block || source.seed != seed) {
      block = element / 128;
      seed = source.seed;
      words = philox(block, source.stream, source.domain, seed);
    }
    const uint32_t bits = word_of(words, element) >> (element % 32);
#pragma unroll
    for (int i = 0; i < kOctet; i++) out[i] = sign_of_bit(bits >> i);
  }
};

// Row `row` of the weights from column `column` on, as read: zeros where there are none.
template <class V>
__device__ void read_octet(const FewWeights<V>& weights, int64_t row, int64_t column, V (&out)[kOctet]) {
  if (row < weights.place.rows && column < weights.place.columns) {
    load_octet(weights.data + row * weights.place.columns + column, out);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; i++) out[i] = V{};
  }
}

// W' of an octet, for one member: `noise` is its, `has` whether it exists.
template <class T, class V>
__device__ Octet<T> perturbed(const FewWeights<V>& weights, int64_t member, int64_t row, int64_t column,
                              const V (&values)[kOctet], const float (&noise)[kOctet]) {
  const Sigma<float>& sigma = weights.sigma;
  const bool has = row < weights.place.rows && column < weights.place.columns;
  const float* of_member = sigma.values + member * sigma.member_stride;
  float scale[kOctet];
  if (sigma.values && has && sigma.kind == SigmaShape::kElement) {
    load_octet(of_member + row * weights.place.columns + column, scale);
  } else {
    float one = sigma.value;
    if (sigma.values && has) one = of_member[sigma.kind == SigmaShape::kRow ? row : 0];
#pragma unroll
    for (int i = 0; i < kOctet; i++) scale[i] = one;
  }
  Octet<T> out;
#pragma unroll
  for (int i = 0; i < kOctet; i += 2) {
    const float first = add(widen(values[i]), multiply(scale[i], noise[i]));
    const float second = add(widen(values[i + 1]), multiply(scale[i + 1], noise[i + 1]));
    out.pairs[i / 2] = has ? pair_of<T>(first, second) : 0;
  }
  return out;
}

// Where a block's sums go: to the result, or with `splits` > 1 to float32 sums [splits, members, rows, columns].
template <class T>
struct FewResult {
  T* out;
  float* partial;
  const T* bias;        // null, or [members or 1, columns]
  int64_t bias_stride;  // of a member
  int64_t rows, columns;

  __device__ void store(int64_t split, int64_t members, int64_t member, int64_t row, int64_t column, float sum) const {
    const int64_t at = (member * rows + row) * columns + column;
    if (partial) {
      partial[split * members * rows * columns + at] = sum;
    } else {
      out[at] = narrow<T>(bias ? add(sum, widen(bias[member * bias_stride + column])) : sum);
    }
  }
};

// The sums of all warps, in order; `sums` is what a lane has of kTiles tiles. Calls body(tile, lane, number, sum) for
// what is this thread's. All threads of the block.
template <int kTiles, class Body>
__device__ void add_warps(const float (&sums)[kTiles][4], Body&& body) {
  constexpr int kEach = kTiles * 32;
  __shared__ float4 of_warps[kFewWarps][kEach];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
    of_warps[warp][i * 32 + lane] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < kEach; i += kFewThreads) {
    float4 total = of_warps[0][i];
    for (int w = 1; w < kFewWarps; w++) {
      const float4 next = of_warps[w][i];
      total = make_float4(add(total.x, next.x), add(total.y, next.y), add(total.z, next.z), add(total.w, next.w));
    }
    body(i / 32, i % 32, 0, total.x);
    body(i / 32, i % 32, 1, total.y);
    body(i / 32, i % 32, 2, total.z);
    body(i / 32, i % 32, 3, total.w);
  }
  __syncthreads();  // before the next call writes `of_warps`
}

// The grid: x first the pairs of members and the blocks of rows of x, so that blocks that share weights run at the same
// time; y the blocks of the result's columns; z the splits of the depth.
struct FewPlace {
  int64_t first_row, first_member, split, splits;

  __device__ FewPlace(int64_t members, int64_t rows_of_block) {
    const int64_t pairs = (members + kTogether - 1) / kTogether;
    first_member = blockIdx.x % pairs * kTogether;
    first_row = blockIdx.x / pairs * rows_of_block;
    split = blockIdx.z;
    splits = gridDim.z;
  }
};

// The sources of a pair of members; a member that is not there has its neighbour's.
struct Pair {
  Source sources[kTogether];
  bool one_seed;

  __device__ Pair(const Seeds& seeds, int64_t first, int64_t members)
      : sources{seeds[first], seeds[min(first + 1, members - 1)]}, one_seed(sources[0].seed == sources[1].seed) {}
};

template <class V>
__device__ uint64_t element_of(const FewWeights<V>& weights, int64_t row, int64_t column) {
  return weights.place.first + uint64_t(row) * uint64_t(weights.place.row_length) + uint64_t(column);
}

// ---- x W'^T --------------------------------------------------------------------------------------------------------
constexpr int kForwardTiles = 4;                 // of 8 rows of x
constexpr int kForwardRows = 8 * kForwardTiles;  // of x, in a block
constexpr int kForwardColumns = 16;              // of the result, rows of the weights, in a block
constexpr int kForwardDepth = 4 * kOctet;        // of a step of a warp: four lanes share a row

// Weights are the left operand of the tensor core, so that one row of x leaves 7 of 8 columns idle, not 15 of 16 rows.
// A product does not mind the order of its depth: lane t of the four of a row takes octet t, and calls its pairs the
// depths 2t, 2t + 1, 2t + 8, 2t + 9 of two products.
template <class T, class V, class Noise>
__global__ void __launch_bounds__(kFewThreads, 1)  // left to itself nvcc spills to make room for two
    few_rows_kernel(FewResult<T> result, const T* x, int64_t x_stride, int64_t x_member_stride, FewWeights<V> weights) {
  // Steps that follow each other in a warp: those of one block of signs.
  constexpr int kRun = std::is_same_v<Noise, Signs> ? 4 : 1;
  const FewPlace at(weights.members, kForwardRows);
  const Pair pair(weights.seeds, at.first_member, weights.members);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, group = lane / 4;
  const int64_t row = int64_t(blockIdx.y) * kForwardColumns + group;
  const int64_t runs = (weights.place.columns + kForwardDepth * kRun - 1) / (kForwardDepth * kRun);
  const int64_t first_run = runs * at.split / at.splits, last_run = runs * (at.split + 1) / at.splits;
  OctetNoise<Noise> makers[kTogether][2];
  float sums[kTogether][kForwardTiles][4] = {};
  for (int64_t run = first_run + warp; run < last_run; run += kFewWarps) {
    for (int64_t step = run * kRun; step < (run + 1) * kRun; step++) {
      const int64_t column = step * kForwardDepth + lane % 4 * kOctet;
      const bool has = column < weights.place.columns;
      V values[2][kOctet];
#pragma unroll
      for (int h = 0; h < 2; h++) read_octet(weights, row + 8 * h, column, values[h]);
      Octet<T> w[kTogether][2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float noise[kOctet];
#pragma unroll
        for (int m = 0; m < kTogether; m++) {
          const int64_t member = at.first_member + m;
          if (member >= weights.members) break;
          if (m == 0 || !pair.one_seed) {
            makers[m][h].make(pair.sources[m], element_of(weights, row + 8 * h, column), noise);
          }
          w[m][h] = perturbed<T>(weights, member, row + 8 * h, column, values[h], noise);
        }
      }
#pragma unroll
      for (int m = 0; m < kTogether; m++) {
        const int64_t member = at.first_member + m;
        if (member >= weights.members) break;
        const Octet<T>&one = w[m][0], &two = w[m][1];
        const uint32_t low[4] = {one.pairs[0], two.pairs[0], one.pairs[1], two.pairs[1]};
        const uint32_t high[4] = {one.pairs[2], two.pairs[2], one.pairs[3], two.pairs[3]};
#pragma unroll
        for (int tile = 0; tile < kForwardTiles; tile++) {
          if (at.first_row + 8 * tile >= result.rows) break;
          const int64_t of_x = at.first_row + 8 * tile + group;
          uint4 pairs = make_uint4(0, 0, 0, 0);
          if (has && of_x < result.rows) {
            pairs = *reinterpret_cast<const uint4*>(x + member * x_member_stride + of_x * x_stride + column);
          }
          multiply_add<T>(sums[m][tile], low, pairs.x, pairs.y);
          multiply_add<T>(sums[m][tile], high, pairs.z, pairs.w);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTogether; m++) {
    const int64_t member = at.first_member + m;
    if (member >= weights.members) break;
    add_warps(sums[m], [&](int tile, int of_lane, int number, float sum) {
      const int64_t of_x = at.first_row + 8 * tile + of_lane % 4 * 2 + number % 2;
      const int64_t column = int64_t(blockIdx.y) * kForwardColumns + of_lane / 4 + number / 2 * 8;
      if (of_x < result.rows && column < result.columns) {
        result.store(at.split, weights.members, member, of_x, column, sum);
      }
    });
  }
}

// ---- grad W' -------------------------------------------------------------------------------------------------------
constexpr int kBackwardTiles = 2;                  // of 8 rows of grad
constexpr int kBackwardRows = 8 * kBackwardTiles;  // of grad, in a block
constexpr int kBackwardColumns = 8 * kOctet;       // of the result and of the weights, in a block: an octet a group
constexpr int kBackwardDepth = 16;                 // rows of the weights in a step of a warp

// Lane (g, t) takes octet g of the rows 4t .. 4t + 3 of a step. The result's columns 8g + 2j, 8g + 2j + 1 are rows g
// and g + 8 of part j of four: a part's registers are the low, then the high halves of two rows' j-th pair.
template <class T, class V, class Noise>
__global__ void __launch_bounds__(kFewThreads)
    few_rows_input_gradient_kernel(FewResult<T> result, const T* grad, int64_t grad_stride, int64_t grad_member_stride,
                                   FewWeights<V> weights) {
  constexpr int kParts = kOctet / 2, kEach = kBackwardTiles * kParts, kRows = 4;
  const FewPlace at(weights.members, kBackwardRows);
  const Pair pair(weights.seeds, at.first_member, weights.members);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, group = lane / 4;
  const int64_t column = int64_t(blockIdx.y) * kBackwardColumns + group * kOctet;
  const int64_t steps = (weights.place.rows + kBackwardDepth - 1) / kBackwardDepth;
  const int64_t first_step = steps * at.split / at.splits, last_step = steps * (at.split + 1) / at.splits;
  float sums[kTogether][kEach][4] = {};
  for (int64_t step = first_step + warp; step < last_step; step += kFewWarps) {
    const int64_t row = step * kBackwardDepth + lane % 4 * kRows;
    Octet<T> w[kTogether][kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      V values[kOctet];
      float noise[kOctet];
      read_octet(weights, row + r, column, values);
#pragma unroll
      for (int m = 0; m < kTogether; m++) {
        const int64_t member = at.first_member + m;
        if (member >= weights.members) break;
        if (m == 0 || !pair.one_seed) {
          Noise::make(pair.sources[m], element_of(weights, row + r, column) / kOctet, noise);
        }
        w[m][r] = perturbed<T>(weights, member, row + r, column, values, noise);
      }
    }
#pragma unroll
    for (int m = 0; m < kTogether; m++) {
      const int64_t member = at.first_member + m;
      if (member >= weights.members) break;
#pragma unroll
      for (int tile = 0; tile < kBackwardTiles; tile++) {
        if (at.first_row + 8 * tile >= result.rows) break;
        const int64_t of_grad = at.first_row + 8 * tile + group;
        uint2 pairs = make_uint2(0, 0);
        if (row < weights.place.rows && of_grad < result.rows) {
          pairs = *reinterpret_cast<const uint2*>(grad + member * grad_member_stride + of_grad * grad_stride + row);
        }
#pragma unroll
        for (int part = 0; part < kParts; part++) {
          const uint32_t one = w[m][0].pairs[part], two = w[m][1].pairs[part];
          const uint32_t three = w[m][2].pairs[part], four = w[m][3].pairs[part];
          const uint32_t a[4] = {__byte_perm(one, two, 0x5410), __byte_perm(one, two, 0x7632),
                                 __byte_perm(three, four, 0x5410), __byte_perm(three, four, 0x7632)};
          multiply_add<T>(sums[m][tile * kParts + part], a, pairs.x, pairs.y);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTogether; m++) {
    const int64_t member = at.first_member + m;
    if (member >= weights.members) break;
    add_warps(sums[m], [&](int each, int of_lane, int number, float sum) {
      const int tile = each / kParts, part = each % kParts;
      const int64_t of_grad = at.first_row + 8 * tile + of_lane % 4 * 2 + number % 2;
      const int64_t to = int64_t(blockIdx.y) * kBackwardColumns + of_lane / 4 * kOctet + 2 * part + number / 2;
      if (of_grad < result.rows && to < result.columns) {
        result.store(at.split, weights.members, member, of_grad, to, sum);
      }
    });
  }
}

// ---- float32 and float64 -------------------------------------------------------------------------------------------
constexpr int kDotRows = 8;  // of x

// x W'^T by dot products: a warp takes a row of the weights, members next to each other.
template <class C, class Noise>
__global__ void __launch_bounds__(kThreads)
    dot_rows_kernel(C* out, const C* x, int64_t x_stride, int64_t x_member_stride, int64_t rows, const C* bias,
                    int64_t bias_stride, const C* weight, Sigma<C> sigma, Seeds seeds, Placement place,
                    int64_t members) {
  constexpr int G = kGroup<C>;
  const int64_t task = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32, number = task / members;
  const int lane = int(threadIdx.x) % 32;
  if (number >= place.rows) return;
  const int64_t member = task % members;
  const Source source = seeds[member];
  const Row row(place, number);
  const C* of_member = sigma.values + member * sigma.member_stride;
  const C* of_x = x + member * x_member_stride;
  const bool elementwise = sigma.kind == SigmaShape::kElement;
  C one = sigma.value;
  if (sigma.values && !elementwise) one = of_member[sigma.kind == SigmaShape::kRow ? number : 0];
  const bool packed = row.is_packed<G>(weight) && (!elementwise || row.is_packed<G>(of_member));
  const bool packed_x = x_stride % G == 0 && reinterpret_cast<uintptr_t>(of_x - row.lead<G>()) % 16 == 0;
  C sums[kDotRows] = {};
  for (int64_t g = lane; g < row.groups<G>(); g += 32) {
    const Part part = part_of<G>(row, packed, g);
    C values[G], scale[G];
    load(weight, part, values);
    if (elementwise) {
      load(of_member, part, scale);
    } else {
      for (int i = 0; i < G; i++) scale[i] = one;
    }
    float noise[G];
    Noise::make(source, part.group, noise);
    for (int i = 0; i < G; i++) values[i] = add(values[i], multiply(scale[i], C(noise[i])));
    Part of_row = part;
    of_row.packed = packed_x && uint64_t(part.column) <= uint64_t(place.columns - G) && place.columns >= G;
#pragma unroll
    for (int r = 0; r < kDotRows; r++) {
      if (r >= rows) break;
      C factors[G];
      of_row.at = r * x_stride + part.column;
      load(of_x, of_row, factors);
      for (int i = 0; i < G; i++) {
        if (part.has(i)) sums[r] = add(sums[r], multiply(values[i], factors[i]));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kDotRows; r++) {
    if (r >= rows) break;
    double sum = warp_sum(double(sums[r]));
    if (bias) sum = add(sum, double(bias[member * bias_stride + number]));
    if (lane == 0) out[(member * rows + r) * place.rows + number] = C(sum);
  }
}

// ---- splits --------------------------------------------------------------------------------------------------------
// out[i] = the sum of partial[s, i] over splits (and, where they are added, members) in order, with the bias.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_splits_kernel(FewResult<T> result, int64_t splits, int64_t members) {
  const int64_t size = members * result.rows * result.columns;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += int64_t(gridDim.x) * blockDim.x) {
    float sum = 0;
    for (int64_t s = 0; s < splits; s++) sum = add(sum, result.partial[s * size + i]);
    if (result.bias) {
      const int64_t member = i / (result.rows * result.columns);
      sum = add(sum, widen(result.bias[member * result.bias_stride + i % result.columns]));
    }
    result.out[i] = narrow<T>(sum);
  }
}

}  // namespace quaver::gpu
