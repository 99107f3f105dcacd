// What attention inside a window is made of beside its products.
#pragma once
#include "cpu/attention_tiles.h"
#include "cpu/window_loops.h"

namespace {

using quaver::cpu::HeadRows;
using quaver::cpu::WindowGradients;
using quaver::cpu::WindowHeads;
using quaver::cpu::WindowLoops;
using quaver::cpu::WindowShape;

QUAVER_INLINE int64_t query_columns(int64_t window) {
  return in_blocks(window) < kQueries ? in_blocks(window) : kQueries;
}

// Hands out parts of the scratch memory.
template <class T>
struct Parts {
  T* memory;  // null to only count
  int64_t used = 0;
  QUAVER_INLINE T* take(int64_t count) {
    used += count;
    return memory ? memory + used - count : nullptr;
  }
};

template <class E>
QUAVER_INLINE const E* row(const HeadRows& rows, int64_t head, int64_t token) {
  return static_cast<const E*>(rows.first) + head * rows.head + token * rows.token;
}

// Where results of the compute type are written, for E that is it.
template <class E, class T = compute_t<E>>
QUAVER_INLINE T* written(const HeadRows& rows, int64_t head, int64_t token) {
  return reinterpret_cast<T*>(const_cast<E*>(row<E>(rows, head, token)));
}

// Spreads what is fetched ahead over the products of a window: `scores` and `sums` are how many of each kind there are.
template <class P>
QUAVER_INLINE void spread(Ahead& ahead, const WindowShape& shape, int64_t scores, int64_t sums) {
  const int64_t keys = in_blocks(shape.length), columns = query_columns(shape.length), width = in_blocks(shape.width);
  const int64_t blocks = (keys + kQueries - 1) / kQueries * shape.group;
  ahead.spread(blocks * (scores * steps_of<P>(keys, columns, elements<P>(width)) +
                         sums * steps_of<P>(columns, width, elements<P>(keys))));
}

// In float64: the gradient of select is made of differences of these.
template <class T, class E>
QUAVER_INLINE T dot(const T* a, const E* b, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int u = 0; u < 8; u++) sums[u] += double(a[i + u]) * double(widen(b[i + u]));
  }
  for (; i < count; i++) sums[0] += double(a[i]) * double(widen(b[i]));
  return T(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
}

// weights = the softmax of select over its `most` largest, ties to the lowest index, 0 elsewhere.
template <class T>
void summary_weights(const T* select, int64_t length, int64_t most, T* weights) {
  T largest = kLowest<T>;
  for (int64_t t = 0; t < length; t++) largest = select[t] > largest ? select[t] : largest;
  for (int64_t t = 0; t < in_blocks(length); t += kLanes<T>) {
    Vector<T> x = all(T(-__builtin_inf()));
    for (int64_t i = t; i < length && i < t + kLanes<T>; i++) x[i - t] = select[i] - largest;
    store(weights + t, exponentials(x));
  }
  for (int64_t t = 0; t < length && most < length; t++) {
    int64_t before = 0;
    for (int64_t s = 0; s < length; s++) before += (select[s] > select[t]) | ((select[s] == select[t]) & (s < t));
    if (before >= most) weights[t] = 0;
  }
  double sum = 0;
  for (int64_t t = 0; t < length; t++) sum += double(weights[t]);
  for (int64_t t = 0; t < length; t++) weights[t] = T(double(weights[t]) / sum);
}

// out [count, V vectors] = o * inverse, and summary += weights . that, where there are weights.
template <class T, int V>
QUAVER_INLINE void write_vectors(const T* o, int64_t stride, const T* inverse, const T* weights, int64_t count, T* out,
                                 int64_t out_stride, T* summary) {
  Vector<T> sum[V] = {};
  for (int64_t t = 0; t < count; t++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const Vector<T> x = load<Vector<T>>(o + t * stride + v * kLanes<T>) * inverse[t];
      store(out + t * out_stride + v * kLanes<T>, x);
      if (weights) sum[v] = multiply_add(all(weights[t]), x, sum[v]);
    }
  }
  for (int v = 0; weights && v < V; v++) {
    T* to = summary + v * kLanes<T>;
    store(to, load<Vector<T>>(to) + sum[v]);
  }
}

