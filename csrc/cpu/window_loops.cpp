#include "cpu/level.h"
#include "cpu/window_pairs.h"

namespace {

// What forward and backward both hold.
template <class T>
struct Tiles {
  int64_t window, width, columns;  // of keys and of queries, in blocks
  T *keys, *values, *rows, *queries, *p, *sum, *weights;

  Tiles(int64_t length, int64_t head_width, Parts<T>& parts)
      : window(in_blocks(length)), width(in_blocks(head_width)), columns(query_columns(length)) {
    keys = parts.take(window * width);
    values = parts.take(window * width);
    rows = parts.take(columns * width);
    queries = parts.take(columns * width);
    p = parts.take(window * columns);
    sum = parts.take(columns);
    weights = parts.take(window);
  }
};

int64_t shared_scratch(int64_t window, int64_t width) {
  const int64_t keys = in_blocks(window), columns = query_columns(window);
  return 2 * in_blocks(width) * (keys + columns) + keys * columns + columns + keys;
}
int64_t forward_scratch(int64_t window, int64_t width) {
  return shared_scratch(window, width) + (query_columns(window) + 1) * in_blocks(width);
}
int64_t backward_scratch(int64_t window, int64_t width) {
  const int64_t keys = in_blocks(window), columns = query_columns(window);
  return shared_scratch(window, width) + in_blocks(width) * (2 * keys + 3 * columns) + keys * columns + 2 * keys +
         columns;
}

// tiles.queries, and tiles.rows where kRows asks for them.
template <class E, bool kRows, class T = compute_t<E>>
QUAVER_INLINE void read_queries(const Block& block, const WindowShape& shape, const WindowHeads& heads, int64_t head,
                                const Tiles<T>& tiles) {
  const E* from = row<E>(heads.q, head, block.first_query);
  const int64_t width = tiles.width, columns = block.columns();
  if constexpr (std::is_same_v<E, T> && !kRows) {
    if (width == shape.width && columns == block.queries) {
      transpose(from, heads.q.token, columns, width, tiles.queries);
      return;
    }
  }
  read_rows(tiles.rows, width, from, heads.q.token, block.queries, shape.width);
  transpose(tiles.rows, width, columns, width, tiles.queries);
}

// tiles.p: not divided by its sums yet, tiles.sum their inverses.
template <class T>
QUAVER_INLINE void probabilities(const Block& block, const WindowShape& shape, const Tiles<T>& tiles, Ahead& ahead) {
  scores<Plain<T>>(block, shape.width, tiles.keys, tiles.width, tiles.queries, tiles.p, ahead);
  softmax<true>(block, T(shape.scale), tiles.p, tiles.sum);
  invert(tiles.sum, block.columns());
}

template <class E>
void forward(const WindowShape& shape, const WindowHeads& heads, Ahead& ahead, const HeadRows& out, void* summary,
             void* scratch) {
  using T = compute_t<E>;
  Parts<T> parts{static_cast<T*>(scratch)};
  const Tiles<T> tiles(shape.length, shape.width, parts);
  T* o = parts.take(tiles.columns * tiles.width);
  const int64_t width = tiles.width;
  const bool direct = std::is_same_v<E, T> && width == shape.width;
  spread<Plain<T>>(ahead, shape, 1, 1);
  read_rows(tiles.keys, width, row<E>(heads.k, 0, 0), heads.k.token, shape.length, shape.width);
  read_rows(tiles.values, width, row<E>(heads.v, 0, 0), heads.v.token, shape.length, shape.width);
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
      read_queries<E, false>(block, shape, heads, h, tiles);
      probabilities(block, shape, tiles, ahead);
      sum_over_keys<Plain<T>, false>(block, width, tiles.p, tiles.values, o, width, ahead);
      T* to = direct ? written<E>(out, h, first) : o;
      write_outputs(o, width, width, tiles.sum, weights ? weights + first : nullptr, count, to,
                    direct ? out.token : width, z);
      if (!direct) write_rows<E>(o, width, out, h, first, count, shape.width);
    }
    if (summary) std::memcpy(static_cast<T*>(summary) + h * heads.summary_head, z, size_t(shape.width) * sizeof(T));
  }
}

// The gradient of the outputs of a head, with what comes by way of the summary.
template <class E, class T = compute_t<E>>
QUAVER_INLINE void read_gradients(const Block& block, const WindowShape& shape, const HeadRows& grad, int64_t head,
                                  const T* weights, const T* of_summary, T* to, int64_t width) {
  if (grad.first) {
    read_rows(to, width, row<E>(grad, head, block.first_query), grad.token, block.queries, shape.width);
  } else {
    fill(to, block.columns() * width, T(0));
  }
  for (int64_t t = 0; of_summary && t < block.queries; t++) {
    const T weight = weights[block.first_query + t];
    for (int64_t c = 0; c < shape.width; c++) to[t * width + c] += weight * of_summary[c];
  }
}

