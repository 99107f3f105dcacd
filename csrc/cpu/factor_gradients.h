// The gradients of down, up, coefficients and gain by way of G_b, the gradient of W + gain * Delta_b: what is asked for
// and written, whichever way they are made (gradients_by_sample.h, gradients_by_factor.h).
#pragma once
#include "cpu/effective_weight.h"
#include "cpu/gradient_outputs.h"

namespace quaver::cpu {

// What is wanted; null where it is not.
struct FactorGradients {
  Tensor *down = nullptr, *up = nullptr, *coefficients = nullptr, *gain = nullptr;
  bool any() const { return down || up || coefficients || gain; }
  bool of_products() const { return up || coefficients || gain; }
};

// Writes the gradients of up and gain from sums [N, R], those of c_b H_b; up [N, R] without the gain, both of C.
template <class C>
void write_up_and_gain(const FactorGradients& out, const C* sums, const C* up, const C* gain, int64_t rows,
                       int64_t ranks) {
  const auto& loops = spectral_loops_of<C>();
  if (out.gain) {
    std::vector<double> of_rows(static_cast<size_t>(rows));
    for_rows(rows, ranks, [&](int64_t n) { of_rows[size_t(n)] = loops.dot(sums + n * ranks, up + n * ranks, ranks); });
    write_gain(*out.gain, of_rows);
  }
  if (!out.up) return;
  const int64_t factors = out.up->size(0), rank = out.up->size(2);
  const auto& store = loops_of(out.up->scalar_type());
  char* to = output<char>(*out.up);
  for_rows(factors, rows * rank, [&](int64_t f) {
    C* line = workspace<C>(Use::kLine, rank);
    for (int64_t n = 0; n < rows; n++) {
      const C* from = sums + n * ranks + f * rank;
      if (gain) {
        for (int64_t j = 0; j < rank; j++) line[j] = from[j] * gain[n];
        from = line;
      }
      store.store(to, (f * rows + n) * rank, from, rank);
    }
  });
}

// Adds up what G_b of one group of samples after the other gives.
template <class C>
class GradientsOfFactors {
 public:
  virtual ~GradientsOfFactors() = default;
  // g [samples, N, stride]: G_b of samples first .. first + samples - 1.
  virtual void add(const C* g, int64_t stride, int64_t first, int64_t samples) = 0;
  // Writes the results.
  virtual void finish() = 0;

  // The distance of rows of G_b: no multiple of 4 KiB, whole pairs.
  static int64_t stride_of(int64_t columns) {
    const int64_t stride = round_up(columns, 2);
    return stride * int64_t(sizeof(C)) % 4096 < 64 ? stride + 16 : stride;
  }
};

// up's factors side by side, [N, R], in C: as they are, and times the gain of each row, where there is one. In this
// thread's workspace `Use::kUp` from then on.
template <class C>
struct UpBesideGain {
  C *plain, *scaled;

  UpBesideGain(const Tensor& up, const C* gain) {
    const int64_t size = up.numel();
    plain = scaled = workspace<C>(Use::kUp, gain ? 2 * size : size);
    concatenate(plain, up, static_cast<const C*>(nullptr));
    if (!gain) return;
    scaled = plain + size;
    concatenate(scaled, up, gain);
  }
};

}  // namespace quaver::cpu
