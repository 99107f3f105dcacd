#include "cpu/window_loops.h"

#include "cpu/attention_tiles.h"
#include "cpu/level.h"

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
  T* next;
  QUAVER_INLINE T* take(int64_t count) {
    T* part = next;
    next += count;
    return part;
  }
};

// What forward and backward both hold.
template <class T>
struct Tiles {
  int64_t window, width, columns;  // of keys and of queries, in blocks
  T *keys, *values, *rows, *queries, *p, *maximum, *sum, *factor, *weights;

  Tiles(int64_t length, int64_t head_width, Parts<T>& parts)
      : window(in_blocks(length)), width(in_blocks(head_width)), columns(query_columns(length)) {
    keys = parts.take(window * width);
    values = parts.take(window * width);
    rows = parts.take(columns * width);
    queries = parts.take(columns * width);
    p = parts.take(window * columns);
    maximum = parts.take(columns);
    sum = parts.take(columns);
    factor = parts.take(columns);
    weights = parts.take(window);
  }
};

int64_t shared_scratch(int64_t window, int64_t width) {
  const int64_t keys = in_blocks(window), columns = query_columns(window);
  return 2 * in_blocks(width) * (keys + columns) + keys * columns + 3 * columns + keys;
}
int64_t forward_scratch(int64_t window, int64_t width) {
  return shared_scratch(window, width) + (query_columns(window) + 1) * in_blocks(width);
}
int64_t backward_scratch(int64_t window, int64_t width) {
  const int64_t keys = in_blocks(window), columns = query_columns(window);
  return shared_scratch(window, width) + in_blocks(width) * (2 * keys + 3 * columns) + keys * columns + 2 * keys +
         columns;
}

template <class E>
QUAVER_INLINE const E* row(const HeadRows& rows, int64_t head, int64_t token) {
  return static_cast<const E*>(rows.first) + head * rows.head + token * rows.token;
}

template <class E>
Ahead ahead_of(const WindowShape& shape, const WindowHeads* next, HeadRows grad, int64_t tiles) {
  Ahead ahead;
  if (!next) return ahead;
  for (const HeadRows& rows : {next->q, next->k, next->v, grad}) {
    if (rows.first) ahead.rows[ahead.count++] = {static_cast<const char*>(rows.first), rows.token * int64_t(sizeof(E))};
  }
  ahead.each = shape.length;
  ahead.lines = int((shape.width * int64_t(sizeof(E)) + 63) / 64);
  ahead.step = int(ahead.count * ahead.each / (tiles * shape.group) + 1);
  return ahead;
}

// In float64: the gradient of select is made of differences of these.
template <class T>
QUAVER_INLINE T dot(const T* a, const T* b, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int u = 0; u < 8; u++) sums[u] += double(a[i + u]) * double(b[i + u]);
  }
  for (; i < count; i++) sums[0] += double(a[i]) * double(b[i]);
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
QUAVER_INLINE void write_rows(const compute_t<E>* from, int64_t stride, compute_t<E> factor, const HeadRows& rows,
                              int64_t head, int64_t token, int64_t count, int64_t width) {
  E* to = const_cast<E*>(row<E>(rows, head, token));
  for (int64_t t = 0; t < count; t++, to += rows.token, from += stride) {
    for (int64_t c = 0; c < width; c++) to[c] = narrow<E>(from[c] * factor);
  }
}

template <class E, class T = compute_t<E>>
QUAVER_INLINE void read_queries(const Block& block, const WindowShape& shape, const WindowHeads& heads, int64_t head,
                                const Tiles<T>& tiles) {
  read_rows(tiles.rows, tiles.width, row<E>(heads.q, head, block.first_query), heads.q.token, block.queries,
            shape.width, T(shape.scale));
  transpose(tiles.rows, block.columns(), tiles.width, tiles.queries);
}

