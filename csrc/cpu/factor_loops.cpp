#include "cpu/factor_loops.h"

#include "cpu/amx.h"
#include "cpu/gemm_kernel.h"
#include "cpu/level.h"

namespace {

using quaver::cpu::FactorSizes;
using quaver::cpu::LeftBlock;
using quaver::cpu::SampleTiles;

// Factors whose products are made at a time: 8 rows of 48 columns of 16 are 24 of the L1 cache's 32 or 48 KiB.
constexpr int64_t kFactors = 16;
// Rows of a side at a time, of as many factors as a tile has rows: as much.
constexpr int64_t kSideRows = 16;

template <class T>
QUAVER_INLINE int vectors_of(int64_t columns) {
  return int((columns + kLanes<T> - 1) / kLanes<T>);
}

// made[i][f][..] = M_f[i][..] of `factors` factors, from the first of `a` and `b` on.
template <class P, class T = typename P::Element>
QUAVER_INLINE void make(T* made, const T* a, int64_t a_stride, bool by_row, const T* b, int64_t rows, int64_t factors,
                        int64_t rank, int vectors) {
  const Tile<T> tile = (by_row ? tiles_of<P, true>(vectors) : tiles_of<P, false>(vectors))[rows - 1];
  const int64_t depth = rank / P::kTogether;
  for (int64_t f = 0; f < factors; f++) {
    tile(depth, a, a_stride, b, made + f * kColumns<T>, kFactors * kColumns<T>, nullptr, kNothing);
    a += depth * (by_row ? 1 : a_stride);
    b += depth * kColumns<T>;
  }
}

// to[0 .. columns - 1] = (accumulate: +) from
template <class T>
QUAVER_INLINE void write(T* to, const T* from, int64_t columns, bool accumulate) {
  using V = Vector<T>;
  int64_t j = 0;
  for (; j + kLanes<T> <= columns; j += kLanes<T>) {
    const V x = load<V>(from + j);
    store(to + j, accumulate ? load<V>(to + j) + x : x);
  }
  for (; j < columns; j++) to[j] = accumulate ? to[j] + from[j] : from[j];
}

template <class P, class T = typename P::Element>
void sum(const SampleTiles<T>& to, T* sums, const LeftBlock<T>& a, const T* b, int64_t rows, const FactorSizes<T>& s,
         bool accumulate) {
  constexpr int64_t kWidth = kColumns<T>;
  alignas(64) T made[kRows * kFactors * kWidth];
  const int vectors = vectors_of<T>(s.columns);
  const Tile<T>* tiles = tiles_of<Plain<T>, true>(vectors);
  for (int64_t f = 0; f < s.factors; f += kFactors) {
    const int64_t now = s.factors - f < kFactors ? s.factors - f : kFactors, at = f * s.rank / P::kTogether;
    make<P>(made, a.data + at * (a.by_row ? 1 : a.stride), a.stride, a.by_row, b + at * kWidth, rows, now, s.rank,
            vectors);
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t m = 0; m < s.samples; m += kRows) {
        const int64_t height = s.samples - m < kRows ? s.samples - m : kRows;
        tiles[height - 1](now, s.coefficients + m * s.stride + f, s.stride, made + i * kFactors * kWidth,
                          sums + (m * kRows + i) * kWidth, kRows * kWidth, nullptr, f > 0 ? kResult : kNothing);
      }
    }
  }
  for (int64_t m = 0; m < s.samples; m++) {
    for (int64_t i = 0; i < rows; i++) {
      write(to.data + m * to.sample + i * to.stride, sums + (m * kRows + i) * kWidth, s.columns, accumulate);
    }
  }
}

