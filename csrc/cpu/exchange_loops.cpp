#include "cpu/attention_tiles.h"
#include "cpu/level.h"
#include "cpu/window_loops.h"

namespace {

using quaver::cpu::ExchangeLoops;
using quaver::cpu::ExchangeLoopsOf;
using quaver::cpu::ExchangeShape;

// Keys at a time: with 64 queries their scores are 32 KiB.
constexpr int64_t kKeys = 128;

int64_t scratch_elements(int64_t windows, int64_t width) {
  const int64_t columns = in_blocks(width), all = in_blocks(windows);
  return columns * (2 * all + 5 * kQueries) + 2 * kKeys * kQueries + 5 * kQueries;
}

template <class T>
struct Exchange {
  const ExchangeShape& shape;
  const int64_t* source;
  int64_t width;
  T *keys, *rows, *queries, *grads, *columns_of_grads, *result, *p, *of_p, *maximum, *sum, *factor, *mean, *of_keys;
  Ahead none;

  Exchange(const ExchangeShape& of, const T* z, const int64_t* sources, T* scratch)
      : shape(of), source(sources), width(in_blocks(of.width)) {
    keys = scratch;
    of_keys = keys + in_blocks(shape.windows) * width;
    rows = of_keys + in_blocks(shape.windows) * width;
    queries = rows + kQueries * width;
    grads = queries + kQueries * width;
    columns_of_grads = grads + kQueries * width;
    result = columns_of_grads + kQueries * width;
    p = result + kQueries * width;
    of_p = p + kKeys * kQueries;
    maximum = of_p + kKeys * kQueries;
    sum = maximum + kQueries;
    factor = sum + kQueries;
    mean = factor + kQueries;
    read_rows(keys, width, z, shape.width, shape.windows, shape.width);
  }

  // Calls body(block) for each block of keys that a query of this block sees.
  template <class Body>
  QUAVER_INLINE void for_keys(int64_t first, int64_t count, Body&& body) {
    // To the last query, though that sees none so late: rows of keys past a block's own would be added to.
    const int64_t end = shape.causal ? first + count : shape.windows;
    for (int64_t key = 0; key < end; key += kKeys) {
      body(Block{first, count, key, end - key < kKeys ? end - key : kKeys, shape.causal, 1});
    }
  }

  QUAVER_INLINE void read_queries(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      const T* from = keys + source[first + i] * width;
      for (int64_t c = 0; c < width; c++) rows[i * width + c] = from[c] * T(shape.scale);
    }
    fill(rows + count * width, (in_blocks(count) - count) * width, T(0));
    transpose(rows, width, in_blocks(count), width, queries);
    fill(maximum, kQueries, kLowest<T>);
    fill(sum, kQueries, T(0));
  }

  QUAVER_INLINE void read_scores(const Block& block) {
    scores<Plain<T>>(block, shape.width, keys + block.first_key * width, width, queries, p, none);
  }

  QUAVER_INLINE void read_products(const Block& block) {
    scores<Plain<T>>(block, shape.width, keys + block.first_key * width, width, columns_of_grads, of_p, none);
  }
};

template <class T>
void forward(const ExchangeShape& shape, const T* z, const int64_t* source, T* e, T* scratch) {
  Exchange<T> exchange(shape, z, source, scratch);
  const int64_t width = exchange.width;
  T* result = exchange.result;
  for (int64_t first = 0; first < shape.windows; first += kQueries) {
    const int64_t rest = shape.windows - first, count = rest < kQueries ? rest : kQueries;
    exchange.read_queries(first, count);
    fill(result, in_blocks(count) * width, T(0));
    exchange.for_keys(first, count, [&](const Block& block) __attribute__((always_inline)) {
      exchange.read_scores(block);
      softmax<false>(block, T(1), exchange.p, exchange.sum, exchange.maximum, exchange.factor);
      for (int64_t i = 0; block.first_key > 0 && i < count; i++) {
        for (int64_t c = 0; c < width; c++) result[i * width + c] *= exchange.factor[i];
      }
      sum_over_keys<Plain<T>, true>(block, width, exchange.p, exchange.keys + block.first_key * width, result, width,
                                    exchange.none);
    });
    invert(exchange.sum, in_blocks(count));
    for (int64_t i = 0; i < count; i++) {
      const T inverse = exchange.sum[i];
      T* to = e + (first + i) * shape.width;
      // A window that sees none has no part in it, whatever the sums of nothing are.
      const bool none = shape.causal && first + i == 0;
      for (int64_t c = 0; c < shape.width; c++) to[c] = none ? 0 : result[i * width + c] * inverse;
    }
  }
}

