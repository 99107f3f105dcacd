// The weights W + sigma * epsilon of one member, made as they are packed for a product: they exist nowhere else.
#pragma once
#include <cstring>

#include "cpu/gemm_operands.h"
#include "cpu/placed_noise.h"

namespace quaver::cpu {

// C: float, or double. The sum is rounded to C, then to the type of `round`, the input's, where that is narrower.
template <class C>
struct PerturbedWeight {
  const char* weight;
  int64_t element_size;
  const DtypeLoops::Loops* loops;
  const DtypeLoops::Loops* round;
  const C* sigma;  // this member's
  SigmaShape::Kind sigma_kind;
  Source source;
  Placement place;

  // Whether columns from a multiple of 128 on begin a group of noise in every row.
  bool aligned() const { return place.row_length % 128 == 0 && place.first % 128 == 0; }

  // to[r * columns + c] = W'(row + r, column + c), as a C or in the 16 bits of the type of `round`.
  template <class To>
  void make(To* to, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    if (columns == place.columns) return make_run(to, row * columns, rows * columns);
    for (int64_t r = row; r < row + rows; r++, to += columns) make_run(to, r * place.columns + column, columns);
  }

 private:
  // Positions at .. at + length - 1 of the block.
  template <class To>
  void make_run(To* to, int64_t at, int64_t length) const {
    const auto& philox = philox_loops();
    alignas(64) float noise[kTile];
    alignas(64) C scale[kTile];
    for_placed_tiles(place, at, at + length, [&](uint64_t element, int64_t position, int64_t count) {
      for (int64_t b = 0; b < count * element_size; b += 64) __builtin_prefetch(weight + position * element_size + b);
      philox.fill(noise, count, source, element);
      const C* scales = sigma_at(sigma, sigma_kind, place.columns, position, count, scale);
      const auto perturb = [&](C* out) {
        loops->perturb_wide(out, weight, position, noise, scales, sigma_kind != SigmaShape::kScalar, count);
      };
      if constexpr (std::is_same_v<To, C>) {
        C* out = to + (position - at);
        perturb(out);
        if (round) round->round(out, count);
      } else {
        alignas(64) C wide[kTile];
        perturb(wide);
        round->store(to, position - at, wide, count);
      }
    });
  }
};

// Values made at a time before they are packed: they stay in the L1 cache.
constexpr int64_t kMadeAtATime = 4096;
// Multiply-adds that take as long as the noise of an element.
constexpr int64_t kNoiseWork = 64;
// Runs of noise that do not begin with a group of 128 make it for nothing in part: they are this long, or whole rows.
constexpr int64_t kLongRun = 1024;

// W' as the right operand of x W'^T: (i, k) is W'(i, k).
template <class C>
struct PerturbedRows {
  const PerturbedWeight<C>& weight;
  const PairLoops* pairs = nullptr;

  static constexpr int64_t kPackingWork = kNoiseWork;
  int64_t step(const GemmLoopsOf<C>& loops) const { return loops.columns; }
  int64_t depth_step(const GemmLoopsOf<C>& loops) const {
    const int64_t run = std::clamp<int64_t>(weight.place.columns, 1, kLongRun);
    return weight.aligned() ? loops.depth : pairs ? ceil_div(run, 2) : run;
  }

  void pack(const GemmLoopsOf<C>& loops, const Panels<C>& panels, int64_t panel, int64_t i, int64_t count, int64_t to,
            int64_t k, int64_t length) const {
    for (int64_t first = 0; first < count; first += panels.width, panel++) {
      const int64_t rows = std::min(panels.width, count - first);
      const C* made = make(i + first, rows, k, length);
      for_blocks(panels, to, 0, length, [&](int64_t to_k, int64_t from, int64_t part) {
        loops.pack_rows(panels.at(panel, to_k), panels.width, made + from, length, rows, part);
      });
    }
  }

 private:
  const C* make(int64_t row, int64_t rows, int64_t k, int64_t length) const {
    if (!pairs) {
      C* made = workspace<C>(Use::kRows, rows * length);
      weight.make(made, row, rows, k, length);
      return made;
    }
    const int64_t columns = std::min(2 * length, weight.place.columns - 2 * k);
    auto* made = workspace<uint16_t>(Use::kPairs, rows * 2 * length);
    weight.make(made, row, rows, 2 * k, columns);
    if (columns < 2 * length) {  // an odd one at the end of each row: from the last row on, a zero beside it
      for (int64_t r = rows - 1; r >= 0; r--) {
        uint16_t* to = made + r * 2 * length;
        std::memmove(to, made + r * columns, size_t(columns) * sizeof *to);
        to[columns] = 0;
      }
    }
    return reinterpret_cast<const C*>(made);
  }
};

// W' as the right operand of g W': (i, k) is W'(k, i).
template <class C>
struct PerturbedColumns {
  const PerturbedWeight<C>& weight;
  const PairLoops* pairs = nullptr;

  static constexpr int64_t kPackingWork = kNoiseWork;
  int64_t step(const GemmLoopsOf<C>& loops) const {
    const int64_t groups = loops.columns % 128 ? 8 * loops.columns : loops.columns;  // 128, 256 or 384
    return weight.aligned() ? groups : std::clamp<int64_t>(weight.place.columns, 1, kLongRun);
  }
  int64_t depth_step(const GemmLoopsOf<C>& loops) const {
    return std::max<int64_t>(8, made_at_a_time() / std::max<int64_t>(1, step(loops)));
  }

  void pack(const GemmLoopsOf<C>& loops, const Panels<C>& panels, int64_t panel, int64_t i, int64_t count, int64_t to,
            int64_t k, int64_t length) const {
    const int64_t rows = std::max<int64_t>(1, made_at_a_time() / count);
    for_blocks(panels, to, k, length, [&](int64_t to_k, int64_t from, int64_t part) {
      for (int64_t done = 0; done < part; done += rows) {
        const int64_t now = std::min(rows, part - done);
        const C* made = make(from + done, now, i, count);
        loops.pack_columns(panels.at(panel, to_k + done), panels.size(), panels.width, made, count, count, now);
      }
    });
  }

 private:
  int64_t made_at_a_time() const { return pairs ? kMadeAtATime / 2 : kMadeAtATime; }

  const C* make(int64_t k, int64_t length, int64_t column, int64_t count) const {
    if (!pairs) {
      C* made = workspace<C>(Use::kRows, length * count);
      weight.make(made, k, length, column, count);
      return made;
    }
    const int64_t rows = std::min(2 * length, weight.place.rows - 2 * k);
    auto* narrow = workspace<uint16_t>(Use::kPairs, rows * count);
    weight.make(narrow, 2 * k, rows, column, count);
    C* made = workspace<C>(Use::kRows, length * count);
    for (int64_t r = 0; r < rows; r += 2) {
      const uint16_t* even = narrow + r * count;
      pairs->zip(made + r / 2 * count, even, r + 1 < rows ? even + count : nullptr, count);
    }
    return made;
  }
};

}  // namespace quaver::cpu
