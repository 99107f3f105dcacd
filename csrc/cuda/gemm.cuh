// Tiles of a matrix product: operands come to shared memory by asynchronous copies, a few steps ahead of their use, and
// are multiplied by tensor cores (16-bit types) or by fused multiply-adds (float32, float64: no rounding to TF32).
#pragma once
#include "cuda/gpu_tensor.h"
#include "cuda/target.cuh"

namespace quaver::gpu {

constexpr int kGemmThreads = 128;  // two by two warps
// Buffers of a tile. Two steps are under way while one is used: 64 bytes of depth are 300 to 600 cycles of tensor cores
// in three blocks of an SM, about the latency of memory.
constexpr int kStages = 3;

// One side of a product: `rows` by `depth`, stored by rows or, by_depth, as its transpose.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;         // of a stored line
  int64_t member_stride;  // 0: shared by the members
  int64_t rows, depth;
  bool packed;  // every 16 bytes of a line are at a multiple of 16
  static constexpr bool kGrouped = false;

  Operand(const T* data, int64_t stride, int64_t member_stride, int64_t rows, int64_t depth)
      : data(data), stride(stride), member_stride(member_stride), rows(rows), depth(depth) {
    constexpr int64_t kPiece = 16 / sizeof(T);
    packed = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kPiece == 0 && member_stride % kPiece == 0;
  }

  __device__ const T* address(const T* member, int64_t line, int64_t at) const { return member + line * stride + at; }
};

// The same with a line in groups of `group` elements, `group_stride` apart: a line of `up` [2n, N, r] is a row of all
// its factors side by side.
template <class T>
struct GroupedOperand : Operand<T> {
  uint32_t group;
  int64_t group_stride;
  bool halves;  // every 8 bytes of a group are at a multiple of 8
  static constexpr bool kGrouped = true;

  GroupedOperand(const Operand<T>& lines, int64_t group, int64_t group_stride)
      : Operand<T>(lines), group(uint32_t(group)), group_stride(group_stride) {
    constexpr int64_t kHalf = 8 / sizeof(T);
    this->packed = this->packed && group % (2 * kHalf) == 0 && group_stride % (2 * kHalf) == 0;
    halves = reinterpret_cast<uintptr_t>(this->data) % 8 == 0 && this->stride % kHalf == 0 && group % kHalf == 0 &&
             group_stride % kHalf == 0 && this->member_stride % kHalf == 0;
  }

  __device__ const T* address(const T* member, int64_t line, int64_t at) const {
    const uint32_t number = uint32_t(at) / group;
    return member + number * group_stride + line * this->stride + (uint32_t(at) - number * group);
  }
};

// The tile of a block: 2 x 2 warps of kI x kJ parts of 16 x 8, which a warp's lanes share as a tensor core's results.
template <int kI_, int kJ_>
struct Shape {
  static constexpr int kI = kI_, kJ = kJ_, kRows = 32 * kI, kColumns = 16 * kJ;
};
using SmallTile = Shape<2, 4>;  // 64 x 64
using LargeTile = Shape<4, 8>;  // 128 x 128

template <class T>
constexpr int kStepDepth = 64 / sizeof(T);

// A step's tile of an operand in shared memory, stored as the operand is. Lines are 16 bytes longer than what they
// hold: eight of them then begin in different banks.
template <class T, int kRows, bool kByDepth>
struct Tile {
  static constexpr int kPiece = 16 / sizeof(T);
  static constexpr int kLines = kByDepth ? kStepDepth<T> : kRows, kLength = kByDepth ? kRows : kStepDepth<T>;
  T lines[kLines][kLength + kPiece];

  __device__ T at(int row, int k) const { return kByDepth ? lines[k][row] : lines[row][k]; }

