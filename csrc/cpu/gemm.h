// C [rows, columns] = A [rows, depth] B [depth, columns], with what the ops fuse into it: an operand is anything that
// fills panels (gemm_operands.h), so that B may be made, noise and all, as it is packed; the result takes a bias and is
// rounded to 16 bits as a tile leaves the cache.
//
// The sum of an element runs over depth in blocks whose size depends on depth alone, whatever the tile, the form or the
// number of threads: the same bits every time.
#pragma once
#include <algorithm>
#include <type_traits>

#include "common/integers.h"
#include "cpu/gemm_loops.h"
#include "cpu/noise_source.h"
#include "cpu/workspace.h"

namespace quaver::cpu {

template <class T>
const GemmLoopsOf<T>& gemm_loops_of();
template <>
inline const GemmLoopsOf<float>& gemm_loops_of<float>() {
  return gemm_loops().f32;
}
template <>
inline const GemmLoopsOf<double>& gemm_loops_of<double>() {
  return gemm_loops().f64;
}

// The loops for operands of pairs, if such operands of `dtype` are to be used: instead of widening bf16.
inline const PairLoops* pair_loops_of(ScalarType dtype) {
  if (dtype != ScalarType::BFloat16) return nullptr;
  return has_amx() ? gemm_loops().amx : has_bf16() ? gemm_loops().bf16 : nullptr;
}

// Panels of a block of an operand: those of the first `block` of depth, then those of the next.
template <class T>
struct Panels {
  T* data;
  int64_t width, block, count;

  int64_t size() const { return width * block; }
  T* at(int64_t panel, int64_t k) const { return data + (k / block * count + panel) * size() + k % block * width; }
};

// Elements (i, k) of A from (0, 0) on, packed or where they are.
template <class T>
struct Left {
  Panels<T> panels;
  // Where A is not packed: its elements at i * stride + k, or at k * stride + i.
  const T* direct = nullptr;
  int64_t stride = 0;
  bool by_row = false;

  // From (i, k) on, i a multiple of the panels' width.
  LeftBlock<T> at(int64_t i, int64_t k) const {
    if (!direct) return {panels.at(i / panels.width, k), panels.size(), panels.width, false};
    return {direct + (by_row ? i * stride + k : k * stride + i), panels.width * (by_row ? stride : 1), stride, by_row};
  }
};

// What an op does with tiles of C while they are in the cache: called once for each, when its sums are complete and
// before it is narrowed. Several threads call it at a time.
template <class T>
struct Finish {
  virtual void operator()(T* tile, int64_t stride, int64_t i, int64_t j, int64_t rows, int64_t columns) const = 0;

 protected:
  ~Finish() = default;
};

// Where C goes: T of its own, or narrowed by `narrow` into `to`; with bias [columns] or none; added to what is there,
// or not.
template <class T>
struct Result {
  void* to;
  int64_t stride;
  const T* bias = nullptr;
  bool accumulate = false;
  const DtypeLoops::Loops* narrow = nullptr;
  const Finish<T>* finish = nullptr;
};

// The depth of a panel: as equal as multiples of 128 (a group of noise) allow.
inline int64_t depth_block(int64_t depth, int64_t most) {
  const int64_t even = ceil_div(depth, std::max<int64_t>(1, ceil_div(depth, most)));
  return even > 128 ? std::min(most, round_up(even, 128)) : std::max<int64_t>(1, round_up(even, 16));
}

// Depth that is packed at a time: less would read C more often, more would leave room for fewer columns of B, for each
// of which A is packed again (2048 x 4096 x 4096: 11 % of the time at 4096, 4 % at 1024). A narrowed result must be
// made at once, up to kMostNarrowDepth; deeper ones are for their callers to narrow.
constexpr int64_t kMostDepth = 1024, kMostNarrowDepth = 4096;
// Packed bytes of each operand at a time: with those of the other they stay in the cache that all cores share.
constexpr int64_t kPackedBytes = 4 << 20;
// Up to this many rows each thread packs B for itself, a panel or so at a time, and uses it at once from its own cache
// (256 x 1024 x 4096: 0.88 of the time); above, or with columns too few for all threads, B is packed once for all.
constexpr int64_t kRowsByThread = 256;
// More rows than this are read from beyond the L1 cache: once for several panels, up to this many columns.
constexpr int64_t kFewRows = 48, kWideColumns = 96;
// Rows and columns of a tile: its A (96 x 256 floats: 96 KiB) and its C stay in the L2 cache.
constexpr int64_t kTileRows = 96, kTileColumns = 192;
// Fewer multiply-adds than this are not worth a second thread (about 3 us to hand out).
constexpr int64_t kSmallWork = 1 << 18;
// Packing is shared out in this many parts.
constexpr int64_t kParts = 64;

template <class T, class A, class B>
class Gemm {
 public:
  Gemm(const GemmLoopsOf<T>& loops, int64_t rows, int64_t columns, int64_t depth, const A& a, const B& b,
       const Result<T>& c)
      : loops_(loops),
        rows_(rows),
        columns_(columns),
        depth_(depth),
        a_(a),
        b_(b),
        c_(c),
        parallel_((rows + B::kPackingWork) * columns * std::max<int64_t>(depth, 1) > kSmallWork) {}

