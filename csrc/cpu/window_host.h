// What the host side of window_attention, window_exchange and njx_attention shares.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/convert.h"
#include "cpu/output.h"
#include "cpu/window_loops.h"
#include "cpu/workspace.h"

namespace quaver::cpu {

using torch::stable::contiguous;
using torch::stable::parallel_for;

// [B, H, T, d] with the elements of a row side by side; strides in elements.
struct HeadTensor {
  Tensor tensor;
  const char* first = nullptr;  // asked of torch once: each window needs it several times
  int64_t heads = 0, batch = 0, head = 0, token = 0, element_size = 0;

  HeadTensor() = default;
  explicit HeadTensor(const Tensor& x) : tensor(x.size(3) > 1 && x.stride(3) != 1 ? contiguous(x) : x) {
    heads = tensor.size(1);
    batch = tensor.stride(0);
    head = tensor.stride(1);
    token = tensor.stride(2);
    first = const_data<char>(tensor);
    element_size = int64_t(tensor.element_size());
  }

  HeadRows at(int64_t b, int64_t h, int64_t t) const {
    const int64_t element = b * batch + h * head + t * token;
    return {const_cast<char*>(first + element * element_size), token, head};
  }
};

// For a result beside x: with the heads of a token side by side where x has them so. The fake in op.py does the same.
inline Tensor empty_like_heads(const Tensor& x) {
  const bool heads_inside = x.stride(1) < x.stride(2);
  const Tensor out = heads_inside ? torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)})
                                  : torch::stable::new_empty(x, sizes_of(x));
  output<char>(out);  // asks for huge pages
  return heads_inside ? torch::stable::transpose(out, 1, 2) : out;
}

inline const WindowLoops::Loops& window_loops_of(ScalarType dtype) {
  const WindowLoops& loops = window_loops();
  switch (dtype) {
    case ScalarType::Double:
      return loops.f64;
    case ScalarType::BFloat16:
      if (has_amx() && has_bf16()) return *loops.bf16_amx;
      return has_bf16() ? *loops.bf16_pairs : loops.bf16;
    case ScalarType::Half:
      return loops.f16;
    default:
      return loops.f32;
  }
}

// Calls body(loops, C{}) with the loops of the exchange, in the compute type of `dtype`.
template <class Body>
void with_exchange(ScalarType dtype, Body&& body) {
  if (dtype == ScalarType::Double) {
    body(exchange_loops().f64, double{});
  } else {
    body(exchange_loops().f32, float{});
  }
}

// One window: its first token and its length.
struct Span {
  int64_t first, length;
};

// Attention inside the windows of q, k and v, the summaries of the compute dtype.
class Windows {
 public:
  Windows(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& select,
          const OptionalTensor& document_starts, int64_t window, int64_t summary_tokens, bool causal, double scale);

  // All windows of some key heads, or of all.
  void forward(int64_t batch, int64_t first_key_head, int64_t count, const HeadTensor& out,
               const Tensor* summary) const;
  void forward(const HeadTensor& out, const Tensor* summary) const;

  struct Gradients {
    HeadTensor grad;  // without a tensor where there is none
    bool has_grad = false;
    const void* grad_summary = nullptr;
    HeadTensor q, k, v;
    void* select = nullptr;
  };
  void backward(int64_t batch, int64_t first_key_head, int64_t count, const Gradients& gradients) const;
  void backward(const Gradients& gradients) const;

  int64_t batches() const { return batches_; }
  int64_t heads() const { return heads_; }
  int64_t key_heads() const { return key_heads_; }
  int64_t group() const { return group_; }
  int64_t windows() const { return windows_; }
  int64_t length() const { return length_; }
  int64_t width() const { return shape_.width; }
  // Whether the heads of a token lie side by side.
  bool heads_inside() const { return heads_inside_; }
  int64_t window() const { return window_; }
  int64_t size() const { return wide_size_; }
  const WindowLoops::Loops& loops() const { return loops_; }
  // Where the row of a window in [B, H, W, d] begins, in elements.
  int64_t summary_at(int64_t batch, int64_t head, int64_t window) const {
    return ((batch * heads_ + head) * windows_ + window) * shape_.width;
  }

 private:
  struct Task {
    int64_t batch, window, key_head;
  };
  Task task(int64_t index) const;
  Task after(Task task) const;
  WindowHeads heads_of(const Task& task) const;
  const Span& span(const Task& task) const { return spans_[size_t(shared_ ? 0 : task.batch)][size_t(task.window)]; }
  Ahead ahead(const Task* next, std::initializer_list<const HeadTensor*> tensors) const;
  void forward(const Task& task, const Task* next, const HeadTensor& out, const Tensor* summary, void* scratch) const;
  void backward(const Task& task, const Task* next, const Gradients& gradients, void* scratch) const;
  template <class Body>
  void for_tasks(int64_t work, Body&& body) const;
  template <class Body>
  void for_windows(int64_t batch, int64_t first_key_head, int64_t count, Body&& body) const;
  void* scratch(bool backward) const;

  HeadTensor q_, k_, v_;
  OptionalTensor select_;
  WindowShape shape_;
  const WindowLoops::Loops& loops_;
  int64_t batches_, heads_, key_heads_, group_, length_, window_, windows_, wide_size_;
  bool shared_, heads_inside_;
  std::vector<std::vector<Span>> spans_;  // of each batch, or of all
};

// The index of each window's query, [W] or of every batch [B, W], in range, as int64 that live as long as this.
class Sources {
 public:
  Sources(const OptionalTensor& source, int64_t windows, bool causal);
  const int64_t* of(int64_t batch) const { return indexes_.data() + (per_batch_ ? batch * windows_ : 0); }

 private:
  std::vector<int64_t> indexes_;
  int64_t windows_;
  bool per_batch_;
};

}  // namespace quaver::cpu
