// W + sigma epsilon: the kernel, and how it is started.
#pragma once
#include "cuda/perturb.h"

namespace quaver::gpu {

// A sigma by row wants to know the row of an element; otherwise rows without gaps are one.
inline Placement placement_for(const SigmaShape& shape, const Placement& place) {
  return shape.kind == SigmaShape::kRow ? place : as_one_run(place);
}

template <class To, class From>
constexpr int kPerturbed = kGroup<To> > kGroup<From> ? kGroup<To> : kGroup<From>;

// A thread reads its weights once for `together` members, and makes the noise once for neighbours of one seed, such as
// an antithetic pair. `out` may be `weight`: a thread writes what it alone has read.
template <class To, class From, class Noise>
__global__ void __launch_bounds__(kThreads)
    perturb_kernel(To* out, const From* weight, Sigma<compute_t<From>> sigma, Seeds seeds, Placement place,
                   int64_t members, int64_t together) {
  using C = compute_t<From>;
  constexpr int G = kPerturbed<To, From>;
  const int64_t first = blockIdx.z * together, last = min(first + together, members), size = place.size();
  const bool elementwise = sigma.kind == SigmaShape::kElement;
  bool aligned = members == 1 || size * int64_t(sizeof(To)) % 16 == 0;
  if (elementwise) aligned = aligned && sigma.member_stride * int64_t(sizeof(C)) % 16 == 0;
  for_rows(place, [&](const Row& row) {
    const bool packed = aligned && row.is_packed<G>(weight, out) && (!elementwise || row.is_packed<G>(sigma.values));
    for_parts<G>(row, packed, [&](const Part& part) {
      From values[G];
      load(weight, part, values);
      float noise[G];
      uint64_t seed = 0;
      for (int64_t member = first; member < last; member++) {
        const Source source = seeds[member];
        if (member == first || source.seed != seed) Noise::make(source, part.group, noise);
        seed = source.seed;
        const C* of_member = sigma.values + member * sigma.member_stride;
        C scale[G];
        if (elementwise) {
          load(of_member, part, scale);
        } else {
          C one = sigma.value;
          if (sigma.values) one = of_member[sigma.kind == SigmaShape::kRow ? row.number : 0];
          for (int i = 0; i < G; i++) scale[i] = one;
        }
        To perturbed[G];
        for (int i = 0; i < G; i++) {
          perturbed[i] = narrow<To>(add(widen(values[i]), multiply(scale[i], C(noise[i]))));
        }
        store(out + member * size, part, perturbed);
      }
    });
  });
}

template <class To, class From>
void launch_perturb(Tensor& out, const Tensor& weight, const Tensor& sigma, const SigmaShape& shape, const Seeds& seeds,
                    const Placement& place, int64_t first, int64_t count) {
  using C = compute_t<From>;
  // A slice of the members for each of the grid's z: one, unless the elements are too few to fill a GPU; pairs stay
  // together.
  constexpr int64_t kEnough = 1024;  // blocks
  dispatch_noise(seeds.domain, [&](auto noise) {
    auto layout = layout_of(place, kPerturbed<To, From>);
    const int64_t blocks = std::max<int64_t>(1, int64_t(layout.grid.x) * layout.grid.y);
    const int64_t slices = std::clamp<int64_t>(kEnough / blocks, 1, std::max<int64_t>(1, (count + 1) / 2));
    const int64_t together = (count + slices - 1) / slices;
    layout.grid.z = unsigned(together ? (count + together - 1) / together : 0);
    Sigma<C> scale = sigma_of<C>(sigma, shape, weight);
    if (scale.values) scale.values += first * scale.member_stride;
    const bool in_place = out.data_ptr() == weight.data_ptr();
    To* to = in_place ? updated<To>(out) : output<To>(out);
    const From* from = reinterpret_cast<const From*>(to);  // in place they have one type
    if (!in_place) from = input<From>(weight);
    launch(perturb_kernel<To, From, decltype(noise)>, layout.grid, layout.block, 0, current_stream(weight), to, from,
           scale, seeds.from(first), place, count, together);
  });
}

}  // namespace quaver::gpu