  void run() const {
    if (rows_ == 0 || columns_ == 0) return;
    const int64_t step = round_up(b_.step(loops_), loops_.columns), threads = torch::stable::get_num_threads();
    const bool by_thread = rows_ <= kRowsByThread && columns_ >= 2 * threads * step;
    const int64_t most = c_.narrow ? kMostNarrowDepth : kMostDepth;
    for (int64_t k = 0; k == 0 || k < depth_; k += most) {
      const int64_t length = std::min(depth_ - k, most);
      if (by_thread) {
        packed_by_thread(k, length);
      } else {
        packed_for_all(k, length);
      }
    }
  }

 private:
  // Calls body(begin, end) for parts of 0 .. count - 1.
  template <class Body>
  void in_parallel(int64_t count, Body&& body) const {
    if (!parallel_) return body(int64_t(0), count);
    torch::stable::parallel_for(0, count, 1, body);
  }

  Panels<T> panels(Use use, int64_t width, int64_t count, int64_t block, int64_t length) const {
    return {workspace<T>(use, count * width * round_up(length, block)), width, block, count};
  }

  // A tile of C: its product over `length`, from (i, k) of A and from the start of panel b_panel of B on.
  void multiply(const Left<T>& a, int64_t i, int64_t k, const Panels<T>& b, int64_t b_panel, int64_t rows,
                int64_t columns, int64_t length, T* to, int64_t stride, const T* bias, bool accumulate) const {
    for (int64_t at = 0; at == 0 || at < length; at += b.block) {
      loops_.multiply(rows, columns, std::min(length - at, b.block), a.at(i, k + at), b.at(b_panel, at), b.size(), to,
                      stride, bias, accumulate || at > 0);
    }
  }

  // Rows i .. of A over a range of depth: where they are, or the panels that they are to be packed into.
  Left<T> left(int64_t i, int64_t rows, int64_t k, int64_t length, int64_t block) const {
    if (a_.direct(columns_ > 2 * loops_.columns)) {
      const T* from = a_.transposed ? a_.at(k, i) : a_.at(i, k);
      return {{nullptr, loops_.rows, block, 0}, from, a_.row_stride(), !a_.transposed};
    }
    return {panels(Use::kPackedA, loops_.rows, ceil_div(rows, loops_.rows), block, length)};
  }

  // Calls body(to, stride) with the place for a tile of C, and finishes and narrows what it wrote. last: the sums are
  // complete then.
  template <class Body>
  void with_tile(int64_t i, int64_t j, int64_t rows, int64_t columns, bool last, Body&& body) const {
    const bool direct = !c_.narrow;
    const int64_t stride = direct ? c_.stride : round_up(columns, 16);
    T* tile = direct ? static_cast<T*>(c_.to) + i * stride + j : workspace<T>(Use::kTile, rows * stride);
    body(tile, stride);
    if (c_.finish && last) (*c_.finish)(tile, stride, i, j, rows, columns);
    if (direct) return;
    c_.narrow->store_rows(c_.to, i * c_.stride + j, c_.stride, tile, stride, rows, columns);
  }

  const T* bias_at(int64_t j) const { return c_.bias ? c_.bias + j : nullptr; }

  void packed_for_all(int64_t k, int64_t length) const {
    const int64_t block = depth_block(length, loops_.depth);
    const auto fitting = [&](int64_t step) {
      const int64_t packed = step * round_up(length, block) * int64_t(sizeof(T));
      return step * std::max<int64_t>(1, kPackedBytes / std::max<int64_t>(1, packed));
    };
    const int64_t b_step = round_up(b_.step(loops_), loops_.columns);
    const int64_t j_step = fitting(round_up(std::min(kTileColumns, columns_), b_step));
    const int64_t i_step = fitting(round_up(std::min(kTileRows, rows_), loops_.rows));
    for (int64_t j = 0; j < columns_; j += j_step) {
      const int64_t columns = std::min(j_step, columns_ - j);
      const auto b = panels(Use::kPackedB, loops_.columns, ceil_div(columns, loops_.columns), block, length);
      for (int64_t i = 0; i < rows_; i += i_step) {
        const int64_t rows = std::min(i_step, rows_ - i);
        const Left<T> a = left(i, rows, k, length, block);
        pack(a.panels, i, rows, b, j, i == 0 ? columns : 0, b_step, k, length);
        multiply_tiles(a, i, rows, b, j, columns, k, length);
      }
    }
  }

