// torch.ops.quaver.spectral_linear on the CPU. Schema: kernels/spectral_linear/schemas.py.
#include "cpu/spectral_by_delta.h"
#include "cpu/spectral_few_rows.h"
#include "cpu/spectral_few_tiled.h"

namespace quaver::cpu {
namespace {

// Scales rows of x down^T by their coefficients, and keeps them as they were before.
template <class C>
struct Modulate final : Finish<C> {
  const C* coefficients;  // [.., factors]
  int64_t factors, rank, shared;
  int64_t first;  // row of the product's first
  Place kept;

  void operator()(C* tile, int64_t stride, int64_t i, int64_t j, int64_t rows, int64_t columns) const override {
    C* line = workspace<C>(Use::kLine, columns);
    int64_t expanded = -1;
    for (int64_t r = 0; r < rows; r++, tile += stride) {
      const int64_t row = first + i + r, of = row / shared;
      if (kept.data && kept.narrow) {
        kept.narrow->store(kept.data, row * kept.stride + j, tile, columns);
      } else if (kept.data) {
        std::copy_n(tile, columns, reinterpret_cast<C*>(kept.data) + row * kept.stride + j);
      }
      if (of != expanded) {
        expand(line, coefficients + of * factors, j, columns);
        expanded = of;
      }
      spectral_loops_of<C>().scale_columns(tile, 0, line, 1, columns);
    }
  }

 private:
  void expand(C* line, const C* from, int64_t j, int64_t columns) const {
    for (int64_t at = 0; at < columns;) {
      const int64_t f = (j + at) / rank, part = std::min((f + 1) * rank - (j + at), columns - at);
      std::fill_n(line + at, part, from[f]);
      at += part;
    }
  }
};

// [x | c * x down^T] [W | gain up]^T + bias: x beside its projections, so that one sum makes the result.
template <class C>
void by_tokens(Tensor& out, Tensor* kept, const SpectralInputs& in) {
  const Arithmetic<C> how(in.dtype);
  const Samples x = in.x.merged();
  const int64_t inputs = x.columns, ranks = in.ranks(), outputs = in.outputs();
  const int64_t element = int64_t(out.element_size()), offset = round_up(inputs, how.together());
  // Rows a multiple of 4 KiB apart would share a few sets of the caches.
  const int64_t depth = offset + ranks, stride = round_up(depth, 2) + (depth * element % 4096 < 64 ? 32 : 0);
  const std::vector<C> gain = values_of<C>(in.gain, outputs), bias = values_of<C>(in.bias, outputs);
  const Matrix<C> weight = matrix_of(how, const_data<char>(in.weight), inputs, false, inputs);
  const Matrix<C> down = matrix_of(how, const_data<char>(in.down), inputs, false, inputs);
  const UpRows<C> up(in.up, pointer(gain), how.pairs);
  const Stacked<C, Matrix<C>, UpRows<C>> right{weight, up, offset / how.together()};
  Modulate<C> modulate;
  modulate.coefficients = const_data<C>(in.coefficients);
  modulate.factors = in.down.size(0);
  modulate.rank = in.rank();
  modulate.shared = in.rows_of_coefficients();
  modulate.kept = {kept ? output<char>(*kept) : nullptr, ranks, how.narrow};
  char* to = output<char>(out);
  const int64_t most = std::max<int64_t>(1024, round_up(kProjectedBytes / (stride * element), 1024));
  for (int64_t first = 0; first < x.length; first += most) {
    const int64_t rows = std::min(most, x.length - first);
    char* both = workspace<char>(Use::kSamples, rows * stride * element);
    const char* from = x.of(0) + first * x.row * element;
    parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, inputs)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        std::memcpy(both + r * stride * element, from + r * x.row * element, size_t(inputs * element));
        std::memset(both + (r * stride + inputs) * element, 0, size_t((offset - inputs) * element));
      }
    });
    modulate.first = first;
    multiply_into<C>(rows, ranks, inputs, matrix_of(how, from, x.row, false, inputs), down,
                     {both + offset * element, stride, how.narrow}, nullptr, &modulate);
    multiply_into<C>(rows, outputs, depth, matrix_of(how, both, stride, false, depth), right,
                     {to + first * outputs * element, outputs, how.narrow}, pointer(bias));
  }
}

std::tuple<Tensor, Tensor> spectral_linear(const Tensor& x, const Tensor& weight, OptionalTensor bias,
                                           const Tensor& down, const Tensor& up, const Tensor& coefficients,
                                           OptionalTensor gain, bool by_delta, bool keep) {
  const SpectralInputs in(x, weight, bias, down, up, coefficients, gain);
  STD_TORCH_CHECK(!by_delta || coefficients.dim() == 2, "quaver: Delta has coefficients by samples");
  const int64_t batch = in.x.batch, length = in.x.length;
  std::vector<int64_t> kept_sizes{0};
  if (keep) kept_sizes = {batch, by_delta ? in.outputs() : length, by_delta ? in.x.columns : in.ranks()};
  Tensor out = torch::stable::new_empty(x, {batch, length, in.outputs()});
  Tensor kept = torch::stable::new_empty(x, kept_sizes);
  if (out.numel() == 0 && kept.numel() == 0) return {out, kept};
  with_compute(in.dtype, [&](auto zero) {
    using C = decltype(zero);
    if (by_delta) {
      ByDelta<C>(out, keep ? &kept : nullptr, in).run();
    } else if (FewTiledRows::takes(in)) {
      FewTiledRows(in).run(out, keep ? &kept : nullptr);
    } else if (FewRows<C>::takes(in)) {
      FewRows<C>(in).run(out, keep ? &kept : nullptr);
    } else {
      by_tokens<C>(out, keep ? &kept : nullptr, in);
    }
  });
  return {out, kept};
}

}  // namespace
}  // namespace quaver::cpu

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) { m.impl("spectral_linear", TORCH_BOX(&quaver::cpu::spectral_linear)); }
