// The gradient of sigma: a weight's gradient times the noise, made again, added over what one value of sigma covers.
#pragma once
#include "cpu/placed_noise.h"

namespace quaver::cpu {

using torch::stable::parallel_for;

// sum over members p >= first, by `step`, of grad_p * epsilon_p, element by element, into a tensor of the weight's
// shape.
template <class C>
void sigma_gradient_elementwise(C* out, const Gradient& grad, const std::vector<Source>& members, int64_t first,
                                int64_t count, const Placement& place) {
  const auto& loops = loops_of(grad.tensor.scalar_type());
  const auto& philox = philox_loops();
  const char* from = const_data<char>(grad.tensor);
  parallel_for(0, place.size(), kGrain, [&](int64_t begin, int64_t end) {
    for_placed_tiles(place, begin, end, [&](uint64_t element, int64_t at, int64_t length) {
      alignas(64) float noise[kTile];
      std::fill(out + at, out + at + length, C(0));
      for (int64_t p = first; p < first + count; p++) {
        philox.fill(noise, length, members[size_t(p)], element);
        loops.accumulate_product(out + at, from, p * grad.member_stride + at, noise, length);
      }
    });
  });
}

// The sums of grad_p * epsilon_p over blocks of positions of one member: partial sums whose number and order depend on
// the shape alone, so that the result does not on the number of threads.
inline double dot_with_noise(const Gradient& grad, const Source& source, int64_t member, int64_t begin, int64_t end,
                             const Placement& place) {
  const auto& loops = loops_of(grad.tensor.scalar_type());
  const auto& philox = philox_loops();
  const char* from = const_data<char>(grad.tensor);
  double sum = 0;
  for_placed_tiles(place, begin, end, [&](uint64_t element, int64_t at, int64_t length) {
    alignas(64) float noise[kTile];
    philox.fill(noise, length, source, element);
    sum += loops.dot(from, member * grad.member_stride + at, noise, length);
  });
  return sum;
}

template <class C>
void sigma_gradient(C* out, const SigmaShape& shape, const Gradient& grad, const std::vector<Source>& members,
                    const Placement& place) {
  const int64_t count = int64_t(members.size());
  const int64_t summed = shape.members == 1 ? count : 1;  // members that share one sigma
  if (shape.kind == SigmaShape::kElement) {
    for (int64_t s = 0; s < shape.members; s++) {
      sigma_gradient_elementwise(out + s * shape.size, grad, members, s, summed, place);
    }
    return;
  }
  const bool by_row = shape.kind == SigmaShape::kRow;
  // Blocks of positions: a row, or kGrain positions of the whole.
  const int64_t block = std::max<int64_t>(1, by_row ? place.columns : kGrain);
  const int64_t blocks = by_row ? place.rows : (place.size() + block - 1) / block;
  std::vector<double> partial(size_t(count * blocks));
  parallel_for(0, count * blocks, std::max<int64_t>(1, kGrain / block), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t p = i / blocks, at = i % blocks * block;
      partial[size_t(i)] = dot_with_noise(grad, members[size_t(p)], p, at, std::min(at + block, place.size()), place);
    }
  });
  for (int64_t s = 0; s < shape.members; s++) {
    for (int64_t v = 0; v < shape.size; v++) {
      double sum = 0;
      for (int64_t p = s; p < s + summed; p++) {
        const int64_t first = p * blocks + (by_row ? v : 0), last = by_row ? first + 1 : (p + 1) * blocks;
        for (int64_t b = first; b < last; b++) sum += partial[size_t(b)];
      }
      out[s * shape.size + v] = C(sum);
    }
  }
}

}  // namespace quaver::cpu
