"""The GEMM of the CPU kernels as an op of its own, for its tests and its benchmark: models call the ops built on it."""

from . import _ops

_ops.define("gemm(Tensor a, Tensor b) -> Tensor", lambda a, b: a.new_empty((a.shape[0], b.shape[1])), None)

#: a [M, K] b [K, N] of one dtype, any strides, on the CPU.
gemm = _ops.overload("gemm", "cpp")
