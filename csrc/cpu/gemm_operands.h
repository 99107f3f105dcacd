// What can stand on either side of a product: operands that fill panels (gemm.h).
//
//   pack(loops, panels, panel, i, count, to, k, length)
//       elements (i .. i + count - 1, k .. k + length - 1), from panel number `panel` and depth `to` of it on;
//       i is a multiple of the panels' width away from the first
//   kPackingWork                        multiply-adds that take as long as packing an element
//   step(loops), depth_step(loops)      what it likes to pack at a time
//   pairs                               not null: an element is a pair of bf16 (PairLoops), the last one with a zero
//                                       where the depth is odd, and i, k, .. count these
#pragma once
#include "cpu/gemm.h"

namespace quaver::cpu {

// Calls body(to, k, length) for the parts of a range of depth that lie in one block each.
template <class T, class Body>
void for_blocks(const Panels<T>& panels, int64_t to, int64_t k, int64_t length, Body&& body) {
  for (const int64_t end = to + length; to < end;) {
    const int64_t part = std::min(end, (to / panels.block + 1) * panels.block) - to;
    body(to, k, part);
    to += part;
    k += part;
  }
}

// A matrix in memory: element (i, k) at i * stride + k, or at k * stride + i where it is transposed. 16-bit elements
// are widened on the way, or taken in pairs.
template <class T>
struct Matrix {
  const char* data;
  int64_t stride;
  bool transposed;
  const DtypeLoops::Loops* widen = nullptr;  // of the 16-bit type
  const PairLoops* pairs = nullptr;          // of bf16, which then is not widened
  int64_t depth = 0;                         // of single elements, for pairs: whether the last has a partner

  // On the left it is read where it is, which saves 3 to 9 % of a product with 448 columns: unless its elements must be
  // made, or rows a multiple of 4 KiB apart would share a few sets of the caches. Nor where it is transposed and
  // several panels are multiplied by it: each step of the depth is then a line, of which half is used, and soon a page
  // (0.65 of the rate of packed panels where steps are 1.8 KiB apart).
  bool direct(bool by_several) const {
    return is_there() && row_stride() * int64_t(sizeof(T)) % 4096 != 0 && !(transposed && by_several);
  }
  // Rows of the memory as elements of T, for a matrix that has them.
  int64_t row_stride() const { return pairs ? stride / 2 : stride; }
  const T* at(int64_t row, int64_t column) const {
    return reinterpret_cast<const T*>(data) + row * row_stride() + column;
  }
  static constexpr int64_t kPackingWork = 4;
  int64_t step(const GemmLoopsOf<T>& loops) const { return 8 * loops.columns; }
  int64_t depth_step(const GemmLoopsOf<T>& loops) const { return loops.depth; }

  void pack(const GemmLoopsOf<T>& loops, const Panels<T>& panels, int64_t panel, int64_t i, int64_t count, int64_t to,
            int64_t k, int64_t length) const {
    const int64_t at_a_time = transposed ? count : panels.width;
    // Panel by panel, all of its depth: what is read next lies beside what was (1.1 against 0.85 ns an element).
    for (int64_t first = 0; first < count; first += at_a_time, panel++) {
      for_blocks(panels, to, k, length, [&](int64_t to_k, int64_t from_k, int64_t part) {
        T* out = panels.at(panel, to_k);
        if (transposed) return pack_transposed(loops, out, panels, i, count, from_k, part);
        const int64_t rows = std::min(panels.width, count - first);
        const auto [from, from_stride] = block_at(i + first, rows, from_k, part);
        loops.pack_rows(out, panels.width, from, from_stride, rows, part);
      });
    }
  }

 private:
  // Whether the elements of T are in the memory: pairs are where every row begins with one and is made of whole ones.
  bool is_there() const {
    if (!pairs) return !widen;
    return !transposed && depth % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(T) == 0;
  }

  struct Block {
    const T* from;
    int64_t stride;
  };

  // `rows` runs of `length` elements, the first at (row, column) of the memory: there, or made from what is.
  Block block_at(int64_t row, int64_t rows, int64_t column, int64_t length) const {
    if (is_there()) return {at(row, column), row_stride()};
    T* made = workspace<T>(Use::kRows, rows * length);
    for (int64_t r = 0; r < rows; r++) {
      if (pairs) {
        make_pairs(made + r * length, row + r, column, length);
      } else {
        widen->widen(made + r * length, data, (row + r) * stride + column, length);
      }
    }
    return {made, length};
  }

  void make_pairs(T* to, int64_t row, int64_t column, int64_t length) const {
    const auto* from = reinterpret_cast<const uint16_t*>(data);
    if (transposed) {
      from += 2 * row * stride + column;
      return pairs->zip(to, from, 2 * row + 1 < depth ? from + stride : nullptr, length);
    }
    const int64_t there = std::min(2 * length, depth - 2 * column);
    auto* singles = reinterpret_cast<uint16_t*>(to);
    std::copy_n(from + row * stride + 2 * column, there, singles);
    std::fill(singles + there, singles + 2 * length, uint16_t(0));
  }

  void pack_transposed(const GemmLoopsOf<T>& loops, T* out, const Panels<T>& panels, int64_t i, int64_t count,
                       int64_t k, int64_t length) const {
    // Rows that are made stay in the L1 cache.
    const int64_t few = std::max<int64_t>(1, 4096 / count);
    const int64_t rows = is_there() ? length : pairs ? round_up(few, kPairsTogether) : few;
    for (int64_t done = 0; done < length; done += rows) {
      const int64_t part = std::min(rows, length - done);
      const auto [from, from_stride] = block_at(k + done, part, i, count);
      loops.pack_columns(out + done * panels.width, panels.size(), panels.width, from, from_stride, count, part);
    }
  }
};

}  // namespace quaver::cpu
