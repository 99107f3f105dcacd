// torch.ops.quaver.window_attention and its backward on the CPU. Schemas: kernels/window_attention/op.py.
#include <initializer_list>

#include "common/integers.h"
#include "cpu/window_host.h"

namespace quaver::cpu {

namespace {

// The windows of documents that start at `starts`, of [n].
std::vector<Span> spans_of(const int32_t* starts, int64_t count, int64_t length, int64_t window) {
  std::vector<Span> spans;
  STD_TORCH_CHECK(starts[0] == 0, "document_starts: expected the first to be 0, got ", starts[0]);
  for (int64_t i = 0; i < count; i++) {
    const int64_t end = i + 1 < count ? starts[i + 1] : length;
    STD_TORCH_CHECK(starts[i] <= end && end <= length, "document_starts: expected ascending positions up to ", length,
                    ", got ", starts[i], " before ", end);
    for (int64_t first = starts[i]; first < end; first += window) {
      spans.push_back({first, std::min(window, end - first)});
    }
  }
  return spans;
}

}  // namespace

Windows::Windows(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& select,
                 const OptionalTensor& document_starts, int64_t window, int64_t summary_tokens, bool causal,
                 double scale)
    : q_(q),
      k_(k),
      v_(v),
      shape_{0, q.size(3), 1, scale, causal, summary_tokens},
      loops_(window_loops_of(q.scalar_type())),
      batches_(q.size(0)),
      heads_(q.size(1)),
      key_heads_(k.size(1)),
      group_(k.size(1) > 0 ? q.size(1) / k.size(1) : 1),
      length_(q.size(2)),
      window_(std::max<int64_t>(1, std::min(window, q.size(2)))),
      windows_(ceil_div(q.size(2), window)),
      wide_size_(q.scalar_type() == ScalarType::Double ? 8 : 4),
      shared_(!document_starts || document_starts->dim() == 1),
      heads_inside_(q.stride(1) < q.stride(2)) {
  shape_.group = group_;
  if (select) {
    select_ = contiguous(*select);
    STD_TORCH_CHECK(select->scalar_type() == compute_dtype(q.scalar_type()), "quaver: select has the wrong dtype");
  }
  if (document_starts) {
    const Tensor starts = contiguous(*document_starts);
    const int64_t count = starts.size(starts.dim() - 1);
    for (int64_t b = 0; b < (shared_ ? 1 : batches_); b++) {
      spans_.push_back(spans_of(const_data<int32_t>(starts) + b * count, count, length_, window_));
    }
  } else {
    spans_.emplace_back();
    for (int64_t first = 0; first < length_; first += window_) {
      spans_[0].push_back({first, std::min(window_, length_ - first)});
    }
  }
}

void* Windows::scratch(bool backward) const {
  const auto& size = backward ? loops_.backward_scratch : loops_.forward_scratch;
  return workspace<double>(Use::kWindow, (size(window_, shape_.width) * wide_size_ + 7) / 8);
}

WindowHeads Windows::heads_of(const Task& task) const {
  const int64_t head = task.key_head * group_, first = span(task).first;
  WindowHeads heads{q_.at(task.batch, head, first),
                    k_.at(task.batch, task.key_head, first),
                    v_.at(task.batch, task.key_head, first),
                    nullptr,
                    length_,
                    windows_ * shape_.width};
  if (select_) {
    const int64_t element = (task.batch * heads_ + head) * length_ + first;
    heads.select = const_data<char>(*select_) + element * wide_size_;
  }
  return heads;
}

Ahead Windows::ahead(const Task* next, std::initializer_list<const HeadTensor*> tensors) const {
  Ahead ahead;
  if (!next) return ahead;
  const auto [first, length] = span(*next);
  ahead.each = length;
  for (const HeadTensor* x : tensors) {
    const int64_t head = x->heads == heads_ ? next->key_head * group_ : next->key_head;
    ahead.add(x->at(next->batch, head, first).first, x->token * x->element_size, shape_.width * x->element_size);
  }
  return ahead;
}

void Windows::forward(const Task& task, const Task* next, const HeadTensor& out, const Tensor* summary,
                      void* scratch) const {
  WindowShape shape = shape_;
  shape.length = span(task).length;
  const WindowHeads heads = heads_of(task);
  const int64_t head = task.key_head * group_;
  char* to = summary ? data<char>(*summary) + summary_at(task.batch, head, task.window) * wide_size_ : nullptr;
  Ahead following = ahead(next, {&k_, &v_, &q_, &out});
  loops_.forward(shape, heads, following, out.at(task.batch, head, span(task).first), to, scratch);
}

void Windows::backward(const Task& task, const Task* next, const Gradients& gradients, void* scratch) const {
  WindowShape shape = shape_;
  shape.length = span(task).length;
  const WindowHeads heads = heads_of(task);
  const int64_t head = task.key_head * group_, first = span(task).first;
  WindowGradients of{};
  if (gradients.has_grad) of.grad = gradients.grad.at(task.batch, head, first);
  if (gradients.grad_summary) {
    const int64_t element = (task.batch * heads_ + head) * length_ + first;
    of.grad_summary =
        static_cast<const char*>(gradients.grad_summary) + summary_at(task.batch, head, task.window) * wide_size_;
    of.select = static_cast<char*>(gradients.select) + element * wide_size_;
  }
  of.q = gradients.q.at(task.batch, head, first);
  of.k = gradients.k.at(task.batch, task.key_head, first);
  of.v = gradients.v.at(task.batch, task.key_head, first);
  Ahead following = gradients.has_grad
                        ? ahead(next, {&k_, &v_, &q_, &gradients.grad, &gradients.q, &gradients.k, &gradients.v})
                        : ahead(next, {&k_, &v_, &q_, &gradients.q, &gradients.k, &gradients.v});
  loops_.backward(shape, heads, following, of, scratch);
}

// In the order in which q lies in memory.
Windows::Task Windows::task(int64_t index) const {
  if (heads_inside_) return {index / key_heads_ / windows_, index / key_heads_ % windows_, index % key_heads_};
  return {index / windows_ / key_heads_, index % windows_, index / windows_ % key_heads_};
}

// The one after it, without divisions: a window of 16 tokens takes less than half a microsecond.
Windows::Task Windows::after(Task task) const {
  int64_t &inner = heads_inside_ ? task.key_head : task.window, &outer = heads_inside_ ? task.window : task.key_head;
  if (++inner < (heads_inside_ ? key_heads_ : windows_)) return task;
  inner = 0;
  if (++outer < (heads_inside_ ? windows_ : key_heads_)) return task;
  outer = 0;
  task.batch++;
  return task;
}

template <class Body>
void Windows::for_tasks(int64_t work, Body&& body) const {
  constexpr int64_t kWork = 1 << 18;  // multiply-adds: a few microseconds
  if (heads_ == 0 || length_ == 0 || batches_ == 0) return;
  const int64_t each = std::max<int64_t>(1, work * window_ * window_ * shape_.width * group_);
  const int64_t grain = std::max<int64_t>(1, kWork / each);
  if (!spans_.empty() && int64_t(spans_[0].size()) == windows_ && shared_) {
    parallel_for(0, batches_ * key_heads_ * windows_, grain, [&](int64_t begin, int64_t end) {
      Task now = task(begin);
      for (int64_t i = begin; i < end; i++) {
        const Task next = after(now);
        body(now, i + 1 < end ? &next : nullptr);
        now = next;
      }
    });
    return;
  }
  // Documents have numbers of windows of their own.
  parallel_for(0, batches_ * key_heads_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t batch = i / key_heads_;
      const int64_t count = int64_t(spans_[size_t(shared_ ? 0 : batch)].size());
      for (int64_t w = 0; w < count; w++) body(Task{batch, w, i % key_heads_}, static_cast<const Task*>(nullptr));
    }
  });
}

