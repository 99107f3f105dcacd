// What the kernels of the noise ops share: seeds, noise by the group, 128-bit loads and stores, loops over placed
// elements.
#pragma once
#include <algorithm>

#include "common/perturb_shape.h"
#include "cuda/gpu.h"
#include "cuda/gpu_tensor.h"

namespace quaver::gpu {

constexpr int kThreads = 256;

// A thread takes the elements of whole Philox blocks, and 16 bytes or more of each tensor.
template <class T>
constexpr int kGroup = sizeof(T) == 2 ? 8 : 4;

// ---- seeds ---------------------------------------------------------------------------------------------------------
// A CPU tensor's seed travels by value; one on the device is read there, so that a captured graph sees it change.
struct Seeds {
  const int64_t* values;  // null: `value` is the seed
  int64_t value, stride;
  uint32_t stream, domain;

  __device__ Source operator[](int64_t member) const {
    return {uint64_t(values ? values[member * stride] : value), stream, domain};
  }

  // Those of the members from `first` on.
  Seeds from(int64_t first) const {
    Seeds rest = *this;
    if (values) rest.values += first * stride;
    return rest;
  }
};

inline void check_same_device(const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.device() == like.device(), "quaver: expected tensors on one device");
}

inline Seeds seeds_of(const Tensor& seed, const Tensor& like, int64_t stream, int64_t domain) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long, "quaver: expected an int64 seed");
  Seeds seeds = {nullptr, 0, 0, uint32_t(stream), uint32_t(domain)};
  if (seed.dim() == 0 && seed.is_cpu()) {
    seeds.value = *const_data<int64_t>(seed);
  } else {
    check_same_device(seed, like);
    seeds.values = input<int64_t>(seed);
    seeds.stride = is_population(seed) ? seed.stride(0) : 0;
  }
  return seeds;
}

// ---- noise ---------------------------------------------------------------------------------------------------------
// make(source, group, out) writes elements group * G .. group * G + G - 1.
struct Normals {
  template <int G>
  __device__ static void make(const Source& source, uint64_t group, float (&out)[G]) {
    for (int b = 0; b < G / 4; b++) {
      float four[4];
      four_normals(source, group * (G / 4) + uint64_t(b), four);
      for (int i = 0; i < 4; i++) out[4 * b + i] = four[i];
    }
  }
};

struct Uniforms {
  template <int G>
  __device__ static void make(const Source& source, uint64_t group, float (&out)[G]) {
    for (int b = 0; b < G / 4; b++) {
      float four[4];
      four_uniforms(source, group * (G / 4) + uint64_t(b), four);
      for (int i = 0; i < 4; i++) out[4 * b + i] = four[i];
    }
  }
};

// A block has the signs of 128 elements, and every thread of those makes it again: for 4 to 8 elements that is a third
// of the instructions of four normals.
struct Signs {
  template <int G>
  __device__ static void make(const Source& source, uint64_t group, float (&out)[G]) {
    const uint64_t element = group * G;
    const uint32_t bits =
        word_of(philox(element / 128, source.stream, source.domain, source.seed), element) >> (element % 32);
    for (int i = 0; i < G; i++) out[i] = sign_of_bit(bits >> i);
  }
};

template <class F>
void dispatch_noise(int64_t domain, F&& f) {
  switch (domain & 0xff) {
    case kNormal:
      return f(Normals{});
    case kRademacher:
      return f(Signs{});
    default:
      STD_TORCH_CHECK(false, "quaver: expected the domain of normals or signs");
  }
}

// ---- loops over a placed block -------------------------------------------------------------------------------------
// A row of a block: the run of the stream from element `first` on, at positions from `at` on.
struct Row {
  uint64_t first;
  int64_t number, at, columns;

  __device__ Row(const Placement& place, int64_t number)
      : first(place.first + uint64_t(number) * uint64_t(place.row_length)),
        number(number),
        at(number * place.columns),
        columns(place.columns) {}

  // Groups of G elements that have an element in the row, and how many elements of the first group lie before it.
  template <int G>
  __device__ int64_t groups() const {
    return (lead<G>() + columns + G - 1) / G;
  }
  template <int G>
  __device__ int64_t lead() const {
    return int64_t(first % G);
  }

