#include "cpu/dtype_loops.h"

#include "common/dtype.h"
#include "cpu/level.h"

namespace {

using quaver::compute_t;
using quaver::narrow;
using quaver::widen;

template <class T>
void narrow_all(void* out, int64_t at, const float* x, int64_t n) {
  T* to = static_cast<T*>(out) + at;
  for (int64_t i = 0; i < n; i++) to[i] = narrow<T>(x[i]);
}

template <class T>
void drop(void* out, const void* x, int64_t at, const float* u, float p, double scale, int64_t n) {
  T* to = static_cast<T*>(out) + at;
  const T* from = static_cast<const T*>(x) + at;
  const auto factor = compute_t<T>(scale);
  for (int64_t i = 0; i < n; i++) to[i] = narrow<T>(u[i] > p ? widen(from[i]) * factor : compute_t<T>(0));
}

// `Out` is T, or the compute type that the sum is made in.
template <class T, class Out>
QUAVER_HD void perturb_values(Out* to, const T* from, const float* noise, const compute_t<T>* sigma, bool elementwise,
                              int64_t n) {
  if (elementwise) {
    for (int64_t i = 0; i < n; i++) to[i] = narrow<Out>(widen(from[i]) + sigma[i] * noise[i]);
  } else {
    const auto one = *sigma;
    for (int64_t i = 0; i < n; i++) to[i] = narrow<Out>(widen(from[i]) + one * noise[i]);
  }
}

template <class T>
void perturb(void* out, int64_t out_at, const void* w, int64_t at, const float* noise, const void* sigma,
             bool elementwise, int64_t n) {
  perturb_values(static_cast<T*>(out) + out_at, static_cast<const T*>(w) + at, noise,
                 static_cast<const compute_t<T>*>(sigma), elementwise, n);
}

template <class T>
void perturb_wide(void* out, const void* w, int64_t at, const float* noise, const void* sigma, bool elementwise,
                  int64_t n) {
  perturb_values(static_cast<compute_t<T>*>(out), static_cast<const T*>(w) + at, noise,
                 static_cast<const compute_t<T>*>(sigma), elementwise, n);
}

template <class T>
void round_all(void* x, int64_t n) {
  auto* values = static_cast<compute_t<T>*>(x);
  for (int64_t i = 0; i < n; i++) values[i] = widen(narrow<T>(values[i]));
}

template <class T>
void widen_all(void* out, const void* x, int64_t at, int64_t n) {
  auto* to = static_cast<compute_t<T>*>(out);
  const T* from = static_cast<const T*>(x) + at;
  for (int64_t i = 0; i < n; i++) to[i] = widen(from[i]);
}

template <class T>
void accumulate_product(void* acc, const void* x, int64_t at, const float* noise, int64_t n) {
  auto* to = static_cast<compute_t<T>*>(acc);
  const T* from = static_cast<const T*>(x) + at;
  for (int64_t i = 0; i < n; i++) to[i] += widen(from[i]) * noise[i];
}

// 64 partial sums, in the order that any vector width gives; a tile adds at most kTile / 64 terms to each.
constexpr int kLanes = 64;

template <class C>
double add_lanes(const C (&lanes)[kLanes]) {
  double sum = 0;
  for (int i = 0; i < kLanes; i++) sum += double(lanes[i]);
  return sum;
}

template <class T>
double dot(const void* x, int64_t at, const float* noise, int64_t n) {
  using C = compute_t<T>;
  const T* from = static_cast<const T*>(x) + at;
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; l++) lanes[l] += widen(from[i + l]) * noise[i + l];
  }
  for (int l = 0; i + l < n; l++) lanes[l] += widen(from[i + l]) * noise[i + l];
  return add_lanes(lanes);
}

template <class T>
void accumulate(void* acc, const void* x, int64_t at, int64_t n) {
  auto* to = static_cast<compute_t<T>*>(acc);
  const T* from = static_cast<const T*>(x) + at;
  for (int64_t i = 0; i < n; i++) to[i] += widen(from[i]);
}

template <class T>
void store_all(void* out, int64_t at, const void* acc, int64_t n) {
  T* to = static_cast<T*>(out) + at;
  const auto* from = static_cast<const compute_t<T>*>(acc);
  for (int64_t i = 0; i < n; i++) to[i] = narrow<T>(from[i]);
}

template <class T>
void store_rows(void* out, int64_t at, int64_t to_stride, const void* acc, int64_t stride, int64_t rows, int64_t n) {
  const auto* from = static_cast<const compute_t<T>*>(acc);
  for (int64_t r = 0; r < rows; r++) store_all<T>(out, at + r * to_stride, from + r * stride, n);
}

// Two passes over data that the first has brought into the cache: no cancellation at any mean.
template <class T>
void moments(const void* x, int64_t at, int64_t n, double& mean, double& squares) {
  using C = compute_t<T>;
  const T* from = static_cast<const T*>(x) + at;
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; l++) lanes[l] += widen(from[i + l]);
  }
  for (int l = 0; i + l < n; l++) lanes[l] += widen(from[i + l]);
  const C middle = C(add_lanes(lanes) / double(n));
  C errors[kLanes] = {};
  for (int l = 0; l < kLanes; l++) lanes[l] = 0;
  for (i = 0; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; l++) {
      const C d = widen(from[i + l]) - middle;
      lanes[l] += d * d;
      errors[l] += d;
    }
  }
  for (int l = 0; i + l < n; l++) {
    const C d = widen(from[i + l]) - middle;
    lanes[l] += d * d;
    errors[l] += d;
  }
  // `middle` is rounded: the sum of what is left about it corrects both moments.
  const double error = add_lanes(errors);
  mean = double(middle) + error / double(n);
  squares = add_lanes(lanes) - error * error / double(n);
}

template <class T>
void scale_about(void* out, const void* x, int64_t at, double mean, double factor, int64_t n) {
  using C = compute_t<T>;
  T* to = static_cast<T*>(out) + at;
  const T* from = static_cast<const T*>(x) + at;
  // The mean in two parts: rounded to float32 it alone would be off by as much as small deviations are.
  const C middle = C(mean), rest = C(mean - double(middle)), scale = C(factor);
  for (int64_t i = 0; i < n; i++) to[i] = narrow<T>((widen(from[i]) - middle - rest) * scale);
}

template <class C>
void accumulate_scaled(C* acc, C c, const float* noise, int64_t n) {
  for (int64_t i = 0; i < n; i++) acc[i] += c * noise[i];
}

template <class T>
constexpr quaver::cpu::DtypeLoops::Loops loops = {
    narrow_all<T>, drop<T>,       perturb<T>,   perturb_wide<T>, round_all<T>, widen_all<T>,   accumulate_product<T>,
    dot<T>,        accumulate<T>, store_all<T>, store_rows<T>,   moments<T>,   scale_about<T>,
};

}  // namespace

namespace quaver::cpu {
extern const DtypeLoops QUAVER_AT_LEVEL(dtype_loops);
const DtypeLoops QUAVER_AT_LEVEL(dtype_loops) = {
    loops<float>, loops<double>, loops<bfloat16>, loops<float16>, accumulate_scaled<float>, accumulate_scaled<double>};
}  // namespace quaver::cpu
