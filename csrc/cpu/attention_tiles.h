// What attention on the CPU is made of, a block of queries and a block of keys at a time. Scores are held transposed, a
// row for each key and a lane for each query: maxima and sums over keys are then vertical.
#pragma once
#include <type_traits>

#include "common/dtype.h"
#include "cpu/exponential.h"
#include "cpu/tile_product.h"
#include "cpu/transpose.h"

namespace {

using quaver::compute_t;
using quaver::narrow;
using quaver::widen;

// Queries at a time: with 64 keys their scores are 16 KiB.
constexpr int64_t kQueries = 64;

template <class T>
constexpr T kLowest = sizeof(T) == 4 ? T(-3.4028234663852886e38) : T(-1.7976931348623157e308);

// to [count, width] = from, widened; then rows and columns of zeros up to a block.
template <class E, class T = compute_t<E>>
QUAVER_INLINE void read_rows(T* to, int64_t to_stride, const E* from, int64_t from_stride, int64_t count,
                             int64_t width) {
  int64_t whole = 0;
  // By hand: loops over so few elements would lose more in their beginnings and ends.
  if constexpr (std::is_same_v<E, T>) {
    whole = width / kLanes<T> * kLanes<T>;
    for (int64_t t = 0; t < count; t++) {
      for (int64_t c = 0; c < whole; c += kLanes<T>) {
        store(to + t * to_stride + c, load<Vector<T>>(from + t * from_stride + c));
      }
    }
  }
  for (int64_t t = 0; whole < to_stride && t < count; t++) {
    for (int64_t c = whole; c < width; c++) to[t * to_stride + c] = widen(from[t * from_stride + c]);
    for (int64_t c = width; c < to_stride; c++) to[t * to_stride + c] = 0;
  }
  const int64_t padding = (in_blocks(count) - count) * to_stride;
  if (padding > 0) std::memset(to + count * to_stride, 0, size_t(padding) * sizeof(T));
}

// to [columns, rows] = from [rows, columns], both of whole blocks.
template <class T>
QUAVER_INLINE void transpose(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to) {
  for (int64_t r = 0; r < rows; r += kLanes<T>) {
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      transpose_tile(from + r * stride + c, stride, to + c * rows + r, rows);
    }
  }
}

// One block of queries against one of keys. Positions count from the first token of the attention.
struct Block {
  int64_t first_query, queries, first_key, keys;
  // Query i sees key j where j + hidden <= i, for `causal`.
  bool causal;
  int64_t hidden;

  int64_t columns() const { return in_blocks(queries); }
  // The first block of queries that sees a key of the block of keys at `key`, from the first query.
  QUAVER_INLINE int64_t first_column(int64_t key) const {
    const int64_t at = first_key + key - first_query;
    return !causal || at <= 0 ? 0 : at / kBlock * kBlock;
  }
  // How many keys all queries of the block of queries at `column` see, and how many any of them.
  QUAVER_INLINE int64_t seen_by_all(int64_t column) const {
    const int64_t end = first_query + column / kBlock * kBlock + 1 - hidden - first_key;
    return !causal || end > keys ? keys : end < 0 ? 0 : end;
  }
  QUAVER_INLINE int64_t seen(int64_t column) const {
    if (!causal) return keys;
    const int64_t end = first_query + column / kBlock * kBlock + kBlock - first_key;
    return end < 0 ? 0 : end < keys ? end : keys;
  }
};

// At most so many products are added in a row: the sums of longer rows would lose twice what a library's do.
constexpr int64_t kDepth = 64;

// to [keys, queries] = rows [keys, depth] times columns [depth, queries], what is wholly hidden left out.
template <class P, class T = typename P::Element>
QUAVER_INLINE void scores(const Block& block, int64_t depth, const T* rows, int64_t stride, const T* columns, T* to,
                          Ahead& ahead) {
  const int64_t total = block.columns(), keys = in_blocks(block.keys);
  for (int64_t j = 0; j < keys;) {
    const int64_t first = block.first_column(j), count = block.causal ? kBlock : keys;
    if (first >= total) return;
    for (int64_t c = 0; c < depth; c += kDepth) {
      const int64_t length = depth - c < kDepth ? depth - c : kDepth;
      const T *a = rows + j * stride + c, *b = columns + c * total + first;
      T* part = to + j * total + first;
      if (c == 0) {
        multiply_tiles<P, true, false>(count, total - first, length, a, stride, b, total, part, total, ahead);
      } else {
        multiply_tiles<P, true, true>(count, total - first, length, a, stride, b, total, part, total, ahead);
      }
    }
    j += count;
  }
}

// How many elements of P hold n neighbours.
template <class P>
QUAVER_INLINE int64_t elements(int64_t n) {
  return (n + P::kTogether - 1) / P::kTogether;
}