template <class T>
double backward(const ExchangeShape& shape, const T* grad, const T* z, const int64_t* source, double gate, T* of_z,
                T* scratch) {
  using V = Vector<T>;
  Exchange<T> exchange(shape, z, source, scratch);
  const int64_t width = exchange.width;
  double of_gate = 0;
  fill(exchange.of_keys, in_blocks(shape.windows) * width, T(0));
  for (int64_t first = 0; first < shape.windows; first += kQueries) {
    const int64_t rest = shape.windows - first, count = rest < kQueries ? rest : kQueries, columns = in_blocks(count);
    exchange.read_queries(first, count);
    read_rows(exchange.grads, width, grad + first * shape.width, shape.width, count, shape.width);
    transpose(exchange.grads, width, columns, width, exchange.columns_of_grads);
    fill(exchange.mean, kQueries, T(0));
    // The mean over keys of the products of grad and z, grad . e, by the online softmax.
    exchange.for_keys(first, count, [&](const Block& block) __attribute__((always_inline)) {
      exchange.read_scores(block);
      exchange.read_products(block);
      softmax<false>(block, T(1), exchange.p, exchange.sum, exchange.maximum, exchange.factor);
      for (int64_t x = 0; x < columns; x += kLanes<T>) {
        V parts[4] = {};
        for (int64_t j = 0; j < block.seen(x); j++) {
          const int64_t at = j * columns + x;
          parts[j % 4] = multiply_add(load<V>(exchange.p + at), load<V>(exchange.of_p + at), parts[j % 4]);
        }
        store(exchange.mean + x, multiply_add(load<V>(exchange.mean + x), load<V>(exchange.factor + x), total(parts)));
      }
    });
    invert(exchange.sum, columns);
    for (int64_t i = 0; i < count; i++) {
      exchange.mean[i] *= exchange.sum[i];
      of_gate += double(exchange.mean[i]);
    }
    fill(exchange.result, columns * width, T(0));
    const bool one = (shape.causal ? first + count : shape.windows) <= kKeys;
    exchange.for_keys(first, count, [&](const Block& block) __attribute__((always_inline)) {
      if (!one) {
        exchange.read_scores(block);
        exchange.read_products(block);
      }
      for (int64_t x = 0; x < columns; x += kLanes<T>) {
        const V inverse = load<V>(exchange.sum + x), mean = load<V>(exchange.mean + x);
        const V largest = load<V>(exchange.maximum + x);
        for (int64_t j = 0; j < block.seen(x); j++) {
          T *at = exchange.p + j * columns + x, *of = exchange.of_p + j * columns + x;
          const V p = one ? load<V>(at) : exponentials(masked<T>(block, x, j, load<V>(at)) - largest);
          const V value = p * inverse;
          store(at, value);
          store(of, value * (load<V>(of) - mean));
        }
      }
      T *keys = exchange.keys + block.first_key * width, *of_keys = exchange.of_keys + block.first_key * width;
      sum_over_keys<Plain<T>, true>(block, width, exchange.of_p, keys, exchange.result, width, exchange.none);
      sum_over_queries<Plain<T>, true>(block, width, exchange.of_p, exchange.rows, of_keys, width, exchange.none);
      sum_over_queries<Plain<T>, true>(block, width, exchange.p, exchange.grads, of_keys, width, exchange.none);
    });
    for (int64_t i = 0; i < count; i++) {
      if (shape.causal && first + i == 0) continue;
      T* to = exchange.of_keys + source[first + i] * width;
      for (int64_t c = 0; c < width; c++) to[c] += exchange.result[i * width + c] * T(shape.scale);
    }
  }
  for (int64_t w = 0; w < shape.windows; w++) {
    for (int64_t c = 0; c < shape.width; c++) of_z[w * shape.width + c] = exchange.of_keys[w * width + c] * T(gate);
  }
  return of_gate;
}

template <class T>
constexpr ExchangeLoopsOf<T> loops = {forward<T>, backward<T>};

}  // namespace

namespace quaver::cpu {
extern const ExchangeLoops QUAVER_AT_LEVEL(exchange_loops);
const ExchangeLoops QUAVER_AT_LEVEL(exchange_loops) = {loops<float>, loops<double>, scratch_elements};
}  // namespace quaver::cpu
