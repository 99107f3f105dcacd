// What the perturb ops compute on, derived from their arguments once for the CPU and for CUDA.
#pragma once
#include "common/host_device.h"
#include "common/tensor.h"

namespace quaver {

// Where a block of weights lies in the logical matrix: element (n, k) has number first + n * row_length + k. A tensor
// of two or more dimensions is rows by the product of the rest; one of fewer is a single row.
struct Placement {
  int64_t rows, columns, row_length;
  uint64_t first;

  Placement(const int64_t* sizes, int64_t dimensions, int64_t row_offset, int64_t column_offset, int64_t row_length)
      : rows(dimensions < 2 ? 1 : sizes[0]), columns(1), row_length(row_length) {
    for (int64_t d = dimensions < 2 ? 0 : 1; d < dimensions; d++) columns *= sizes[d];
    first = uint64_t(row_offset) * uint64_t(row_length) + uint64_t(column_offset);
  }

  // That of the dimensions from `first_dimension` on.
  Placement(const Tensor& weight, int64_t first_dimension, int64_t row_offset, int64_t column_offset,
            int64_t row_length)
      : Placement(weight.sizes().data() + first_dimension, weight.dim() - first_dimension, row_offset, column_offset,
                  row_length) {}

  QUAVER_HD int64_t size() const { return rows * columns; }
  // Rows follow each other without a gap: the block is one run of elements.
  bool is_one_run() const { return row_length == columns; }
};

// sigma is 0-dim or [1 or P, ..] followed by [1, 1], [N, 1] or [N, K].
struct SigmaShape {
  enum Kind { kScalar, kRow, kElement } kind = kScalar;
  int64_t members = 1, size = 1;  // size: the values of one member

  SigmaShape() = default;  // 0-dim
  SigmaShape(const Tensor& sigma, const Placement& place, int64_t population) {
    if (sigma.dim() == 0) return;
    STD_TORCH_CHECK(sigma.dim() == 3, "quaver: sigma must be 0-dim or [P, N, K]");
    const int64_t rows = sigma.size(1), columns = sigma.size(2);
    members = sigma.size(0);
    size = rows * columns;
    if (rows == 1 && columns == 1) {
      kind = kScalar;
    } else if (rows == place.rows && columns == place.columns) {
      kind = kElement;
    } else {
      kind = kRow;
      STD_TORCH_CHECK(rows == place.rows && columns == 1, "quaver: sigma does not fit the weight");
    }
    STD_TORCH_CHECK(members == 1 || members == population, "quaver: sigma does not fit the population");
  }

  int64_t member_stride() const { return members == 1 ? 0 : size; }
};

// grad is the weight's shape, with a leading P for a population; a member stride of 0 shares one gradient among all.
struct Gradient {
  Tensor tensor;
  int64_t member_stride = 0;

  explicit Gradient(const Tensor& grad) : tensor(torch::stable::contiguous(grad)) {}

  Gradient(const Tensor& grad, const Tensor& seed) : tensor(grad) {
    if (!is_population(seed)) {
      tensor = torch::stable::contiguous(grad);
      return;
    }
    STD_TORCH_CHECK(grad.dim() > 0 && grad.size(0) == seed.size(0), "quaver: grad does not fit the population");
    if (grad.size(0) > 0 && grad.stride(0) == 0) {
      Tensor all = grad;
      tensor = torch::stable::contiguous(torch::stable::select(all, 0, 0));
    } else {
      tensor = torch::stable::contiguous(grad);
      member_stride = grad.size(0) > 0 ? grad.numel() / grad.size(0) : 0;
    }
  }
};

inline std::vector<int64_t> with_members(const Tensor& seed, const Tensor& weight) {
  std::vector<int64_t> sizes;
  if (is_population(seed)) sizes.push_back(seed.size(0));
  for (int64_t d = 0; d < weight.dim(); d++) sizes.push_back(weight.size(d));
  return sizes;
}

}  // namespace quaver
