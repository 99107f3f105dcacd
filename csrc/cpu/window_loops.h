// Attention inside one window, compiled once per instruction set and dtype. `C` below is the compute type: float64 for
// float64, float32 for the others. Strides are in elements, the elements of a row lie side by side.
#pragma once
#include <cstdint>

#include "cpu/ahead.h"
#include "cpu/simd_level.h"

namespace quaver::cpu {

// The rows of a window's tokens in the heads that share a key head.
struct HeadRows {
  void* first;  // of the first token and head; null where there is nothing to read
  int64_t token, head;
};

struct WindowShape {
  int64_t length, width, group;  // tokens, elements of a head, query heads to a key head
  double scale;
  bool causal;
  int64_t summary_tokens;  // a summary is made of the largest so many
};

// select: C, its tokens side by side, null for no summary. summary: C rows [.., d] of the heads, side by side.
struct WindowHeads {
  HeadRows q, k, v;
  const void* select;
  int64_t select_head;
  int64_t summary_head;
};

struct WindowGradients {
  HeadRows grad;             // of the outputs
  const void* grad_summary;  // C, by summary_head; null for none
  HeadRows q, k, v;          // written
  void* select;              // C, by select_head; written where grad_summary is given
};

struct WindowLoops {
  struct Loops {
    // ahead: what the next window reads and writes.
    void (*forward)(const WindowShape& shape, const WindowHeads& heads, Ahead& ahead, const HeadRows& out,
                    void* summary, void* scratch);
    void (*backward)(const WindowShape& shape, const WindowHeads& heads, Ahead& ahead, const WindowGradients& gradients,
                     void* scratch);
    // Elements of C.
    int64_t (*forward_scratch)(int64_t window, int64_t width);
    int64_t (*backward_scratch)(int64_t window, int64_t width);
    // rows of `length` tokens += factor * e, both of width elements; e: C.
    void (*add_row)(void* first, int64_t token, int64_t length, int64_t width, double factor, const void* e);
    // sum: C, of the rows.
    void (*sum_rows)(void* sum, const void* first, int64_t token, int64_t length, int64_t width);
  };
  Loops f32, f64, bf16, f16;
  // Null at the levels that never have the instructions: for has_bf16(), and has_amx() besides.
  const Loops *bf16_pairs, *bf16_amx;
};

QUAVER_LOOPS(WindowLoops, window_loops)

struct ExchangeShape {
  int64_t windows, width;
  double scale;
  bool causal;
};

template <class C>
struct ExchangeLoopsOf {
  // z, e: [windows, width]. source: one index a window, in range.
  void (*forward)(const ExchangeShape& shape, const C* z, const int64_t* source, C* e, C* scratch);
  // of_z = factor * the gradient of z for a gradient of e; returns the sum of grad * e.
  double (*backward)(const ExchangeShape& shape, const C* grad, const C* z, const int64_t* source, double factor,
                     C* of_z, C* scratch);
};

struct ExchangeLoops {
  ExchangeLoopsOf<float> f32;
  ExchangeLoopsOf<double> f64;
  int64_t (*scratch)(int64_t windows, int64_t width);
};

QUAVER_LOOPS(ExchangeLoops, exchange_loops)

}  // namespace quaver::cpu