template <class T>
void write_outputs(const T* o, int64_t stride, int64_t width, const T* inverse, const T* weights, int64_t count, T* out,
                   int64_t out_stride, T* summary) {
  for (int64_t left = width / kLanes<T>; left > 0;) {
    const int vectors = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto write = vectors == 4 ? write_vectors<T, 4> : vectors == 2 ? write_vectors<T, 2> : write_vectors<T, 1>;
    write(o, stride, inverse, weights, count, out, out_stride, summary);
    left -= vectors;
    o += vectors * kLanes<T>;
    out += vectors * kLanes<T>;
    summary += vectors * kLanes<T>;
  }
}

template <class E>
QUAVER_INLINE void write_rows(const compute_t<E>* from, int64_t stride, const HeadRows& rows, int64_t head,
                              int64_t token, int64_t count, int64_t width) {
  E* to = const_cast<E*>(row<E>(rows, head, token));
  for (int64_t t = 0; t < count; t++, to += rows.token, from += stride) {
    for (int64_t c = 0; c < width; c++) to[c] = narrow<E>(from[c]);
  }
}

// p /= its sums; of_p becomes the gradient of the products that were scaled to scores. of_weights: the sum over keys of
// p times `products`, which are those of the values with the gradient of the summary.
template <class T>
QUAVER_INLINE void gradient_of_scores(const Block& block, T scale, const T* inverse, const T* products, T* p, T* of_p,
                                      T* of_weights) {
  using V = Vector<T>;
  const int64_t columns = block.columns();
  for (int64_t x = 0; x < columns; x += kLanes<T>) {
    const int64_t keys = block.seen(x);
    const V factor = load<V>(inverse + x);
    V sums[4] = {}, weight[4] = {};
    for (int64_t j = 0; j < keys; j++) {
      T* at = p + j * columns + x;
      const V value = load<V>(at) * factor;
      store(at, value);
      sums[j % 4] = multiply_add(value, load<V>(of_p + j * columns + x), sums[j % 4]);
      if (products) weight[j % 4] = multiply_add(value, all(products[j]), weight[j % 4]);
    }
    const V mean = total(sums);
    if (products) store(of_weights + x, total(weight));
    for (int64_t j = 0; j < keys; j++) {
      T* at = of_p + j * columns + x;
      store(at, load<V>(p + j * columns + x) * scale * (load<V>(at) - mean));
    }
  }
}

// of_weights: the gradients of the summary's weights, which are a softmax of select.
template <class T>
QUAVER_INLINE void gradient_of_select(const T* weights, const T* of_weights, int64_t length, T* of_select) {
  const T mean = dot(weights, of_weights, length);
  for (int64_t t = 0; t < length; t++) of_select[t] = weights[t] * (of_weights[t] - mean);
}

template <class E>
void add_row(void* first, int64_t token, int64_t length, int64_t width, double factor, const void* e_) {
  using T = compute_t<E>;
  E* to = static_cast<E*>(first);
  const T* e = static_cast<const T*>(e_);
  int64_t done = 0;
  // By hand, as in read_rows().
  for (; std::is_same_v<E, T> && done + kLanes<T> <= width; done += kLanes<T>) {
    const Vector<T> addend = load<Vector<T>>(e + done) * T(factor);
    for (int64_t t = 0; t < length; t++) {
      E* at = to + t * token + done;
      store(at, load<Vector<T>>(at) + addend);
    }
  }
  for (int64_t t = 0; done < width && t < length; t++) {
    for (int64_t c = done; c < width; c++) {
      to[t * token + c] = narrow<E>(widen(to[t * token + c]) + T(factor) * e[c]);
    }
  }
}

// Sums of kTogether rows at a time, then of those: the gradient of the gate is made of them.
template <class E>
void sum_rows(void* sum, const void* first, int64_t token, int64_t length, int64_t width) {
  using T = compute_t<E>;
  constexpr int64_t kColumns = 64, kTogether = 8;
  const E* from = static_cast<const E*>(first);
  for (int64_t at = 0; at < width; at += kColumns) {
    const int64_t count = width - at < kColumns ? width - at : kColumns;
    T* to = static_cast<T*>(sum) + at;
    for (int64_t c = 0; c < count; c++) to[c] = 0;
    for (int64_t t = 0; t < length; t += kTogether) {
      T few[kColumns] = {};
      for (int64_t r = t; r < length && r < t + kTogether; r++) {
        for (int64_t c = 0; c < count; c++) few[c] += widen(from[r * token + at + c]);
      }
      for (int64_t c = 0; c < count; c++) to[c] += few[c];
    }
  }
}

}  // namespace