  // Whether whole groups start at multiples of 16 bytes in all of the tensors.
  template <int G, class... T>
  __device__ bool is_packed(const T*... from) const {
    return columns >= G && ((reinterpret_cast<uintptr_t>(from + (at - lead<G>())) % 16 == 0) && ...);
  }
};

// A group of G elements of the stream, the first of them at `column` of a row (below 0 in a ragged start) and at
// position `at` of a tensor.
struct Part {
  uint64_t group;
  int64_t at, column, columns;
  bool packed;  // it is whole and can be accessed by 16 bytes

  __device__ bool has(int i) const { return uint64_t(column + i) < uint64_t(columns); }
};

template <int G>
__device__ Part part_of(const Row& row, bool packed, int64_t group) {
  const int64_t column = group * G - row.lead<G>();
  return {row.first / G + uint64_t(group), row.at + column, column, row.columns,
          packed && uint64_t(column) <= uint64_t(row.columns - G)};
}

// Calls body(row) for the rows that are this thread's, and body(part) for its groups of one.
template <class Body>
__device__ void for_rows(const Placement& place, Body&& body) {
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < place.rows; row += step) {
    body(Row(place, row));
  }
}

template <int G, class Body>
__device__ void for_parts(const Row& row, bool packed, Body&& body) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, groups = row.groups<G>();
  for (int64_t g = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; g < groups; g += step) {
    body(part_of<G>(row, packed, g));
  }
}

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <class T, int G>
__device__ void load(const T* from, const Part& part, T (&out)[G]) {
  constexpr int kSize = Pack<T>::kSize;
  if (part.packed) {
    const auto* packs = reinterpret_cast<const Pack<T>*>(from + part.at);
    for (int v = 0; v < G / kSize; v++) {
      const Pack<T> pack = packs[v];
      for (int i = 0; i < kSize; i++) out[v * kSize + i] = pack.values[i];
    }
  } else {
    for (int i = 0; i < G; i++) out[i] = part.has(i) ? from[part.at + i] : T{};
  }
}

template <class T, int G>
__device__ void store(T* to, const Part& part, const T (&values)[G]) {
  constexpr int kSize = Pack<T>::kSize;
  if (part.packed) {
    auto* packs = reinterpret_cast<Pack<T>*>(to + part.at);
    for (int v = 0; v < G / kSize; v++) {
      Pack<T> pack;
      for (int i = 0; i < kSize; i++) pack.values[i] = values[v * kSize + i];
      packs[v] = pack;
    }
  } else {
    for (int i = 0; i < G; i++) {
      if (part.has(i)) to[part.at + i] = values[i];
    }
  }
}

// ---- layouts -------------------------------------------------------------------------------------------------------
// The block as one row when its rows follow each other in the stream: no ragged ends between them.
inline Placement as_one_run(Placement place) {
  if (!place.is_one_run()) return place;
  place.columns = place.row_length = place.size();
  place.rows = std::min<int64_t>(1, place.rows);
  return place;
}

// n elements from number `first` on.
inline Placement one_run(int64_t n, uint64_t first) {
  Placement place(&n, 1, 0, 0, n);
  place.first = first;
  return place;
}

// The most groups that a row has, of any alignment.
inline int64_t most_groups(const Placement& place, int group) {
  const bool aligned = place.first % uint64_t(group) == 0 && (place.rows == 1 || place.row_length % group == 0);
  return (place.columns + (aligned ? 0 : group - 1) + group - 1) / group;
}

struct Layout {
  dim3 grid, block;
};

// Threads for for_rows and for_parts: along the rows first; blocks of short rows take several.
inline Layout layout_of(const Placement& place, int group, int64_t members = 1) {
  // Grids stop growing where they fill any GPU many times over; the loops in the kernels take the rest.
  constexpr int64_t kMost = 16384;
  const int64_t groups = most_groups(place, group);
  int64_t x = 1;
  while (x < groups && x < kThreads) x *= 2;
  const int64_t y = std::max<int64_t>(1, std::min(kThreads / x, place.rows));
  const auto blocks = [&](int64_t n, int64_t size) { return unsigned(std::min(kMost, (n + size - 1) / size)); };
  return {dim3(blocks(groups, x), blocks(place.rows, y), blocks(members, 1)), dim3(unsigned(x), unsigned(y))};
}

}  // namespace quaver::gpu