template <class E>
void backward(const WindowShape& shape, const WindowHeads& heads, Ahead& ahead, const WindowGradients& gradients,
              void* scratch) {
  using T = compute_t<E>;
  Parts<T> parts{static_cast<T*>(scratch)};
  const Tiles<T> tiles(shape.length, shape.width, parts);
  const int64_t width = tiles.width;
  T *of_keys = parts.take(tiles.window * width), *of_values = parts.take(tiles.window * width);
  T *grads = parts.take(tiles.columns * width), *columns_of_grads = parts.take(tiles.columns * width);
  T *of_queries = parts.take(tiles.columns * width), *of_p = parts.take(tiles.window * tiles.columns);
  T *products = parts.take(tiles.window), *of_weights = parts.take(tiles.window + tiles.columns);
  spread<Plain<T>>(ahead, shape, 2, 3);
  read_rows(tiles.keys, width, row<E>(heads.k, 0, 0), heads.k.token, shape.length, shape.width);
  read_rows(tiles.values, width, row<E>(heads.v, 0, 0), heads.v.token, shape.length, shape.width);
  // Results of whole tiles are written where they belong, without a sum over blocks of queries on the way.
  const bool direct = std::is_same_v<E, T> && width == shape.width && tiles.window == shape.length;
  const bool one = direct && shape.group == 1 && tiles.columns == tiles.window;
  if (!one) {
    fill(of_keys, tiles.window * width, T(0));
    fill(of_values, tiles.window * width, T(0));
  }
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
      read_queries<E, true>(block, shape, heads, h, tiles);
      read_gradients<E>(block, shape, gradients.grad, h, tiles.weights, of_summary, grads, width);
      transpose(grads, width, block.columns(), width, columns_of_grads);
      probabilities(block, shape, tiles, ahead);
      scores<Plain<T>>(block, shape.width, tiles.values, width, columns_of_grads, of_p, ahead);
      gradient_of_scores(block, T(shape.scale), tiles.sum, of_summary ? products : nullptr, tiles.p, of_p,
                         of_weights + first);
      T* to = direct ? written<E>(gradients.q, h, first) : of_queries;
      sum_over_keys<Plain<T>, false>(block, width, of_p, tiles.keys, to, direct ? gradients.q.token : width, ahead);
      if (!direct) write_rows<E>(of_queries, width, gradients.q, h, first, count, shape.width);
      if (one) {
        sum_over_queries<Plain<T>, false>(block, width, of_p, tiles.rows, written<E>(gradients.k, 0, 0),
                                          gradients.k.token, ahead);
        sum_over_queries<Plain<T>, false>(block, width, tiles.p, grads, written<E>(gradients.v, 0, 0),
                                          gradients.v.token, ahead);
      } else {
        sum_over_queries<Plain<T>, true>(block, width, of_p, tiles.rows, of_keys, width, ahead);
        sum_over_queries<Plain<T>, true>(block, width, tiles.p, grads, of_values, width, ahead);
      }
    }
    if (of_summary) {
      gradient_of_select(tiles.weights, of_weights, shape.length,
                         static_cast<T*>(gradients.select) + h * heads.select_head);
    }
  }
  if (one) return;
  write_rows<E>(of_keys, width, gradients.k, 0, 0, shape.length, shape.width);
  write_rows<E>(of_values, width, gradients.v, 0, 0, shape.length, shape.width);
}

template <class E>
constexpr WindowLoops::Loops loops = {forward<E>,       backward<E>, forward_scratch,
                                      backward_scratch, add_row<E>,  sum_rows<E>};

#if defined(__AVX512F__)
constexpr const WindowLoops::Loops *kPairLoops = &pair_loops<Pairs>, *kAmxLoops = &pair_loops<TiledPairs>;
#else
constexpr const WindowLoops::Loops *kPairLoops = nullptr, *kAmxLoops = nullptr;
#endif

}  // namespace

namespace quaver::cpu {
extern const WindowLoops QUAVER_AT_LEVEL(window_loops);
const WindowLoops QUAVER_AT_LEVEL(window_loops) = {loops<float>,   loops<double>, loops<bfloat16>,
                                                   loops<float16>, kPairLoops,    kAmxLoops};
}  // namespace quaver::cpu