// tiles.p: not divided by its sums yet, tiles.sum their inverses.
template <class T>
QUAVER_INLINE void probabilities(const Block& block, const WindowShape& shape, const Tiles<T>& tiles, Ahead& ahead) {
  scores(block, shape.width, tiles.keys, tiles.width, tiles.queries, tiles.p, ahead);
  fill(tiles.maximum, block.columns(), kLowest<T>);
  fill(tiles.sum, block.columns(), T(0));
  softmax(block, tiles.p, tiles.maximum, tiles.sum, tiles.factor);
  invert(tiles.sum, block.columns());
}

template <class E>
void forward(const WindowShape& shape, const WindowHeads& heads, const WindowHeads* next, HeadRows out, void* summary,
             void* scratch) {
  using T = compute_t<E>;
  Parts<T> parts{static_cast<T*>(scratch)};
  const Tiles<T> tiles(shape.length, shape.width, parts);
  T* o = parts.take(tiles.columns * tiles.width);
  const int64_t width = tiles.width;
  const bool direct = sizeof(E) == sizeof(T) && width == shape.width;
  Ahead ahead = ahead_of<E>(shape, next, {}, tiles.window / 4);
  read_rows(tiles.keys, width, row<E>(heads.k, 0, 0), heads.k.token, shape.length, shape.width, T(1));
  read_rows(tiles.values, width, row<E>(heads.v, 0, 0), heads.v.token, shape.length, shape.width, T(1));
  T* z = parts.take(width);
  for (int64_t h = 0; h < shape.group; h++) {
    T* weights = nullptr;
    if (summary) {
      weights = tiles.weights;
      summary_weights(static_cast<const T*>(heads.select) + h * heads.select_head, shape.length, shape.summary_tokens,
                      weights);
      fill(z, width, T(0));
    }
    for (int64_t first = 0; first < shape.length; first += tiles.columns) {
      const int64_t rest = shape.length - first, count = rest < tiles.columns ? rest : tiles.columns;
      const Block block{first, count, 0, shape.length, shape.causal, 0};
      read_queries<E>(block, shape, heads, h, tiles);
      probabilities(block, shape, tiles, ahead);
      sum_over_keys<T, false>(block, width, tiles.p, tiles.values, o, ahead);
      T* to = direct ? const_cast<T*>(reinterpret_cast<const T*>(row<E>(out, h, first))) : o;
      write_outputs(o, width, width, tiles.sum, weights ? weights + first : nullptr, count, to,
                    direct ? out.token : width, z);
      if (!direct) write_rows<E>(o, width, T(1), out, h, first, count, shape.width);
    }
    if (summary) std::memcpy(static_cast<T*>(summary) + h * heads.summary_head, z, size_t(shape.width) * sizeof(T));
  }
}

// The gradient of the outputs of a head, with what comes by way of the summary.
template <class E, class T = compute_t<E>>
QUAVER_INLINE void read_gradients(const Block& block, const WindowShape& shape, const HeadRows& grad, int64_t head,
                                  const T* weights, const T* of_summary, T* to, int64_t width) {
  if (grad.first) {
    read_rows(to, width, row<E>(grad, head, block.first_query), grad.token, block.queries, shape.width, T(1));
  } else {
    fill(to, block.columns() * width, T(0));
  }
  for (int64_t t = 0; of_summary && t < block.queries; t++) {
    const T weight = weights[block.first_query + t];
    for (int64_t c = 0; c < shape.width; c++) to[t * width + c] += weight * of_summary[c];
  }
}

// p /= its sums; of_p becomes the gradient of the scores. of_weights: the sum over keys of p times `products`, which
// are those of the values with the gradient of the summary.
template <class T>
QUAVER_INLINE void gradient_of_scores(const Block& block, const T* inverse, const T* products, T* p, T* of_p,
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
      store(at, load<V>(p + j * columns + x) * (load<V>(at) - mean));
    }
  }
}