#if defined(__AVX512F__)
// Two tiles of M_f, [16, 32], at `made`, rows `stride` floats apart: of pairs of factors whose rows in A are a_stride
// floats apart. `steps` whole tiles of the depth, then a tail, which the tiles are configured for.
QUAVER_INLINE void make_tiles(float* made, int64_t stride, const float* a, int64_t a_stride, const float* b,
                              int64_t steps, bool tail) {
  constexpr int64_t kWide = 2 * kTile, kRowBytes = kWide * 4;
  QUAVER_TILE_ZERO(0);
  QUAVER_TILE_ZERO(1);
  for (int64_t k = 0; k < steps; k++, a += kTile, b += kTile * kWide) {
    QUAVER_TILE_LOAD(4, a, a_stride * 4);
    QUAVER_TILE_LOAD(6, b, kRowBytes);
    QUAVER_TILE_PRODUCT(0, 4, 6);
    QUAVER_TILE_LOAD(6, b + kTile, kRowBytes);
    QUAVER_TILE_PRODUCT(1, 4, 6);
  }
  if (tail) {
    QUAVER_TILE_LOAD(5, a, a_stride * 4);
    QUAVER_TILE_LOAD(7, b, kRowBytes);
    QUAVER_TILE_PRODUCT(0, 5, 7);
    QUAVER_TILE_LOAD(7, b + kTile, kRowBytes);
    QUAVER_TILE_PRODUCT(1, 5, 7);
  }
  QUAVER_TILE_STORE(0, made, stride * 4);
  QUAVER_TILE_STORE(1, made + kTile, stride * 4);
}

// Tiles 0 and 1 are those of M, 4 and 6 of whole steps of the depth, 5 and 7 of the rest of it.
QUAVER_INLINE void configure_factor_tiles(int rows, int tail) {
  TileConfig config;
  const auto tile = [&](int which, int height, int width) {
    config.rows[which] = uint8_t(height);
    config.row_bytes[which] = uint16_t(width * 4);
  };
  tile(0, rows, kTile);
  tile(1, rows, kTile);
  tile(4, rows, kTile);
  tile(6, kTile, kTile);
  if (tail > 0) {
    tile(5, rows, tail);
    tile(7, tail, kTile);
  }
  load_tile_config(config);
}

void sum_amx(const SampleTiles<float>& to, float* sums, const LeftBlock<float>& a, const float* b, int64_t rows,
             const FactorSizes<float>& s, bool accumulate) {
  // Factors at a time. What is made of 8, and the sums of 8 samples, are 16 KiB each of the L1 cache. The sums of more
  // do not stay there, and are read and written less often for 32 (16 samples: 12.6 -> 10.5 ms, 8: 5.7 -> 7.4).
  constexpr int64_t kMost = 32, kWidth = 2 * kTile;
  const int64_t at_a_time = s.samples > 8 ? kMost : 8;
  alignas(64) float made[kTile * kMost * kWidth];
  const Tile<float>* tiles =
      s.columns <= kTile ? kTiles<Plain<float>, true, 1, kWidth> : kTiles<Plain<float>, true, 2, kWidth>;
  const int64_t depth = s.rank / 2;
  configure_factor_tiles(int(rows), int(depth % kTile));
  for (int64_t f = 0; f < s.factors; f += at_a_time) {
    const int64_t now = s.factors - f < at_a_time ? s.factors - f : at_a_time;
    for (int64_t k = 0; k < now; k++) {
      make_tiles(made + k * kWidth, at_a_time * kWidth, a.data + (f + k) * depth, a.stride,
                 b + (f + k) * depth * kWidth, depth / kTile, depth % kTile > 0);
    }
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t m = 0; m < s.samples; m += kRows) {
        const int64_t height = s.samples - m < kRows ? s.samples - m : kRows;
        tiles[height - 1](now, s.coefficients + m * s.stride + f, s.stride, made + i * at_a_time * kWidth,
                          sums + (m * kTile + i) * kWidth, kTile * kWidth, nullptr, f > 0 ? kResult : kNothing);
      }
    }
  }
  release_tiles();
  for (int64_t m = 0; m < s.samples; m++) {
    for (int64_t i = 0; i < rows; i++) {
      write(to.data + m * to.sample + i * to.stride, sums + (m * kTile + i) * kWidth, s.columns, accumulate);
    }
  }
}
#endif

