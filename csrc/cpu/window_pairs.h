// Attention inside a window for bf16, its products made of pairs (P: by AVX512-BF16, or by AMX): operands stay as they
// are in memory, two neighbours along the depth to 32 bits, and p and the gradient of the scores are rounded to bf16.
// Included by window_loops.cpp, for has_bf16() or has_amx() only.
#pragma once
#include "cpu/window_parts.h"

#if defined(__AVX512F__)
namespace {

using quaver::bfloat16;

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// Pairs to a row of `width` elements: of whole vectors.
QUAVER_INLINE int64_t pairs_of(int64_t width) { return in_blocks((width + 1) / 2); }

// x as bf16, to nearest even; subnormal numbers become zeros, as the products would take them. Like those an
// instruction of AVX512-BF16 (add_pair_products()).
QUAVER_INLINE Halves narrowed(Floats x) {
  Halves result;
  asm("vcvtneps2bf16 %1, %0" : "=v"(result) : "v"(x));
  return result;
}

// The pairs of even[i] and odd[i] as bf16.
QUAVER_INLINE Uints narrowed_pairs(Floats even, Floats odd) {
  typedef uint16_t Words __attribute__((vector_size(kVectorBytes)));
  Words x;  // the even ones, then the odd ones
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(x) : "v"(odd), "v"(even));
  return (Uints)__builtin_shufflevector(x, x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10,
                                        26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// to [count, pairs] = rows as they are; then zeros up to a block.
QUAVER_INLINE void read_pair_rows(float* to, int64_t pairs, const bfloat16* from, int64_t from_stride, int64_t count,
                                  int64_t width) {
  // Whole vectors by hand: calls of memcpy() for so few bytes would cost as much again.
  const int64_t whole = width / 2 / kLanes<float> * kLanes<float>;
  for (int64_t t = 0; t < count; t++, to += pairs, from += from_stride) {
    for (int64_t c = 0; c < whole; c += kLanes<float>) store(to + c, load<Floats>(from + 2 * c));
    if (whole == pairs) continue;
    std::memcpy(to + whole, from + 2 * whole, size_t(width - 2 * whole) * 2);
    std::memset(reinterpret_cast<char*>(to) + width * 2, 0, size_t(pairs * 4 - width * 2));
  }
  const int64_t padding = (in_blocks(count) - count) * pairs;
  if (padding > 0) std::memset(to, 0, size_t(padding) * 4);
}

// to [count / 2, width] = the pairs of rows 2 i and 2 i + 1, a zero in the place of the last one's partner. Columns
// past from_width stay as they are: they make columns of products that nothing reads.
QUAVER_INLINE void zip_rows(float* to, int64_t width, const bfloat16* from, int64_t from_stride, int64_t count,
                            int64_t from_width) {
  for (int64_t t = 0; t < count; t += 2, to += width) {
    auto* words = reinterpret_cast<uint32_t*>(to);
    const auto* even = reinterpret_cast<const uint16_t*>(from + t * from_stride);
    const auto* odd = even + from_stride;
    const bool two = t + 1 < count;
    int64_t c = 0;
    for (; c + kLanes<float> <= from_width; c += kLanes<float>) {
      const auto low = __builtin_convertvector(load<Halves>(even + c), Uints);
      const auto high = two ? __builtin_convertvector(load<Halves>(odd + c), Uints) : Uints{};
      store(words + c, low | high << 16);
    }
    for (; c < from_width; c++) words[c] = even[c] | (two ? uint32_t(odd[c]) << 16 : 0);
  }
}

// to [keys / 2, queries] = the pairs of keys of p [keys, queries], zero where a query sees no more.
QUAVER_INLINE void zip_keys(const Block& block, const float* p, float* to) {
  const int64_t columns = block.columns();
  for (int64_t x = 0; x < columns; x += kLanes<float>) {
    const int64_t keys = block.seen(x);
    for (int64_t j = 0; j < keys; j += 2) {
      const float* at = p + j * columns + x;
      const Floats odd = j + 1 < keys ? load<Floats>(at + columns) : Floats{};
      store(to + j / 2 * columns + x, narrowed_pairs(load<Floats>(at), odd));
    }
  }
}

// to [keys, queries / 2] = the pairs of queries of p [keys, queries]. What a last one without a partner is paired with
// is multiplied by the zeros of zip_rows.
QUAVER_INLINE void narrow_keys(const Block& block, const float* p, float* to) {
  const int64_t columns = block.columns();
  for (int64_t j = 0; j < block.keys; j++) {
    auto* row = reinterpret_cast<uint16_t*>(to) + j * columns;
    for (int64_t x = block.first_column(j); x < columns; x += kLanes<float>) {
      store(row + x, narrowed(load<Floats>(p + j * columns + x)));
    }
  }
}

struct PairTiles {
  int64_t window, width, pairs, columns;
  float *keys, *values, *rows, *queries, *p, *zipped, *sum, *weights;

  PairTiles(int64_t length, int64_t head_width, Parts<float>& parts)
      : window(in_blocks(length)),
        width(in_blocks(head_width)),
        pairs(pairs_of(head_width)),
        columns(query_columns(length)) {
    keys = parts.take(window * pairs);
    values = parts.take(window / 2 * width);
    rows = parts.take(columns * pairs);
    queries = parts.take(columns * pairs);
    p = parts.take(window * columns);
    zipped = parts.take(in_blocks(window / 2) * columns);
    sum = parts.take(columns);
    weights = parts.take(window);
  }

  // p: not divided by its sums yet, `sum` their inverses.
  template <class P>
  QUAVER_INLINE void probabilities(const Block& block, const WindowShape& shape, const WindowHeads& heads, int64_t head,
                                   Ahead& ahead) const {
    read_pair_rows(rows, pairs, row<bfloat16>(heads.q, head, block.first_query), heads.q.token, block.queries,
                   shape.width);
    transpose(rows, pairs, block.columns(), pairs, queries);
    scores<P>(block, elements<P>(shape.width), keys, pairs, queries, p, ahead);
    softmax<true>(block, float(shape.scale), p, sum);
    invert(sum, block.columns());
  }
};

struct PairGradients {
  float *values, *key_pairs, *query_pairs, *grads, *columns_of_grads, *grad_pairs, *of_p, *narrow, *of_keys, *of_values,
      *of_queries, *products, *of_weights;

  PairGradients(const PairTiles& tiles, Parts<float>& parts) {
    values = parts.take(tiles.window * tiles.pairs);
    key_pairs = parts.take(tiles.window / 2 * tiles.width);
    query_pairs = parts.take(tiles.columns / 2 * tiles.width);
    grads = parts.take(tiles.columns * tiles.pairs);
    columns_of_grads = parts.take(tiles.columns * tiles.pairs);
    grad_pairs = parts.take(tiles.columns / 2 * tiles.width);
    of_p = parts.take(tiles.window * tiles.columns);
    narrow = parts.take(tiles.window * tiles.columns / 2);
    of_keys = parts.take(tiles.window * tiles.width);
    of_values = parts.take(tiles.window * tiles.width);
    of_queries = parts.take(tiles.columns * tiles.width);
    products = parts.take(tiles.window);
    of_weights = parts.take(tiles.window + tiles.columns);
  }

  // The gradient of the outputs of a head, with what comes by way of the summary.
  QUAVER_INLINE void read(const Block& block, const WindowShape& shape, const PairTiles& tiles, const HeadRows& grad,
                          int64_t head, const float* of_summary) const {
    const int64_t stride = 2 * tiles.pairs;
    auto* to = reinterpret_cast<bfloat16*>(grads);
    if (grad.first) {
      read_pair_rows(grads, tiles.pairs, row<bfloat16>(grad, head, block.first_query), grad.token, block.queries,
                     shape.width);
    } else {
      fill(grads, block.columns() * tiles.pairs, 0.0f);
    }
    for (int64_t t = 0; of_summary && t < block.queries; t++) {
      const float weight = tiles.weights[block.first_query + t];
      for (int64_t c = 0; c < shape.width; c++) {
        bfloat16& element = to[t * stride + c];
        element = quaver::narrow<bfloat16>(widen(element) + weight * of_summary[c]);
      }
    }
    transpose(grads, tiles.pairs, block.columns(), tiles.pairs, columns_of_grads);
    zip_rows(grad_pairs, tiles.width, to, stride, block.queries, shape.width);
  }
};

int64_t pair_forward_scratch(int64_t window, int64_t width) {
  Parts<float> parts{nullptr};
  const PairTiles tiles(window, width, parts);
  return parts.used + (tiles.columns + 1) * tiles.width;
}
int64_t pair_backward_scratch(int64_t window, int64_t width) {
  Parts<float> parts{nullptr};
  const PairTiles tiles(window, width, parts);
  const PairGradients gradients(tiles, parts);
  return parts.used;
}

template <class P>
void pair_forward(const WindowShape& shape, const WindowHeads& heads, Ahead& ahead, const HeadRows& out, void* summary,
                  void* scratch) {
  Parts<float> parts{static_cast<float*>(scratch)};
  const PairTiles tiles(shape.length, shape.width, parts);
  const int64_t width = tiles.width;
  float *o = parts.take(tiles.columns * width), *z = parts.take(width);
  spread<P>(ahead, shape, 1, 1);
  read_pair_rows(tiles.keys, tiles.pairs, row<bfloat16>(heads.k, 0, 0), heads.k.token, shape.length, shape.width);
  zip_rows(tiles.values, width, row<bfloat16>(heads.v, 0, 0), heads.v.token, shape.length, shape.width);
  for (int64_t h = 0; h < shape.group; h++) {
    if (summary) {
      summary_weights(static_cast<const float*>(heads.select) + h * heads.select_head, shape.length,
                      shape.summary_tokens, tiles.weights);
      fill(z, width, 0.0f);
    }
    for (int64_t first = 0; first < shape.length; first += tiles.columns) {
      const int64_t rest = shape.length - first, count = rest < tiles.columns ? rest : tiles.columns;
      const Block block{first, count, 0, shape.length, shape.causal, 0};
      tiles.template probabilities<P>(block, shape, heads, h, ahead);
      zip_keys(block, tiles.p, tiles.zipped);
      sum_over_keys<P, false>(block, width, tiles.zipped, tiles.values, o, width, ahead);
      write_outputs(o, width, width, tiles.sum, summary ? tiles.weights + first : nullptr, count, o, width, z);
      write_rows<bfloat16>(o, width, out, h, first, count, shape.width);
    }
    if (summary) std::memcpy(static_cast<float*>(summary) + h * heads.summary_head, z, size_t(shape.width) * 4);
  }
  if (std::is_same_v<P, TiledPairs>) release_tiles();
}

template <class P>
void pair_backward(const WindowShape& shape, const WindowHeads& heads, Ahead& ahead, const WindowGradients& gradients,
                   void* scratch) {
  Parts<float> parts{static_cast<float*>(scratch)};
  const PairTiles tiles(shape.length, shape.width, parts);
  const PairGradients of(tiles, parts);
  const int64_t width = tiles.width;
  const bfloat16 *k = row<bfloat16>(heads.k, 0, 0), *v = row<bfloat16>(heads.v, 0, 0);
  spread<P>(ahead, shape, 2, 3);
  read_pair_rows(tiles.keys, tiles.pairs, k, heads.k.token, shape.length, shape.width);
  read_pair_rows(of.values, tiles.pairs, v, heads.v.token, shape.length, shape.width);
  zip_rows(of.key_pairs, width, k, heads.k.token, shape.length, shape.width);
  fill(of.of_keys, tiles.window * width, 0.0f);
  fill(of.of_values, tiles.window * width, 0.0f);
  for (int64_t h = 0; h < shape.group; h++) {
    const float* of_summary = nullptr;
    if (gradients.grad_summary) {
      of_summary = static_cast<const float*>(gradients.grad_summary) + h * heads.summary_head;
      summary_weights(static_cast<const float*>(heads.select) + h * heads.select_head, shape.length,
                      shape.summary_tokens, tiles.weights);
      const auto* values = reinterpret_cast<const bfloat16*>(of.values);
      for (int64_t j = 0; j < shape.length; j++) {
        of.products[j] = dot(of_summary, values + j * 2 * tiles.pairs, shape.width);
      }
    }
    for (int64_t first = 0; first < shape.length; first += tiles.columns) {
      const int64_t rest = shape.length - first, count = rest < tiles.columns ? rest : tiles.columns;
      const Block block{first, count, 0, shape.length, shape.causal, 0};
      tiles.template probabilities<P>(block, shape, heads, h, ahead);
      zip_rows(of.query_pairs, width, row<bfloat16>(heads.q, h, first), heads.q.token, count, shape.width);
      of.read(block, shape, tiles, gradients.grad, h, of_summary);
      scores<P>(block, elements<P>(shape.width), of.values, tiles.pairs, of.columns_of_grads, of.of_p, ahead);
      gradient_of_scores(block, float(shape.scale), tiles.sum, of_summary ? of.products : nullptr, tiles.p, of.of_p,
                         of.of_weights + first);
      narrow_keys(block, tiles.p, of.narrow);
      sum_over_queries<P, true>(block, width, of.narrow, of.grad_pairs, of.of_values, width, ahead);
      narrow_keys(block, of.of_p, of.narrow);
      sum_over_queries<P, true>(block, width, of.narrow, of.query_pairs, of.of_keys, width, ahead);
      zip_keys(block, of.of_p, tiles.zipped);
      sum_over_keys<P, false>(block, width, tiles.zipped, of.key_pairs, of.of_queries, width, ahead);
      write_rows<bfloat16>(of.of_queries, width, gradients.q, h, first, count, shape.width);
    }
    if (of_summary) {
      gradient_of_select(tiles.weights, of.of_weights, shape.length,
                         static_cast<float*>(gradients.select) + h * heads.select_head);
    }
  }
  write_rows<bfloat16>(of.of_keys, width, gradients.k, 0, 0, shape.length, shape.width);
  write_rows<bfloat16>(of.of_values, width, gradients.v, 0, 0, shape.length, shape.width);
  if (std::is_same_v<P, TiledPairs>) release_tiles();
}

template <class P>
constexpr WindowLoops::Loops pair_loops = {pair_forward<P>,       pair_backward<P>,  pair_forward_scratch,
                                           pair_backward_scratch, add_row<bfloat16>, sum_rows<bfloat16>};

}  // namespace
#endif
