// Tensors of the element type of the inputs, or of the wider one that arithmetic runs in.
#pragma once
#include "cuda/gpu_tensor.h"

namespace quaver::gpu {

// A tensor that is read: of T, or `wide`: of the type that sums have.
template <class T>
struct Values {
  const void* data;
  bool wide;

  __device__ compute_t<T> operator[](int64_t at) const {
    return wide ? static_cast<const compute_t<T>*>(data)[at] : widen(static_cast<const T*>(data)[at]);
  }
};

// A tensor of the results: of T, or `wide`: of the type that sums have.
template <class T>
struct Target {
  using C = compute_t<T>;
  void* data;
  bool wide;

  Target(void* data, bool wide) : data(data), wide(wide) {}

  __device__ void store(int64_t at, C value) const {
    if (wide) {
      static_cast<C*>(data)[at] = value;
    } else {
      static_cast<T*>(data)[at] = narrow<T>(value);
    }
  }
  // Two neighbours, the second where there is one.
  __device__ void store_pair(int64_t at, C first, C second, bool has_second) const {
    if (sizeof(T) == 2 && !wide && has_second && at % 2 == 0) {
      struct alignas(2 * sizeof(T)) Pair {
        T first, second;
      };
      static_cast<Pair*>(data)[at / 2] = {narrow<T>(first), narrow<T>(second)};
      return;
    }
    store(at, first);
    if (has_second) store(at + 1, second);
  }
};

}  // namespace quaver::gpu
