#include "cpu/spectral_loops.h"

#include <cmath>

#include "common/dtype.h"
#include "cpu/level.h"
#include "cpu/products.h"
#include "cpu/transpose.h"

namespace {

template <class T>
void scale_panel(T* to, const T* from, const T* scales, int64_t width, int64_t depth) {
  for (int64_t k = 0; k < depth; k++, to += width, from += width) {
    const T scale = scales[k];
    for (int64_t i = 0; i < width; i++) to[i] = from[i] * scale;
  }
}

template <class T>
void scale_columns(T* x, int64_t stride, const T* factors, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i++, x += stride) {
    for (int64_t j = 0; j < columns; j++) x[j] *= factors[j];
  }
}

template <class T>
void add_scaled_columns(T* sum, int64_t sum_stride, const T* x, int64_t stride, const T* factors, int64_t rows,
                        int64_t columns) {
  for (int64_t i = 0; i < rows; i++, sum += sum_stride, x += stride) {
    for (int64_t j = 0; j < columns; j++) sum[j] += x[j] * factors[j];
  }
}

template <class T>
void add_scaled_rows(T* sum, int64_t sum_stride, const T* x, int64_t stride, const T* factors, int64_t rows,
                     int64_t columns) {
  for (int64_t i = 0; i < rows; i++, sum += sum_stride, x += stride) {
    const T factor = factors[i];
    for (int64_t j = 0; j < columns; j++) sum[j] += x[j] * factor;
  }
}

template <class T>
void shift_rows(T* to, int64_t to_stride, const T* base, const T* x, int64_t stride, const T* factors, int64_t rows,
                int64_t columns) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T)), kAhead = 3;
  for (int64_t i = 0; i < rows; i++, to += to_stride, base += stride, x += stride) {
    const T factor = factors ? factors[i] : T(1);
    // Parts of rows are short for the hardware's prefetcher.
    for (int64_t j = 0; i + kAhead < rows && j < columns; j += kLine) {
      __builtin_prefetch(base + kAhead * stride + j);
      __builtin_prefetch(x + kAhead * stride + j);
    }
    for (int64_t j = 0; j < columns; j++) to[j] = base[j] + x[j] * factor;
  }
}

// A few columns at a time, whose sums are in registers.
template <class T, int V>
QUAVER_INLINE void column_dots_of(T* sums, const T* x, int64_t stride, const T* y, int64_t y_stride, int64_t rows) {
  Vector<T> sum[V] = {};
  for (int64_t i = 0; i < rows; i++, x += stride, y += y_stride) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      sum[v] = multiply_add(load<Vector<T>>(x + v * kLanes<T>), load<Vector<T>>(y + v * kLanes<T>), sum[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) store(sums + v * kLanes<T>, sum[v]);
}

template <class T>
void column_dots(T* sums, const T* x, int64_t stride, const T* y, int64_t y_stride, int64_t rows, int64_t columns) {
  int64_t j = 0;
  for (; j + 4 * kLanes<T> <= columns; j += 4 * kLanes<T>) {
    column_dots_of<T, 4>(sums + j, x + j, stride, y + j, y_stride, rows);
  }
  for (; j + kLanes<T> <= columns; j += kLanes<T>) {
    column_dots_of<T, 1>(sums + j, x + j, stride, y + j, y_stride, rows);
  }
  for (; j < columns; j++) {
    T sum = 0;
    for (int64_t i = 0; i < rows; i++) sum += x[i * stride + j] * y[i * y_stride + j];
    sums[j] = sum;
  }
}

template <class T>
double dot(const T* x, const T* y, int64_t count) {
  constexpr int kSums = 16;
  double sums[kSums] = {}, total = 0;
  int64_t j = 0;
  for (; j + kSums <= count; j += kSums) {
    for (int l = 0; l < kSums; l++) sums[l] += double(x[j + l]) * double(y[j + l]);
  }
  for (int l = 0; l < kSums; l++) total += sums[l];
  for (; j < count; j++) total += double(x[j]) * double(y[j]);
  return total;
}

template <class T>
void transpose(T* to, int64_t to_stride, const T* from, int64_t stride, int64_t rows, int64_t columns) {
  constexpr int64_t kSide = kLanes<T>;
  int64_t i = 0;
  for (; i + kSide <= rows; i += kSide) {
    int64_t j = 0;
    for (; j + kSide <= columns; j += kSide) {
      transpose_tile(from + i * stride + j, stride, to + j * to_stride + i, to_stride);
    }
    for (; j < columns; j++) {
      for (int64_t r = i; r < i + kSide; r++) to[j * to_stride + r] = from[r * stride + j];
    }
  }
  for (; i < rows; i++) {
    for (int64_t j = 0; j < columns; j++) to[j * to_stride + i] = from[i * stride + j];
  }
}

void turn_precisely(double* cosines, double* angles, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const double angle = angles[i];
    cosines[i] = std::cos(angle);
    angles[i] = std::sin(angle);
  }
}

