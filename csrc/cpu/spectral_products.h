// What the host side of spectral_linear, spectral_delta and delta_linear shares: batches of rows, the factors as
// operands of products, and products with a right operand that is scaled along the depth for each sample.
#pragma once
#include <vector>

#include "cpu/convert.h"
#include "cpu/factor_loops.h"
#include "cpu/gemm_operands.h"
#include "cpu/output.h"
#include "cpu/spectral_loops.h"

namespace quaver::cpu {

using torch::stable::parallel_for;

template <class T>
const SpectralLoopsOf<T>& spectral_loops_of();
template <>
inline const SpectralLoopsOf<float>& spectral_loops_of<float>() {
  return spectral_loops().f32;
}
template <>
inline const SpectralLoopsOf<double>& spectral_loops_of<double>() {
  return spectral_loops().f64;
}

template <class T>
const FactorLoopsOf<T>& factor_loops_of();
template <>
inline const FactorLoopsOf<float>& factor_loops_of<float>() {
  return factor_loops().f32;
}
template <>
inline const FactorLoopsOf<double>& factor_loops_of<double>() {
  return factor_loops().f64;
}

// Calls body(C{}), C being float64 for float64 and float32 for the others.
template <class Body>
void with_compute(ScalarType dtype, Body&& body) {
  if (dtype == ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

// The loops that widen and narrow `dtype`; none for float32 and float64.
inline const DtypeLoops::Loops* narrow_loops(ScalarType dtype) {
  return dtype == compute_dtype(dtype) ? nullptr : &loops_of(dtype);
}

// Calls body(r) for each of `rows`, which have `elements` each.
template <class Body>
void for_rows(int64_t rows, int64_t elements, Body&& body) {
  parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) body(r);
  });
}

inline Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// How a dtype is multiplied: C's own arithmetic, or pairs of bf16.
template <class C>
struct Arithmetic {
  const DtypeLoops::Loops* narrow;  // of the 16-bit type
  const PairLoops* pairs;
  const GemmLoopsOf<C>& loops;

  explicit Arithmetic(ScalarType dtype) : narrow(narrow_loops(dtype)), pairs(pair_loops_of(dtype)), loops(of(pairs)) {}

  // Elements of the depth that an element of a panel holds, and how many of these a depth takes.
  int64_t together() const { return pairs ? 2 : 1; }
  int64_t elements(int64_t depth) const { return ceil_div(depth, together()); }

 private:
  static const GemmLoopsOf<C>& of(const PairLoops* pairs) {
    if constexpr (std::is_same_v<C, float>) {
      if (pairs) return pairs->gemm;
    }
    return gemm_loops_of<C>();
  }
};

// x [B, T, K]: rows `row` elements apart, samples `sample`.
struct Samples {
  Tensor tensor;
  int64_t batch, length, columns, row, sample;

  explicit Samples(const Tensor& x)
      : tensor(x.size(2) > 1 && x.stride(2) != 1 ? torch::stable::contiguous(x) : x),
        batch(x.size(0)),
        length(x.size(1)),
        columns(x.size(2)) {
    // Rows that overlap, as of an expanded tensor, would be taken for a matrix with a small stride.
    if (length > 1 && tensor.stride(1) < columns) tensor = torch::stable::contiguous(tensor);
    // Samples that begin at odd elements would not all hold pairs of 16-bit ones, where rows do.
    if (batch > 1 && tensor.stride(0) % 2 && columns % 2 == 0) tensor = torch::stable::contiguous(tensor);
    row = length > 1 ? tensor.stride(1) : columns;
    sample = tensor.stride(0);
  }

  int64_t rows() const { return batch * length; }
  const char* of(int64_t b) const { return const_data<char>(tensor) + b * sample * int64_t(tensor.element_size()); }
  // All rows as those of one matrix.
  Samples merged() const {
    if (batch <= 1 || (length > 1 ? sample == row * length : sample >= columns)) {
      Samples all = *this;
      if (length <= 1) all.row = batch > 1 ? sample : columns;
      all.length = rows();
      all.batch = 1;
      return all;
    }
    Samples all(torch::stable::contiguous(tensor));
    all.row = columns;
    all.length = all.rows();
    all.batch = 1;
    return all;
  }

  // A sample as an operand: (row, column), or (column, row) where it is transposed.
  template <class C>
  Matrix<C> matrix(const Arithmetic<C>& how, int64_t b, bool transposed) const {
    return {of(b), row, transposed, how.narrow, how.pairs, transposed ? length : columns};
  }
};

// A contiguous matrix of `dtype`'s arithmetic as an operand; rows [i, k], or [k, i] where it is transposed.
template <class C>
Matrix<C> matrix_of(const Arithmetic<C>& how, const void* data, int64_t stride, bool transposed, int64_t depth) {
  return {static_cast<const char*>(data), stride, transposed, how.narrow, how.pairs, depth};
}