  // Starts to fill the tile with rows from `row` and depths from `k` on; zeros stand where there are none.
  template <class From>
  __device__ void fetch(const From& from, const T* member, int64_t row, int64_t k) {
    constexpr int kPieces = kLength / kPiece;
    static_assert(kLines * kPieces % kGemmThreads == 0);
    const int64_t first_line = kByDepth ? k : row, first = kByDepth ? row : k;
    const int64_t lines_left = (kByDepth ? from.depth : from.rows) - first_line;
    const int64_t length_left = (kByDepth ? from.rows : from.depth) - first;
#pragma unroll
    for (int i = 0; i < kLines * kPieces; i += kGemmThreads) {
      const int piece = i + int(threadIdx.x), line = piece / kPieces, at = piece % kPieces * kPiece;
      const int64_t left = line < lines_left ? length_left - at : 0;
      const int count = int(max(int64_t(0), min(int64_t(kPiece), left)));
      T* to = &lines[line][at];
      const auto source = [&](int j) { return from.address(member, first_line + line, first + at + j); };
      if (from.packed) {
        copy_async(to, count ? source(0) : from.data, count * int(sizeof(T)));
        continue;
      }
      if constexpr (From::kGrouped) {
        if (from.halves) {
          constexpr int kHalf = kPiece / 2;
#pragma unroll
          for (int j = 0; j < kPiece; j += kHalf) {
            const int has = max(0, min(kHalf, count - j));
            copy_async_8(to + j, has ? source(j) : from.data, has * int(sizeof(T)));
          }
          continue;
        }
      }
      for (int j = 0; j < kPiece; j++) to[j] = j < count ? *source(j) : T{};
    }
  }
};

__device__ inline float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused_multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

// What a thread has of its block's tile of sums: the pairs of columns (row, column), (row, column + 1).
template <class T, class S>
struct Sums {
  using C = compute_t<T>;
  C values[S::kI][S::kJ][4] = {};

  __device__ void add(const Sums& other) {
#pragma unroll
    for (int i = 0; i < S::kI * S::kJ * 4; i++) {
      C& sum = values[i / 4 / S::kJ][i / 4 % S::kJ][i % 4];
      sum = quaver::add(sum, other.values[i / 4 / S::kJ][i / 4 % S::kJ][i % 4]);
    }
  }

  // Calls body(row, column, first, second) for each pair; row and column within the tile.
  template <class Body>
  __device__ void for_pairs(Body&& body) {
    for_places([&](int, int, int row, int column, C& first, C& second) { body(row, column, first, second); });
  }

  // The same with the number of this thread's row and of its pair of columns before them.
  template <class Body>
  __device__ void for_places(Body&& body) {
    const int row = first_row(), column = first_column();
#pragma unroll
    for (int i = 0; i < S::kI; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int j = 0; j < S::kJ; j++) {
          C(&value)[4] = values[i][j];
          body(2 * i + half, j, row + 16 * i + 8 * half, column + 8 * j, value[2 * half], value[2 * half + 1]);
        }
      }
    }
  }

  // This thread's first row and first column.
  __device__ static int first_row() { return int(threadIdx.x) / 32 % 2 * 16 * S::kI + int(threadIdx.x) % 32 / 4; }
  __device__ static int first_column() { return int(threadIdx.x) / 64 * 8 * S::kJ + int(threadIdx.x) % 4 * 2; }
};

// What the first operand is multiplied by along the depth, as it leaves shared memory: nothing, or a value each.
struct NoFactors {
  static constexpr bool kAny = false;
};
template <class C>
struct DepthFactors {
  const C* values;  // null: 1
  int64_t stride, depth;
  static constexpr bool kAny = true;

  __device__ C operator[](int64_t k) const { return k < depth ? values[k * stride] : C(0); }
};

template <class T>
__device__ uint32_t scaled_pair(uint32_t pair, float first, float second) {
  const float low = multiply(widen(T{uint16_t(pair)}), first);
  const float high = multiply(widen(T{uint16_t(pair >> 16)}), second);
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  }
#else
  return narrow<T>(low).bits | uint32_t(narrow<T>(high).bits) << 16;
#endif
}