void Windows::forward(const HeadTensor& out, const Tensor* summary) const {
  for_tasks(2, [&](const Task& task, const Task* next) { forward(task, next, out, summary, scratch(false)); });
}

void Windows::backward(const Gradients& gradients) const {
  for_tasks(5, [&](const Task& task, const Task* next) { backward(task, next, gradients, scratch(true)); });
}

template <class Body>
void Windows::for_windows(int64_t batch, int64_t first_key_head, int64_t count, Body&& body) const {
  for (int64_t w = 0; w < windows_; w++) {
    for (int64_t h = 0; h < count; h++) {
      const Task next = h + 1 < count ? Task{batch, w, first_key_head + h + 1} : Task{batch, w + 1, first_key_head};
      body(Task{batch, w, first_key_head + h}, next.window < windows_ ? &next : nullptr);
    }
  }
}

void Windows::forward(int64_t batch, int64_t first_key_head, int64_t count, const HeadTensor& out,
                      const Tensor* summary) const {
  for_windows(batch, first_key_head, count,
              [&](const Task& task, const Task* next) { forward(task, next, out, summary, scratch(false)); });
}

void Windows::backward(int64_t batch, int64_t first_key_head, int64_t count, const Gradients& gradients) const {
  for_windows(batch, first_key_head, count,
              [&](const Task& task, const Task* next) { backward(task, next, gradients, scratch(true)); });
}

namespace {

std::tuple<Tensor, Tensor> window_attention(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor select,
                                            OptionalTensor document_starts, int64_t window, int64_t exchange_tokens,
                                            bool causal, double scale) {
  const Windows windows(q, k, v, select, document_starts, window, exchange_tokens, causal, scale);
  Tensor out = empty_like_heads(q);
  if (!select) {
    windows.forward(HeadTensor(out), nullptr);
    return {out, torch::stable::new_empty(q, {0})};
  }
  const Tensor summary =
      torch::stable::new_empty(q, {q.size(0), q.size(1), windows.windows(), q.size(3)}, compute_dtype(q.scalar_type()));
  windows.forward(HeadTensor(out), &summary);
  return {out, narrowed(summary, q.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(OptionalTensor grad, OptionalTensor grad_summary,
                                                                     const Tensor& q, const Tensor& k, const Tensor& v,
                                                                     OptionalTensor select,
                                                                     OptionalTensor document_starts, int64_t window,
                                                                     int64_t exchange_tokens, bool causal,
                                                                     double scale) {
  const Windows windows(q, k, v, select, document_starts, window, exchange_tokens, causal, scale);
  Tensor of_q = empty_like_heads(q), of_k = empty_like_heads(k), of_v = empty_like_heads(v);
  Tensor of_select = select ? torch::stable::new_empty(*select, sizes_of(*select)) : torch::stable::new_empty(q, {0});
  Windows::Gradients gradients;
  Tensor wide;
  if (grad) {
    gradients.grad = HeadTensor(*grad);
    gradients.has_grad = true;
  }
  if (grad_summary && select) {
    wide = widened(*grad_summary);
    gradients.grad_summary = const_data<char>(wide);
    gradients.select = data<char>(of_select);
  } else if (select) {
    torch::stable::zero_(of_select);
  }
  gradients.q = HeadTensor(of_q);
  gradients.k = HeadTensor(of_k);
  gradients.v = HeadTensor(of_v);
  windows.backward(gradients);
  return {of_q, of_k, of_v, of_select};
}

}  // namespace
}  // namespace quaver::cpu

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&quaver::cpu::window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&quaver::cpu::window_attention_backward));
}