  // Every part packs its share of both operands, which take different times.
  void pack(const Panels<T>& a, int64_t i, int64_t rows, const Panels<T>& b, int64_t j, int64_t columns, int64_t b_step,
            int64_t k, int64_t length) const {
    const int64_t b_depth = b_.depth_step(loops_), across = ceil_div(columns, b_step);
    const int64_t b_tasks = across * ceil_div(length, b_depth);
    in_parallel(kParts, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * b_tasks / kParts; t < end * b_tasks / kParts; t++) {
        const int64_t first = t % across * b_step, from = t / across * b_depth;
        b_.pack(loops_, b, first / b.width, j + first, std::min(b_step, columns - first), from, k + from,
                std::min(b_depth, length - from));
      }
      const int64_t a_begin = begin * a.count / kParts, a_end = end * a.count / kParts;
      const int64_t a_first = a_begin * a.width, a_rows = std::min(a_end * a.width, rows) - a_first;
      if (a_rows > 0) a_.pack(loops_, a, a_begin, i + a_first, a_rows, 0, k, length);
    });
  }

  void multiply_tiles(const Left<T>& a, int64_t i, int64_t rows, const Panels<T>& b, int64_t j, int64_t columns,
                      int64_t k, int64_t length) const {
    const int64_t threads = torch::stable::get_num_threads(), across = ceil_div(columns, kTileColumns);
    const int64_t groups = ceil_div(rows, loops_.rows);
    int64_t down = ceil_div(rows, kTileRows);
    // A few tiles are made to come out even.
    while (down * across % threads && down * across < 8 * threads && down < groups) down++;
    const int64_t tile_rows = ceil_div(groups, down) * loops_.rows;
    down = ceil_div(rows, tile_rows);
    in_parallel(down * across, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        // Of 10 panels 4, 3 and 3: with 4, 4 and 2 the thread that has the last tiles waits for the others.
        const int64_t r = t % down * tile_rows, panel = t / down * b.count / across;
        const int64_t c = panel * b.width, next = (t / down + 1) * b.count / across * b.width;
        const int64_t tall = std::min(tile_rows, rows - r), wide = std::min(next, columns) - c;
        with_tile(i + r, j + c, tall, wide, k + length >= depth_, [&](T* to, int64_t stride) {
          multiply(a, r, 0, b, panel, tall, wide, length, to, stride, bias_at(j + c), c_.accumulate || k > 0);
        });
      }
    });
  }

  void packed_by_thread(int64_t k, int64_t length) const {
    const int64_t block = depth_block(length, loops_.depth);
    const Left<T> a = left(0, rows_, k, length, block);
    if (!a.direct) a_.pack(loops_, a.panels, 0, 0, rows_, 0, k, length);
    const int64_t depth = round_up(b_.depth_step(loops_), block), threads = torch::stable::get_num_threads();
    int64_t step = round_up(b_.step(loops_), loops_.columns);
    // Many rows of A do not stay in the cache: they are read once for several panels, where there are enough for all.
    while (rows_ > kFewRows && 2 * step <= kWideColumns && columns_ >= 8 * threads * step) step *= 2;
    in_parallel(ceil_div(columns_, step), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * step; j < std::min(columns_, end * step); j += step) {
        const int64_t columns = std::min(step, columns_ - j);
        const auto b = panels(Use::kPanel, loops_.columns, ceil_div(columns, loops_.columns), block, depth);
        with_tile(0, j, rows_, columns, k + length >= depth_, [&](T* to, int64_t stride) {
          for (int64_t at = 0; at == 0 || at < length; at += depth) {
            const int64_t part = std::min(depth, length - at);
            b_.pack(loops_, b, 0, j, columns, 0, k + at, part);
            multiply(a, 0, at, b, 0, rows_, columns, part, to, stride, bias_at(j), c_.accumulate || k + at > 0);
          }
        });
      }
    });
  }

  const GemmLoopsOf<T>& loops_;
  const int64_t rows_, columns_, depth_;
  const A& a_;
  const B& b_;
  const Result<T>& c_;
  const bool parallel_;
};

// Both operands are of pairs, or neither is.
template <class T, class A, class B>
void gemm(int64_t rows, int64_t columns, int64_t depth, const A& a, const B& b, const Result<T>& c) {
  STD_TORCH_CHECK(!c.narrow || depth <= kMostNarrowDepth, "quaver: a narrowed result of depth ", depth);
  if constexpr (std::is_same_v<T, float>) {
    if (a.pairs) return Gemm<T, A, B>(a.pairs->gemm, rows, columns, ceil_div(depth, 2), a, b, c).run();
  }
  Gemm<T, A, B>(gemm_loops_of<T>(), rows, columns, depth, a, b, c).run();
}

}  // namespace quaver::cpu