// up [2n, N, r] with rows whose elements lie side by side, and either rows that follow each other or factors that do:
// [N, 2n, r] in memory, a matrix of all ranks, is as good as the order of the sizes.
inline Tensor rows_of_factors(const Tensor& up) {
  const int64_t rank = up.size(2);
  const bool by_rows = up.stride(0) == rank && up.stride(1) >= up.size(0) * rank, by_factors = up.stride(1) == rank;
  const bool dense = rank == 1 || up.stride(2) == 1;
  return dense && (by_rows || by_factors) ? up : torch::stable::contiguous(up);
}

// Rows first .. first + rows - 1 of up, of rows_of_factors(), with their factors side by side: to [rows, R], in C; each
// times its gain, of all rows, or as it is.
template <class C>
void gather_rows(C* to, int64_t stride, const Tensor& up, int64_t first, int64_t rows, const C* gain) {
  const int64_t size = int64_t(up.element_size()), ranks = up.size(0) * up.size(2);
  const DtypeLoops::Loops* widen = narrow_loops(up.scalar_type());
  const int64_t raw_stride = widen ? ranks : stride;
  char* raw = widen ? workspace<char>(Use::kNarrow, rows * ranks * size) : reinterpret_cast<char*>(to);
  const bool adjacent = up.stride(0) == up.size(2);  // a row's factors lie side by side: one piece
  spectral_loops().gather(raw, raw_stride * size, const_data<char>(up) + first * up.stride(1) * size,
                          up.stride(0) * size, up.stride(1) * size, (adjacent ? ranks : up.size(2)) * size,
                          adjacent ? 1 : up.size(0), rows);
  for (int64_t i = 0; i < rows; i++) {
    C* line = to + i * stride;
    if (widen) widen->widen(line, raw, i * ranks, ranks);
    if (gain) spectral_loops_of<C>().scale_panel(line, line, gain + first + i, ranks, 1);
  }
}

// The factors `up` [2n, N, r] as the right operand of z up^T: (i, k) is gain_i up(k / r, i, k % r).
template <class C>
struct UpRows {
  const char* data;
  int64_t factor, row, rank, depth;  // distances between factors and between rows; all ranks
  int64_t element_size;
  const DtypeLoops::Loops* widen;  // of the factors' type, where that is not C
  const C* gain = nullptr;         // of each row
  const PairLoops* pairs = nullptr;

  UpRows(const Tensor& up, const C* gain_of_rows, const PairLoops* as_pairs)
      : data(const_data<char>(up)),
        factor(up.stride(0)),
        row(up.stride(1)),
        rank(up.size(2)),
        depth(up.size(0) * up.size(2)),
        element_size(int64_t(up.element_size())),
        widen(narrow_loops(up.scalar_type())),
        gain(gain_of_rows),
        pairs(as_pairs) {}

  static constexpr int64_t kPackingWork = 6;
  int64_t step(const GemmLoopsOf<C>& loops) const { return loops.columns; }
  int64_t depth_step(const GemmLoopsOf<C>& loops) const { return loops.depth; }

  void pack(const GemmLoopsOf<C>& loops, const Panels<C>& panels, int64_t panel, int64_t i, int64_t count, int64_t to,
            int64_t k, int64_t length) const {
    for (int64_t first = 0; first < count; first += panels.width, panel++) {
      const int64_t rows = std::min(panels.width, count - first);
      for_blocks(panels, to, k, length, [&](int64_t to_k, int64_t from_k, int64_t part) {
        C* out = panels.at(panel, to_k);
        if constexpr (std::is_same_v<C, float>) {
          if (pairs) {
            const int64_t singles = std::min(2 * part, depth - 2 * from_k);
            C* wide = workspace<C>(Use::kPairs, 2 * part * panels.width);
            fill(loops, wide, panels.width, i + first, rows, 2 * from_k, singles);
            return spectral_loops().pair_panel(out, wide, nullptr, panels.width, singles);
          }
        }
        fill(loops, out, panels.width, i + first, rows, from_k, part);
      });
    }
  }

  // to[k * width + i]: single elements from (i, k) on.
  void fill(const GemmLoopsOf<C>& loops, C* to, int64_t width, int64_t i, int64_t rows, int64_t k,
            int64_t length) const {
    const bool adjacent = factor == rank;  // a row's factors lie side by side
    for (int64_t done = 0; done < length;) {
      const int64_t f = (k + done) / rank, j = (k + done) % rank;
      const int64_t part = adjacent ? length - done : std::min(rank - j, length - done);
      const int64_t at = f * factor + i * row + j;
      if (widen) {
        C* made = workspace<C>(Use::kRows, rows * part);
        for (int64_t r = 0; r < rows; r++) widen->widen(made + r * part, data, at + r * row, part);
        loops.pack_rows(to + done * width, width, made, part, rows, part);
      } else {
        loops.pack_rows(to + done * width, width, reinterpret_cast<const C*>(data) + at, row, rows, part);
      }
      done += part;
    }
    if (gain) spectral_loops_of<C>().scale_columns(to, width, gain + i, length, rows);
  }
};

