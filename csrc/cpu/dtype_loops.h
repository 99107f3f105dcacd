// Loops over contiguous elements of one dtype, each for every dtype, compiled once per instruction set. Positions are
// in elements. `C` below is the compute type: float64 for float64, float32 for the others.
#pragma once
#include <cstdint>

#include "cpu/simd_level.h"

namespace quaver::cpu {

struct DtypeLoops {
  struct Loops {
    // out[at + i] = T(x[i])
    void (*narrow)(void* out, int64_t at, const float* x, int64_t n);
    // out[at + i] = u[i] > p ? x[at + i] * scale : 0
    void (*drop)(void* out, const void* x, int64_t at, const float* u, float p, double scale, int64_t n);
    // out[out_at + i] = T(w[at + i] + sigma * noise[i]): the product rounded, then the sum, then to T. sigma: one C, or
    // n.
    void (*perturb)(void* out, int64_t out_at, const void* w, int64_t at, const float* noise, const void* sigma,
                    bool elementwise, int64_t n);
    // out[i] = w[at + i] + sigma * noise[i] as a C: the product rounded, then the sum. sigma: one C, or n.
    void (*perturb_wide)(void* out, const void* w, int64_t at, const float* noise, const void* sigma, bool elementwise,
                         int64_t n);
    // x[i] = C(T(x[i]))
    void (*round)(void* x, int64_t n);
    // out[i] = C(x[at + i])
    void (*widen)(void* out, const void* x, int64_t at, int64_t n);
    // acc[i] += x[at + i] * noise[i]
    void (*accumulate_product)(void* acc, const void* x, int64_t at, const float* noise, int64_t n);
    // The sum of x[at + i] * noise[i], in a fixed order.
    double (*dot)(const void* x, int64_t at, const float* noise, int64_t n);
    // acc[i] += x[at + i]
    void (*accumulate)(void* acc, const void* x, int64_t at, int64_t n);
    // out[at + i] = T(acc[i])
    void (*store)(void* out, int64_t at, const void* acc, int64_t n);
    // The same for rows of n: those of `out` to_stride elements apart, those of `acc` stride.
    void (*store_rows)(void* out, int64_t at, int64_t to_stride, const void* acc, int64_t stride, int64_t rows,
                       int64_t n);
    // The mean of x[at + i] and the sum of squares about it.
    void (*moments)(const void* x, int64_t at, int64_t n, double& mean, double& squares);
    // out[at + i] = T((x[at + i] - mean) * factor)
    void (*scale_about)(void* out, const void* x, int64_t at, double mean, double factor, int64_t n);
  };
  Loops f32, f64, bf16, f16;
  // acc[i] += c * noise[i]
  void (*accumulate_scaled_f32)(float* acc, float c, const float* noise, int64_t n);
  void (*accumulate_scaled_f64)(double* acc, double c, const float* noise, int64_t n);
};

QUAVER_LOOPS(DtypeLoops, dtype_loops)

}  // namespace quaver::cpu