// The dots of 4 factors with 4 samples, or of the first of them: what is beyond repeats the last, and is not stored.
template <class T>
QUAVER_INLINE void add_dots(T* dots, const T* made, const T* g, int64_t rows, int64_t factors, int64_t samples,
                            int64_t of_samples, int vectors) {
#if defined(__AVX512F__)
  constexpr int kF = 4, kB = 4;
#else
  constexpr int kF = 4, kB = 2;
#endif
  using V = Vector<T>;
  for (int64_t f = 0; f < factors; f += kF) {
    for (int64_t m = 0; m < samples; m += kB) {
      V sum[kF][kB] = {};
      const T *of_f[kF], *of_b[kB];
      for (int i = 0; i < kF; i++) of_f[i] = made + (f + i < factors ? f + i : factors - 1) * kColumns<T>;
      for (int i = 0; i < kB; i++) of_b[i] = g + (m + i < samples ? m + i : samples - 1) * kColumns<T>;
      for (int64_t i = 0; i < rows; i++) {
        for (int v = 0; v < vectors; v++) {
          V x[kF], y[kB];
#pragma GCC unroll 4
          for (int k = 0; k < kF; k++) x[k] = load<V>(of_f[k] + i * kFactors * kColumns<T> + v * kLanes<T>);
#pragma GCC unroll 4
          for (int k = 0; k < kB; k++) y[k] = load<V>(of_b[k] + i * of_samples * kColumns<T> + v * kLanes<T>);
#pragma GCC unroll 4
          for (int k = 0; k < kF; k++) {
#pragma GCC unroll 4
            for (int l = 0; l < kB; l++) sum[k][l] = multiply_add(x[k], y[l], sum[k][l]);
          }
        }
      }
      for (int k = 0; k < kF && f + k < factors; k++) {
        for (int l = 0; l < kB && m + l < samples; l++) {
          T* to = dots + ((f + k) * of_samples + m + l) * kLanes<T>;
          store(to, load<V>(to) + sum[k][l]);
        }
      }
    }
  }
}

template <class T>
void dots(T* dots, const LeftBlock<T>& a, const T* b, const T* g, int64_t rows, const FactorSizes<T>& s) {
  alignas(64) T made[kRows * kFactors * kColumns<T>];
  const int vectors = vectors_of<T>(s.columns);
  for (int64_t f = 0; f < s.factors; f += kFactors) {
    const int64_t now = s.factors - f < kFactors ? s.factors - f : kFactors;
    make<Plain<T>>(made, a.data + f * s.rank * (a.by_row ? 1 : a.stride), a.stride, a.by_row,
                   b + f * s.rank * kColumns<T>, rows, now, s.rank, vectors);
    add_dots(dots + f * s.samples * kLanes<T>, made, g, rows, now, s.samples, s.samples, vectors);
  }
}

template <class T>
void add_side(T* side, const LeftBlock<T>& a, const T* g, int64_t rows, const FactorSizes<T>& s) {
  alignas(64) T shares[kRows * kSideRows * kColumns<T>];
  const int vectors = vectors_of<T>(s.columns);
  const Tile<T>* of_coefficients = tiles_of<Plain<T>, false>(vectors);
  const Tile<T>* of_a = a.by_row ? tiles_of<Plain<T>, true>(vectors) : tiles_of<Plain<T>, false>(vectors);
  for (int64_t f = 0; f < s.factors; f += kRows) {
    const int64_t now = s.factors - f < kRows ? s.factors - f : kRows;
    for (int64_t i = 0; i < rows; i++) {
      of_coefficients[now - 1](s.samples, s.coefficients + f, s.stride, g + i * s.samples * kColumns<T>,
                               shares + i * kColumns<T>, kSideRows * kColumns<T>, nullptr, kNothing);
    }
    for (int64_t k = 0; k < now; k++) {
      for (int64_t r = 0; r < s.rank; r += kRows) {
        const int64_t height = s.rank - r < kRows ? s.rank - r : kRows, at = (f + k) * s.rank + r;
        of_a[height - 1](rows, a.data + at * (a.by_row ? a.stride : 1), a.stride, shares + k * kSideRows * kColumns<T>,
                         side + at * kColumns<T>, kColumns<T>, nullptr, kResult);
      }
    }
  }
}

template <class T>
constexpr quaver::cpu::FactorLoopsOf<T> loops = {
    {kRows, sum<Plain<T>>}, dots<T>, kLanes<T>, add_side<T>, int(kSideRows)};

#if defined(__AVX512F__)
constexpr quaver::cpu::FactorSumLoops<float> bf16 = {kRows, sum<Pairs>}, amx = {kTile, sum_amx};
#else
constexpr quaver::cpu::FactorSumLoops<float> bf16{}, amx{};
#endif

}  // namespace

namespace quaver::cpu {
extern const FactorLoops QUAVER_AT_LEVEL(factor_loops);
const FactorLoops QUAVER_AT_LEVEL(factor_loops) = {loops<float>, loops<double>, bf16, amx};
}  // namespace quaver::cpu