// c [queries, columns], rows c_stride apart, = (kAdd: +) p^T b: the sum over keys of p [keys, queries] times b [keys,
// columns].
template <class P, bool kAdd, class T = typename P::Element>
QUAVER_INLINE void sum_over_keys(const Block& block, int64_t columns, const T* p, const T* b, T* c, int64_t c_stride,
                                 Ahead& ahead) {
  const int64_t total = block.columns();
  if (!block.causal) {
    multiply_tiles<P, false, kAdd>(total, columns, elements<P>(block.keys), p, total, b, columns, c, c_stride, ahead);
    return;
  }
  for (int64_t i = 0; i < total; i += kBlock) {
    multiply_tiles<P, false, kAdd>(kBlock, columns, elements<P>(block.seen(i)), p + i, total, b, columns,
                                   c + i * c_stride, c_stride, ahead);
  }
}

// c [keys, columns], rows c_stride apart, = (kAdd: +) p b: the sum over queries of p [keys, queries] times b [queries,
// columns]. Without kAdd keys that no query sees get nothing: there must be none.
template <class P, bool kAdd, class T = typename P::Element>
QUAVER_INLINE void sum_over_queries(const Block& block, int64_t columns, const T* p, const T* b, T* c, int64_t c_stride,
                                    Ahead& ahead) {
  const int64_t total = block.columns() / P::kTogether;  // elements of a row of p
  if (!block.causal) {
    multiply_tiles<P, true, kAdd>(in_blocks(block.keys), columns, elements<P>(block.queries), p, total, b, columns, c,
                                  c_stride, ahead);
    return;
  }
  for (int64_t j = 0; j < block.keys; j += kBlock) {
    const int64_t first = block.first_column(j), at = first / P::kTogether;
    if (first >= block.queries) return;
    multiply_tiles<P, true, kAdd>(kBlock, columns, elements<P>(block.queries - first), p + j * total + at, total,
                                  b + at * columns, columns, c + j * c_stride, c_stride, ahead);
  }
}

// The number of each lane.
template <class T>
QUAVER_INLINE Vector<T> lane_numbers() {
  Vector<T> numbers = {};
  for (int i = 0; i < kLanes<T>; i++) numbers[i] = T(i);
  return numbers;
}

// A vector of queries' scores against key j, from column x on: -infinity where a query may not see the key.
template <class T>
QUAVER_INLINE Vector<T> masked(const Block& block, int64_t x, int64_t j, Vector<T> scores) {
  if (!block.causal) return scores;
  const int64_t first = block.first_key + j + block.hidden - block.first_query - x;
  return lane_numbers<T>() < T(first) ? all(T(-__builtin_inf())) : scores;
}

// Four sums at a time: they do not wait for each other, and each has fewer roundings.
template <class V>
QUAVER_INLINE V total(const V (&parts)[4]) {
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// p = exp(scale * (p - maximum)) over the keys of this block, and the maximum and the sum of p over this block and
// those before, unless this is the only one; factor: what sums over the blocks before are multiplied by. In this order
// the largest is exactly 1: a query that sees one key has no gradient.
template <bool kOnly, class T>
QUAVER_INLINE void softmax(const Block& block, T scale, T* p, T* sum, T* maximum = nullptr, T* factor = nullptr) {
  using V = Vector<T>;
  const int64_t columns = block.columns();
  if (scale < 0) {
    for (int64_t i = 0; i < in_blocks(block.keys) * columns; i++) p[i] = -p[i];
    scale = -scale;
  }
  for (int64_t x = 0; x < columns; x += kLanes<T>) {
    const int64_t keys = block.seen(x), open = block.seen_by_all(x);
    const V before = kOnly ? all(kLowest<T>) : load<V>(maximum + x);
    V largest[4] = {before, before, before, before};
    int64_t j = 0;
    for (; j + 4 <= open; j += 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) largest[u] = larger(load<V>(p + (j + u) * columns + x), largest[u]);
    }
    for (; j < keys; j++) largest[0] = larger(masked<T>(block, x, j, load<V>(p + j * columns + x)), largest[0]);
    const V now = larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
    V parts[4] = {};
    for (j = 0; j + 4 <= open; j += 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        T* at = p + (j + u) * columns + x;
        const V e = exponentials((load<V>(at) - now) * scale);
        store(at, e);
        parts[u] += e;
      }
    }
    for (; j < keys; j++) {
      T* at = p + j * columns + x;
      const V e = exponentials(masked<T>(block, x, j, (load<V>(at) - now) * scale));
      store(at, e);
      parts[0] += e;
    }
    if (kOnly) {
      store(sum + x, total(parts));
      continue;
    }
    const V scaled = exponentials((before - now) * scale);
    store(maximum + x, now);
    store(sum + x, multiply_add(load<V>(sum + x), scaled, total(parts)));
    store(factor + x, scaled);
  }
}

// 1 / sum, 0 where nothing was seen.
template <class T>
QUAVER_INLINE void invert(T* sum, int64_t columns) {
  for (int64_t x = 0; x < columns; x += kLanes<T>) {
    const Vector<T> s = load<Vector<T>>(sum + x);
    store(sum + x, s == T(0) ? Vector<T>{} : T(1) / s);
  }
}

template <class T>
QUAVER_INLINE void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; i++) to[i] = value;
}

}  // namespace