// Angles of float32: reduced to a quarter of a turn in float64, then polynomials in float64, so that only the result is
// rounded. Larger ones than 2^20 lose digits in the reduction: those, infinities and what is no number go to the
// library.
void turn_floats(float* cosines, float* angles, int64_t count) {
  constexpr double kRound = 0x1.8p52, kQuarters = 0x1.45f306dc9c883p-1;   // 2 / pi
  constexpr double kHigh = 0x1.921fb544p0, kLow = 0x1.0b4611a626331p-34;  // pi / 2 = kHigh + kLow
  constexpr int64_t kTogether = 64;
  double sines[kTogether], cosine[kTogether], quarters[kTogether];
  for (int64_t first = 0; first < count; first += kTogether) {
    const int64_t now = count - first < kTogether ? count - first : kTogether;
    float *c = cosines + first, *s = angles + first;
    for (int64_t i = 0; i < now; i++) {
      const double x = double(s[i]), quarter = (x * kQuarters + kRound) - kRound;
      const double r = (x - quarter * kHigh) - quarter * kLow, z = r * r;
      // Taylor's: the next terms are below 1e-9 for |r| <= pi / 4.
      sines[i] =
          r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800)))));
      cosine[i] =
          1 + z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z / 479001600)))));
      quarters[i] = quarter;
    }
    for (int64_t i = 0; i < now; i++) {
      const float x = s[i];
      if (!(x < 0x1p20f && x > -0x1p20f)) {
        c[i] = float(std::cos(double(x)));
        s[i] = float(std::sin(double(x)));
        continue;
      }
      const int64_t quarter = int64_t(quarters[i]);
      const double of_sine = quarter & 1 ? cosine[i] : sines[i], of_cosine = quarter & 1 ? sines[i] : cosine[i];
      s[i] = float(quarter & 2 ? -of_sine : of_sine);
      c[i] = float((quarter + 1) & 2 ? -of_cosine : of_cosine);
    }
  }
}

void pair_panel(float* to, const float* from, const float* scales, int64_t width, int64_t singles) {
  for (int64_t k = 0; k < singles; k += 2, to += width, from += 2 * width) {
    const float even = scales ? scales[k] : 1, odd = k + 1 == singles ? 0 : scales ? scales[k + 1] : 1;
    // Of the last row of an odd depth there is no partner to read.
    const float* partner = k + 1 < singles ? from + width : from;
    for (int64_t i = 0; i < width; i++) {
      const uint32_t low = quaver::narrow<quaver::bfloat16>(from[i] * even).bits;
      const uint32_t high = k + 1 < singles ? quaver::narrow<quaver::bfloat16>(partner[i] * odd).bits : 0;
      const uint32_t both = low | high << 16;
      std::memcpy(to + i, &both, sizeof both);
    }
  }
}