template <class T, class S, bool kAByDepth, bool kBByDepth>
struct Gemm {
  using TileA = Tile<T, S::kRows, kAByDepth>;
  using TileB = Tile<T, S::kColumns, kBByDepth>;
  struct Buffers {
    TileA a[kStages];
    TileB b[kStages];
  };

  // sums += a b^T for the tile of rows from `row` on and columns (rows of b) from `column` on, of one member. Ends with
  // all threads done with the buffers.
  __device__ static void accumulate(Sums<T, S>& sums, Buffers& buffers, const Operand<T>& a, const Operand<T>& b,
                                    int64_t member, int64_t row, int64_t column) {
    accumulate(sums, buffers, a, b, member, row, column, 0, steps(a));
  }

  template <class A>
  __host__ __device__ static int64_t steps(const A& a) {
    return (a.depth + kStepDepth<T> - 1) / kStepDepth<T>;
  }

  // The same for the steps of the depth from `first` to before `last`.
  template <class A, class B, class Factors = NoFactors>
  __device__ static void accumulate(Sums<T, S>& sums, Buffers& buffers, const A& a, const B& b, int64_t member,
                                    int64_t row, int64_t column, int64_t first, int64_t last,
                                    const Factors& factors = {}) {
    const T *of_a = a.data + member * a.member_stride, *of_b = b.data + member * b.member_stride;
    const int64_t steps = last - first;
    const auto fetch = [&](int64_t step) {
      if (step < steps) {
        const int buffer = int(step % kStages);
        const int64_t k = (first + step) * kStepDepth<T>;
        buffers.a[buffer].fetch(a, of_a, row, k);
        buffers.b[buffer].fetch(b, of_b, column, k);
      }
      commit_copies();
    };
    [[maybe_unused]] Sums<T, S> part;
    for (int64_t step = 0; step < kStages - 1; step++) fetch(step);
    for (int64_t step = 0; step < steps; step++) {
      await_copies<kStages - 2>();
      __syncthreads();  // the step's copies are there for all, and all are done with the step before: its buffer is
                        // free
      fetch(step + kStages - 1);
      const int64_t k = (first + step) * kStepDepth<T>;
      if constexpr (std::is_same_v<T, float>) {
        multiply(part, buffers.a[step % kStages], buffers.b[step % kStages], factors, k);
        if (step % kStepsOfPart == kStepsOfPart - 1 || step == steps - 1) {
          sums.add(part);
          part = {};
        }
      } else {
        multiply(sums, buffers.a[step % kStages], buffers.b[step % kStages], factors, k);
      }
    }
    __syncthreads();  // before the next member's copies
  }

 private:
  // float32 is added in parts of 128 of the depth: one running sum of 1300 products has twice eager's error.
  static constexpr int kStepsOfPart = 8;

