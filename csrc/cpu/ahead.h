// Memory that is read or written later, fetched into the L2 cache while products are computed.
#pragma once
#include <cstdint>

namespace quaver::cpu {

// Rows, a few lines at a time: more at a time than a core can wait for (16 on Sapphire Rapids) would hold the products
// up. Inlined everywhere: this is compiled once per instruction set.
struct Ahead {
  static constexpr int64_t kEach = 8;  // steps of a product
  static constexpr int kMost = 7;      // of window attention: q, k, v, the gradient of the output, three results
  struct Rows {
    const char* first;
    int64_t stride, lines;  // bytes from one to the next, cache lines of each
  };
  Rows rows[kMost];
  int count = 0;
  int64_t each = 0;  // rows of each
  int of = 0;
  int64_t row = 0, line = 0;
  int64_t step = 0;  // lines at a time

  __attribute__((always_inline)) void add(const void* first, int64_t stride, int64_t bytes) {
    rows[count++] = {static_cast<const char*>(first), stride, (bytes + 63) / 64};
  }

  // Over so many calls of go(), evenly.
  __attribute__((always_inline)) void spread(int64_t calls) {
    uint32_t lines = 0;
    for (int i = 0; i < count; i++) lines += uint32_t(rows[i].lines * each);
    if (calls > 0) step = (lines + uint32_t(calls) - 1) / uint32_t(calls);
  }

  __attribute__((always_inline)) void go() {
    for (int64_t left = step; left > 0 && of < count;) {
      // In registers: a state that is stored for each line took as long as a fifth of the products between.
      const int64_t rest = rows[of].lines - line, now = rest < left ? rest : left;
      const char* at = rows[of].first + row * rows[of].stride + line * 64;
      for (int64_t i = 0; i < now; i++, at += 64) __builtin_prefetch(at, 0, 2);
      left -= now;
      line += now;
      if (now < rest) continue;
      line = 0;
      if (++row < each) continue;
      row = 0;
      of++;
    }
  }
};

}  // namespace quaver::cpu