template <class E>
void backward(const WindowShape& shape, const WindowHeads& heads, const WindowHeads* next,
              const WindowGradients& gradients, void* scratch) {
  using T = compute_t<E>;
  Parts<T> parts{static_cast<T*>(scratch)};
  const Tiles<T> tiles(shape.length, shape.width, parts);
  const int64_t width = tiles.width;
  T *of_keys = parts.take(tiles.window * width), *of_values = parts.take(tiles.window * width);
  T *grads = parts.take(tiles.columns * width), *columns_of_grads = parts.take(tiles.columns * width);
  T *of_queries = parts.take(tiles.columns * width), *of_p = parts.take(tiles.window * tiles.columns);
  T *products = parts.take(tiles.window), *of_weights = parts.take(tiles.window + tiles.columns);
  Ahead ahead = ahead_of<E>(shape, next, {}, tiles.window);
  read_rows(tiles.keys, width, row<E>(heads.k, 0, 0), heads.k.token, shape.length, shape.width, T(1));
  read_rows(tiles.values, width, row<E>(heads.v, 0, 0), heads.v.token, shape.length, shape.width, T(1));
  fill(of_keys, tiles.window * width, T(0));
  fill(of_values, tiles.window * width, T(0));
  for (int64_t h = 0; h < shape.group; h++) {
    const T* of_summary = nullptr;
    if (gradients.grad_summary) {
      of_summary = static_cast<const T*>(gradients.grad_summary) + h * heads.summary_head;
      summary_weights(static_cast<const T*>(heads.select) + h * heads.select_head, shape.length, shape.summary_tokens,
                      tiles.weights);
      for (int64_t j = 0; j < shape.length; j++) products[j] = dot(of_summary, tiles.values + j * width, shape.width);
    }
    for (int64_t first = 0; first < shape.length; first += tiles.columns) {
      const int64_t rest = shape.length - first, count = rest < tiles.columns ? rest : tiles.columns;
      const Block block{first, count, 0, shape.length, shape.causal, 0};
      read_queries<E>(block, shape, heads, h, tiles);
      read_gradients<E>(block, shape, gradients.grad, h, tiles.weights, of_summary, grads, width);
      transpose(grads, block.columns(), width, columns_of_grads);
      probabilities(block, shape, tiles, ahead);
      scores(block, shape.width, tiles.values, width, columns_of_grads, of_p, ahead);
      gradient_of_scores(block, tiles.sum, of_summary ? products : nullptr, tiles.p, of_p, of_weights + first);
      sum_over_keys<T, false>(block, width, of_p, tiles.keys, of_queries, ahead);
      sum_over_queries(block, width, of_p, tiles.rows, of_keys, ahead);
      sum_over_queries(block, width, tiles.p, grads, of_values, ahead);
      write_rows<E>(of_queries, width, T(shape.scale), gradients.q, h, first, count, shape.width);
    }
    if (of_summary) {
      T* of_select = static_cast<T*>(gradients.select) + h * heads.select_head;
      const T mean = dot(tiles.weights, of_weights, shape.length);
      for (int64_t t = 0; t < shape.length; t++) of_select[t] = tiles.weights[t] * (of_weights[t] - mean);
    }
  }
  write_rows<E>(of_keys, width, T(1), gradients.k, 0, 0, shape.length, shape.width);
  write_rows<E>(of_values, width, T(1), gradients.v, 0, 0, shape.length, shape.width);
}

template <class E>
void add_row(void* first, int64_t token, int64_t length, int64_t width, double factor, const void* e) {
  using T = compute_t<E>;
  E* to = static_cast<E*>(first);
  for (int64_t t = 0; t < length; t++, to += token) {
    for (int64_t c = 0; c < width; c++) to[c] = narrow<E>(widen(to[c]) + T(factor) * static_cast<const T*>(e)[c]);
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

template <class E>
constexpr WindowLoops::Loops loops = {forward<E>, backward<E>, add_row<E>, sum_rows<E>};

}  // namespace

namespace quaver::cpu {
extern const WindowLoops QUAVER_AT_LEVEL(window_loops);
const WindowLoops QUAVER_AT_LEVEL(window_loops) = {loops<float>,   loops<double>,   loops<bfloat16>,
                                                   loops<float16>, forward_scratch, backward_scratch};
}  // namespace quaver::cpu