// Two right operands one below the other: the second begins at `split` of the depth (of elements of panels).
template <class C, class First, class Second>
struct Stacked {
  const First& first;
  const Second& second;
  int64_t split;

  static constexpr int64_t kPackingWork = 6;
  int64_t step(const GemmLoopsOf<C>& loops) const { return std::max(first.step(loops), second.step(loops)); }
  int64_t depth_step(const GemmLoopsOf<C>& loops) const { return loops.depth; }

  void pack(const GemmLoopsOf<C>& loops, const Panels<C>& panels, int64_t panel, int64_t i, int64_t count, int64_t to,
            int64_t k, int64_t length) const {
    const int64_t of_first = std::clamp<int64_t>(split - k, 0, length);
    if (of_first > 0) first.pack(loops, panels, panel, i, count, to, k, of_first);
    if (of_first < length) {
      second.pack(loops, panels, panel, i, count, to + of_first, k + of_first - split, length - of_first);
    }
  }
};

// A result of a product: of C, or narrowed by `narrow`.
struct Place {
  char* data;
  int64_t stride;
  const DtypeLoops::Loops* narrow = nullptr;
};

// gemm() into a place; where it is of 16 bits and the depth more than gemm() can narrow at once, by way of memory.
template <class C, class A, class B>
void multiply_into(int64_t rows, int64_t columns, int64_t depth, const A& a, const B& b, const Place& to,
                   const C* bias = nullptr, const Finish<C>* finish = nullptr) {
  if (!to.narrow || depth <= kMostNarrowDepth) {
    return gemm<C>(rows, columns, depth, a, b, Result<C>{to.data, to.stride, bias, false, to.narrow, finish});
  }
  C* wide = workspace<C>(Use::kSums, rows * columns);
  gemm<C>(rows, columns, depth, a, b, Result<C>{wide, columns, bias, false, nullptr, finish});
  for_rows(rows, columns, [&](int64_t r) { to.narrow->store(to.data, r * to.stride, wide + r * columns, columns); });
}

// The left operand of several products: where it is, or packed into `buffer`, in blocks of depth of `block`.
template <class C>
Left<C> left_of(const GemmLoopsOf<C>& loops, const Matrix<C>& a, int64_t rows, int64_t length, int64_t block,
                C* buffer) {
  if (a.direct(true)) return {{nullptr, loops.rows, block, 0}, a.at(0, 0), a.row_stride(), true};
  const Panels<C> panels{buffer, loops.rows, block, ceil_div(rows, loops.rows)};
  // Several groups of rows at a time: of a transposed matrix they lie side by side.
  constexpr int64_t kGroups = 8;
  parallel_for(0, ceil_div(panels.count, kGroups), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kGroups, i = first * panels.width;
    const int64_t count = std::min(rows, end * kGroups * panels.width) - i;
    if (count > 0) a.pack(loops, panels, first, i, count, 0, 0, length);
  });
  return {panels};
}
// How many elements that takes.
template <class C>
int64_t left_size(const GemmLoopsOf<C>& loops, const Matrix<C>& a, int64_t rows, int64_t length, int64_t block) {
  return a.direct(true) ? 0 : round_up(rows, loops.rows) * round_up(length, block);
}

// A vector in the compute type: of `count` equal values where it has one.
template <class C>
std::vector<C> values_of(const Tensor& x_, int64_t count) {
  const Tensor x = torch::stable::contiguous(x_);
  std::vector<C> values(static_cast<size_t>(std::max<int64_t>(count, 1)));
  loops_of(x.scalar_type()).widen(values.data(), const_data<char>(x), 0, x.numel());
  if (x.numel() == 1) std::fill(values.begin() + 1, values.end(), values[0]);
  return values;
}
template <class C>
std::vector<C> values_of(const OptionalTensor& x, int64_t count) {
  return x ? values_of<C>(*x, count) : std::vector<C>();
}
template <class C>
const C* pointer(const std::vector<C>& values) {
  return values.empty() ? nullptr : values.data();
}

// Coefficients [rows, factors], each `rank` times: [rows, factors * rank].
template <class C>
std::vector<C> expanded(const Tensor& coefficients_, int64_t rank) {
  const Tensor coefficients = torch::stable::contiguous(coefficients_);
  const C* from = const_data<C>(coefficients);
  std::vector<C> all(size_t(coefficients.numel() * rank));
  for (int64_t i = 0; i < coefficients.numel(); i++) std::fill_n(all.data() + i * rank, rank, from[i]);
  return all;
}

}  // namespace quaver::cpu
