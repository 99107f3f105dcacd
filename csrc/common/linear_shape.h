// What the linear ops compute on, derived from their arguments once for the CPU and for CUDA.
#pragma once
#include "common/perturb_shape.h"

namespace quaver {

using OptionalTensor = std::optional<Tensor>;

inline int64_t product(const Tensor& tensor, int64_t first, int64_t last) {
  int64_t size = 1;
  for (int64_t d = first; d < last; d++) size *= tensor.size(d);
  return size;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// `sizes`, then x's from dimension `first` to the last but one, then `last`.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t first, int64_t last, std::vector<int64_t> sizes) {
  for (int64_t d = first; d < x.dim() - 1; d++) sizes.push_back(x.size(d));
  sizes.push_back(last);
  return sizes;
}

// The rows of x [.., K], or of the members' [P, .., K]; a stride of 0 shares the rows among them.
struct Rows {
  Tensor tensor;
  int64_t rows, columns, stride, member_stride = 0;

  Rows(const Tensor& x, bool of_members)
      : tensor(x), rows(product(x, of_members ? 1 : 0, x.dim() - 1)), columns(x.size(x.dim() - 1)), stride(columns) {
    // A slice of the columns of a matrix is used where it is.
    if (!of_members && x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= columns) {
      stride = x.stride(0);
    } else {
      tensor = torch::stable::contiguous(x);
      if (of_members) member_stride = rows * columns;
    }
  }

  const char* of(int64_t member) const {
    return const_data<char>(tensor) + member * member_stride * int64_t(tensor.element_size());
  }
};

}  // namespace quaver
