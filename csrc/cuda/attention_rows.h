// Which keys a row of attention sees, and which rows a block of threads has. For windows the rows are tokens; for the
// exchange they are windows, all of them in one "window".
#pragma once
#include "cuda/gpu.h"

namespace quaver::gpu {

struct Range {
  int64_t begin, end;
};

struct Visible {
  int64_t length, window;
  bool causal;
  int64_t hidden;         // row t sees keys up to t - hidden, for `causal`
  const int32_t* starts;  // of documents: windows are counted from each; null for one document
  int64_t documents, batch_stride;

  __device__ Range window_of(int64_t batch, int64_t t) const {
    int64_t first = 0, end = length;
    if (starts) {
      const int32_t* of_batch = starts + batch * batch_stride;
      int64_t low = 0, high = documents;  // the last start that is at most t is in [low, high)
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (of_batch[middle] <= t ? low : high) = middle;
      }
      // Whatever the starts are, t is in its window and that in the tokens.
      first = max(int64_t(0), min(int64_t(of_batch[low]), t));
      if (high < documents) end = max(t + 1, min(int64_t(of_batch[high]), length));
    }
    const int64_t begin = first + (t - first) / window * window;
    return {begin, min(begin + window, end)};
  }
  __device__ Range keys_of(int64_t batch, int64_t t) const {
    const Range all = window_of(batch, t);
    return {all.begin, causal ? t + 1 - hidden : all.end};
  }
  // The queries that see one of the keys first .. last, and maybe some that see none.
  __device__ Range queries_of(int64_t batch, int64_t first, int64_t last) const {
    return {causal ? first + hidden : window_of(batch, first).begin, window_of(batch, last).end};
  }
};

// Tiles of at most `rows` rows. Windows that fit a tile stay whole; larger ones are cut into `parts`. Windows of
// documents, wherever they lie, are cut as it comes.
struct Tiling {
  int64_t length, window, parts, each, count;

  Tiling(int64_t length, int64_t window_, int64_t rows, bool documents)
      : length(length),
        window(window_ < length ? window_
               : length > 0     ? length
                                : 1),
        parts(1),
        each(rows) {
    const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    if (documents) {
      window = rows;
    } else if (window > rows) {
      parts = up(window, rows);
    } else {
      each = rows / window * window;
      window = each;
    }
    count = length == 0 ? 0 : (length / window) * parts + up(length % window, each);
  }

  __device__ int64_t first(int64_t tile) const { return tile / parts * window + tile % parts * each; }
  __device__ int rows(int64_t tile) const {
    const int64_t begin = first(tile), of_window = tile / parts * window + window;
    return int(min(min(of_window, length) - begin, each));
  }
};

}  // namespace quaver::gpu
