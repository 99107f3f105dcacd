// The gradients of a perturbed linear layer's parameters. Those of sigma are sums of the weight's gradient times the
// noise, made again while a tile of that gradient is in shared memory: neither is stored.
#pragma once
#include "cuda/gemm.cuh"
#include "cuda/noise.cuh"
#include "cuda/reduce.cuh"

namespace quaver::gpu {

// Where the gradient of sigma goes.
template <class C>
struct SigmaTarget {
  C* elements;            // [N, K] of each value of sigma, or null
  int64_t member_stride;  // of elements; 0: members are added
  double* partial;        // [P, N, chunks]: sums of rows of a tile
  int64_t chunks;
};

// Shared memory: first the tiles of a product, then its results. Lines of those are 32 bytes longer than they need be:
// pairs of a half warp's four rows are in different banks.
template <class T>
union ParameterShared {
  typename Gemm<T, SmallTile, true, true>::Buffers buffers;
  compute_t<T> products[SmallTile::kRows][SmallTile::kColumns + 32 / sizeof(compute_t<T>)];
};
template <class T>
constexpr size_t kParameterShared = sizeof(ParameterShared<T>);

// A block has a tile of the weights and goes through the members, whose gradients differ only where their noise does.
template <class T, class Noise>
__global__ void __launch_bounds__(kGemmThreads)
    parameter_gradient_kernel(Target<T> weight, SigmaTarget<compute_t<T>> sigma, Operand<T> grad, Operand<T> x,
                              Seeds seeds, Placement place, int64_t members) {
  using C = compute_t<T>;
  using S = SmallTile;
  using Product = Gemm<T, S, true, true>;
  constexpr int kLanes = 16, G = kGroup<C>;
  QUAVER_DYNAMIC_SHARED(ParameterShared<T>, shared);
  const int64_t first_row = int64_t(blockIdx.y) * S::kRows, first_column = int64_t(blockIdx.x) * S::kColumns;
  const int columns = int(min(int64_t(S::kColumns), place.columns - first_column));
  Sums<T, S> total;
  for (int64_t member = 0; member < members; member++) {
    Sums<T, S> sums;
    Product::accumulate(sums, shared->buffers, grad, x, member, first_row, first_column);
    sums.for_pairs([&](int row, int column, C& first, C& second) {
      shared->products[row][column] = first;
      shared->products[row][column + 1] = second;
    });
    total.add(sums);
    __syncthreads();
    const Source source = seeds[member];
    // Half a warp takes a row.
    for (int row = int(threadIdx.x) / kLanes; row < S::kRows; row += kGemmThreads / kLanes) {
      const int64_t number = first_row + row;
      Row run(place, number);
      run.first += uint64_t(first_column);
      run.columns = number < place.rows ? columns : 0;
      const int64_t in_result = number * place.columns + first_column;
      const bool packed = run.columns >= G && run.lead<G>() == 0;  // lines of `products` are multiples of 16 bytes
      C sum = 0;
      for (int64_t g = int(threadIdx.x) % kLanes; g < run.groups<G>(); g += kLanes) {
        Part part = part_of<G>(run, packed, g);
        part.at = part.column;
        C products[G], old[G] = {};
        load(shared->products[row], part, products);
        float noise[G];
        Noise::make(source, part.group, noise);
        for (int i = 0; i < G; i++) products[i] = part.has(i) ? multiply(products[i], C(noise[i])) : C(0);
        if (sigma.elements) {
          part.at = in_result + part.column;
          C* to = sigma.elements + member * sigma.member_stride;
          part.packed = part.packed && reinterpret_cast<uintptr_t>(to + in_result) % 16 == 0;
          if (member > 0 && sigma.member_stride == 0) load(static_cast<const C*>(to), part, old);
          for (int i = 0; i < G; i++) products[i] = add(old[i], products[i]);
          store(to, part, products);
        }
        for (int i = 0; i < G; i++) sum = add(sum, products[i]);
      }
      if (sigma.partial) {
        double of_row = double(sum);
        for (int distance = kLanes / 2; distance > 0; distance /= 2) {
          of_row = add(of_row, __shfl_xor_sync(0xffffffffu, of_row, distance));
        }
        if (threadIdx.x % kLanes == 0 && number < place.rows) {
          sigma.partial[(member * place.rows + number) * sigma.chunks + blockIdx.x] = of_row;
        }
      }
    }
    __syncthreads();  // before the next member's copies
  }
  if (!weight.data) return;
  total.for_pairs([&](int row, int column, C& first, C& second) {
    if (first_row + row >= place.rows || column >= columns) return;
    weight.store_pair((first_row + row) * place.columns + first_column + column, first, second, column + 1 < columns);
  });
}

// ---- the bias ------------------------------------------------------------------------------------------------------
// partial[(member * chunks + chunk) * columns + n] = the sum of grad's column n over a chunk of a member's rows.
template <class T>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(double* partial, Operand<T> grad, int64_t rows_of_chunk, int64_t members) {
  using C = compute_t<T>;
  constexpr int G = kGroup<T>, kAdded = 8;  // rows that are added before the sum widens
  const int64_t columns = grad.rows, chunk = blockIdx.y;
  const int64_t first = chunk * rows_of_chunk, last = min(first + rows_of_chunk, grad.depth);
  for (int64_t member = blockIdx.z; member < members; member += gridDim.z) {
    const T* of_member = grad.data + member * grad.member_stride;
    double* to = partial + (member * gridDim.y + chunk) * columns;
    const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * G;
    if (column >= columns) return;
    Part part = {0, 0, column, columns, grad.packed && column + G <= columns};
    double sums[G] = {};
    for (int64_t row = first; row < last; row += kAdded) {
      C few[G] = {};
      for (int64_t r = row; r < min(row + kAdded, last); r++) {
        T values[G];
        part.at = r * grad.stride + column;
        load(of_member, part, values);
        for (int i = 0; i < G; i++) few[i] = add(few[i], widen(values[i]));
      }
      for (int i = 0; i < G; i++) sums[i] = add(sums[i], double(few[i]));
    }
    for (int i = 0; i < G; i++) {
      if (part.has(i)) to[column + i] = sums[i];
    }
  }
}

// What becomes of the sums of columns: the gradients of the bias and of its sigma.
template <class T, class Noise>
__global__ void __launch_bounds__(kThreads)
    bias_gradient_kernel(Target<T> bias, SigmaTarget<compute_t<T>> sigma, const double* partial, int64_t chunks,
                         Seeds seeds, Placement place, int64_t members) {
  using C = compute_t<T>;
  for_rows(place, [&](const Row& row) {
    for_parts<4>(row, false, [&](const Part& part) {
      double total[4] = {}, of_sigma[4] = {};
      for (int64_t member = 0; member < members; member++) {
        float noise[4] = {};
        if (sigma.elements || sigma.partial) Noise::make(seeds[member], part.group, noise);
        for (int i = 0; i < 4; i++) {
          if (!part.has(i)) continue;
          double sum = 0;
#pragma unroll 1
          for (int64_t c = 0; c < chunks; c++) {
            sum = add(sum, partial[(member * chunks + c) * place.columns + part.at + i]);
          }
          total[i] = add(total[i], sum);
          const double product = multiply(sum, double(noise[i]));
          of_sigma[i] = add(of_sigma[i], product);
          if (sigma.partial) sigma.partial[member * place.columns + part.at + i] = product;
          if (sigma.elements && sigma.member_stride) {
            sigma.elements[member * sigma.member_stride + part.at + i] = C(product);
          }
        }
      }
      for (int i = 0; i < 4; i++) {
        if (!part.has(i)) continue;
        if (bias.data) bias.store(part.at + i, C(total[i]));
        if (sigma.elements && !sigma.member_stride) sigma.elements[part.at + i] = C(of_sigma[i]);
      }
    });
  });
}

}  // namespace quaver::gpu
