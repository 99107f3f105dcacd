// torch.ops.quaver.gemm: the GEMM by itself, for its tests and its benchmark. Schema: kernels/_gemm.py.
#include "cpu/gemm_operands.h"
#include "cpu/output.h"

namespace {

using namespace quaver;

// A matrix whose rows or columns are contiguous, as an operand: element (i, k), k the depth.
template <class T>
cpu::Matrix<T> operand(const Tensor& matrix, bool transposed, const cpu::DtypeLoops::Loops* widen,
                       const cpu::PairLoops* pairs) {
  const bool contiguous = matrix.stride(1) == 1;
  const int64_t stride = matrix.stride(contiguous ? 0 : 1), depth = matrix.size(transposed ? 0 : 1);
  return {const_data<char>(matrix), stride, contiguous == transposed, widen, pairs, depth};
}

// a [M, K] b [K, N]
Tensor gemm(const Tensor& a_, const Tensor& b_) {
  STD_TORCH_CHECK(a_.dim() == 2 && b_.dim() == 2 && a_.size(1) == b_.size(0), "quaver: expected [M, K] and [K, N]");
  STD_TORCH_CHECK(a_.scalar_type() == b_.scalar_type(), "quaver: expected one dtype");
  const auto dense = [](const Tensor& x) {
    return x.stride(0) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  };
  const Tensor a = dense(a_), b = dense(b_);
  Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(1)});
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    const auto* loops =
        out.scalar_type() == compute_dtype(out.scalar_type()) ? nullptr : &cpu::loops_of(out.scalar_type());
    const cpu::Result<C> result{cpu::output<char>(out), out.size(1), nullptr, false, loops};
    const auto* pairs = cpu::pair_loops_of(out.scalar_type());
    cpu::gemm(a.size(0), b.size(1), a.size(1), operand<C>(a, false, loops, pairs), operand<C>(b, true, loops, pairs),
              result);
  };
  if (out.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) { m.impl("gemm", TORCH_BOX(&gemm)); }