  // `first`: of the tiles' depth, for the factors.
  template <class Factors>
  __device__ static void multiply(Sums<T, S>& sums, const TileA& a, const TileB& b,
                                  [[maybe_unused]] const Factors& factors, [[maybe_unused]] int64_t first) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int row = warp % 2 * 16 * S::kI, column = warp / 2 * 8 * S::kJ;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < kStepDepth<T>; k += 16) {
        uint32_t of_a[S::kI][4];
#pragma unroll
        for (int i = 0; i < S::kI; i++) {
          if constexpr (kAByDepth) {
            load_transposed(of_a[i], &a.lines[k + lane % 8 + lane / 16 * 8][row + 16 * i + lane / 8 % 2 * 8]);
          } else {
            load_matrices(of_a[i], &a.lines[row + 16 * i + lane % 16][k + lane / 16 * 8]);
          }
        }
        if constexpr (Factors::kAny) {
          if (factors.values) {
            const int64_t at = first + k + lane % 4 * 2;
            const float of[4] = {factors[at], factors[at + 1], factors[at + 8], factors[at + 9]};
#pragma unroll
            for (int i = 0; i < 4 * S::kI; i++) {
              uint32_t& pair = of_a[i / 4][i % 4];
              pair = scaled_pair<T>(pair, of[i % 4 / 2 * 2], of[i % 4 / 2 * 2 + 1]);
            }
          }
        }
#pragma unroll
        for (int j = 0; j < S::kJ; j += 2) {
          uint32_t of_b[4];
          if constexpr (kBByDepth) {
            load_transposed(of_b, &b.lines[k + lane % 16][column + 8 * j + lane / 16 * 8]);
          } else {
            load_matrices(of_b, &b.lines[column + 8 * j + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
          }
#pragma unroll
          for (int i = 0; i < S::kI; i++) {
            multiply_add<T>(sums.values[i][j], of_a[i], of_b[0], of_b[1]);
            multiply_add<T>(sums.values[i][j + 1], of_a[i], of_b[2], of_b[3]);
          }
        }
      }
    } else {
#pragma unroll 4
      for (int k = 0; k < kStepDepth<T>; k++) {
        T of_a[S::kI][2], of_b[S::kJ][2];
#pragma unroll
        for (int i = 0; i < 2 * S::kI; i++) of_a[i / 2][i % 2] = a.at(row + 8 * i + lane / 4, k);
        if constexpr (Factors::kAny) {
          const T factor = factors.values ? factors[first + k] : T(1);
#pragma unroll
          for (int i = 0; i < 2 * S::kI; i++) of_a[i / 2][i % 2] = quaver::multiply(of_a[i / 2][i % 2], factor);
        }
#pragma unroll
        for (int j = 0; j < 2 * S::kJ; j++) of_b[j / 2][j % 2] = b.at(column + j / 2 * 8 + lane % 4 * 2 + j % 2, k);
#pragma unroll
        for (int i = 0; i < S::kI; i++) {
#pragma unroll
          for (int j = 0; j < S::kJ; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
              T& sum = sums.values[i][j][c];
              sum = fused_multiply_add(of_a[i][c / 2], of_b[j][c % 2], sum);
            }
          }
        }
      }
    }
  }
};

// What becomes of the sums of a product.
template <class T>
struct GemmResult {
  Target<T> out;
  int64_t member_stride;
  const T* bias;  // null, or [members or 1, columns]
  int64_t bias_stride;
  bool adds;  // to what a wide `out` has
};

// out [a.rows, b.rows] = a b^T + bias, for a member each z of the grid; or added over `summed` members.
template <class T, class S, bool kAByDepth, bool kBByDepth>
__global__ void __launch_bounds__(kGemmThreads)
    gemm_kernel(GemmResult<T> result, Operand<T> a, Operand<T> b, int64_t summed) {
  using C = compute_t<T>;
  using Product = Gemm<T, S, kAByDepth, kBByDepth>;
  QUAVER_DYNAMIC_SHARED(typename Product::Buffers, buffers);
  const int64_t first_row = int64_t(blockIdx.x) * S::kRows, first_column = int64_t(blockIdx.y) * S::kColumns;
  const int64_t member = blockIdx.z;
  Sums<T, S> sums;
  for (int64_t p = 0; p < summed; p++) {
    Product::accumulate(sums, *buffers, a, b, member + p, first_row, first_column);
  }
  const T* bias = result.bias + member * result.bias_stride + first_column;
  sums.for_pairs([&](int row, int column, C& first, C& second) {
    const bool has_second = first_column + column + 1 < b.rows;
    if (first_row + row >= a.rows || first_column + column >= b.rows) return;
    if (result.bias) {
      first = quaver::add(first, widen(bias[column]));
      if (has_second) second = quaver::add(second, widen(bias[column + 1]));
    }
    const int64_t at = member * result.member_stride + (first_row + row) * b.rows + first_column + column;
    if (result.adds) {
      const C* old = static_cast<const C*>(result.out.data) + at;
      first = quaver::add(old[0], first);
      if (has_second) second = quaver::add(old[1], second);
    }
    result.out.store_pair(at, first, second, has_second);
  });
}

}  // namespace quaver::gpu