// A piece is some 48 bytes: a copy of a length that is known only when it runs would be a call for each.
void gather(char* to, int64_t to_row, const char* from, int64_t factor, int64_t row, int64_t bytes, int64_t factors,
            int64_t rows) {
  for (int64_t f = 0; f < factors; f++) {
    // The same factor's next rows: a jump for the hardware's prefetcher.
    for (int64_t at = 0; row == bytes && at < rows * row; at += 64) {
      __builtin_prefetch(from + f * factor + rows * row + at, 0, 2);
    }
    for (int64_t i = 0; i < rows; i++) {
      const char* piece = from + f * factor + i * row;
      char* place = to + i * to_row + f * bytes;
#if defined(__AVX512BW__)
      for (int64_t at = 0; at < bytes; at += 64) {
        const int64_t left = bytes - at;
        const __mmask64 present = left < 64 ? (__mmask64(1) << left) - 1 : ~__mmask64(0);
        const __m512i line = _mm512_maskz_loadu_epi8(present, piece + at);
        // A whole line where what it writes too much is written over by later factors: masks make stores slow.
        if ((factors - f) * bytes - at >= 64) {
          _mm512_storeu_si512(place + at, line);
        } else {
          _mm512_mask_storeu_epi8(place + at, present, line);
        }
      }
#else
      __builtin_memcpy(place, piece, size_t(bytes));
#endif
    }
  }
}

// F factors and M rows at a time: each element of up is read once for the rows, each sum once for the factors. scales
// [F, .., period]: those of a factor are `of_factor` apart.
template <class P, int F, int M, class T = typename P::Element>
void add_block(T* sums, int64_t sums_stride, const T* up, int64_t factor, const T* scales, int64_t of_factor,
               int64_t period, int64_t elements) {
  using V = Vector<T>;
  const auto add = [&](int64_t e, int64_t j, const T* from, int64_t stride) {
    V element[F];
#pragma GCC unroll 4
    for (int f = 0; f < F; f++) element[f] = load<V>(from + f * stride);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      V sum = load<V>(sums + m * sums_stride + e);
#pragma GCC unroll 4
      for (int f = 0; f < F; f++) {
        sum = P::add_product(element[f], load<V>(scales + f * of_factor + m * period + j), sum);
      }
      store(sums + m * sums_stride + e, sum);
    }
  };
  int64_t e = 0, j = 0;
  for (; e + kLanes<T> <= elements; e += kLanes<T>) {
    add(e, j, up + e, factor);
    j = j + kLanes<T> < period ? j + kLanes<T> : 0;
  }
  if (e == elements) return;
  T rest[F][kLanes<T>] = {};
  for (int f = 0; f < F; f++) std::memcpy(rest[f], up + f * factor + e, size_t(elements - e) * sizeof(T));
  add(e, j, rest[0], kLanes<T>);
}

template <class P, int F>
constexpr decltype(&add_block<P, F, 1>) kBlocks[] = {add_block<P, F, 1>, add_block<P, F, 2>, add_block<P, F, 3>,
                                                     add_block<P, F, 4>};

template <class P, class T = typename P::Element>
void add_factors(T* sums, int64_t sums_stride, const T* up, int64_t factor, int64_t factors, const T* scales,
                 int64_t period, int64_t rows, int64_t elements) {
  const int64_t of_factor = rows * period;
  for (int64_t f = 0; f < factors;) {
    const bool four = factors - f >= 4;
    const auto* blocks = four ? kBlocks<P, 4> : kBlocks<P, 1>;
    for (int64_t m = 0; m < rows; m += 4) {
      const int64_t height = rows - m < 4 ? rows - m : 4;
      blocks[height - 1](sums + m * sums_stride, sums_stride, up + f * factor, factor,
                         scales + f * of_factor + m * period, of_factor, period, elements);
    }
    f += four ? 4 : 1;
  }
}

#if defined(__AVX512F__)
constexpr auto* add_pair_factors = add_factors<Pairs>;
#else
constexpr decltype(quaver::cpu::SpectralLoops::add_pair_factors) add_pair_factors = nullptr;
#endif

template <class T>
constexpr quaver::cpu::SpectralLoopsOf<T> loops_with(void (*turn)(T*, T*, int64_t)) {
  return {scale_panel<T>, scale_columns<T>, add_scaled_columns<T>, add_scaled_rows<T>,    shift_rows<T>,
          column_dots<T>, dot<T>,           transpose<T>,          add_factors<Plain<T>>, turn};
}

}  // namespace

namespace quaver::cpu {
extern const SpectralLoops QUAVER_AT_LEVEL(spectral_loops);
const SpectralLoops QUAVER_AT_LEVEL(spectral_loops) = {
    loops_with<float>(turn_floats), loops_with<double>(turn_precisely), pair_panel, add_pair_factors, gather};
}  // namespace quaver::cpu
