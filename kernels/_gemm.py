"""The GEMM of the CPU kernels as an op of its own, for its tests and its benchmark: models call the ops built on it."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import _ops
from ._cases import Row, values

_ops.define("gemm(Tensor a, Tensor b) -> Tensor", lambda a, b: a.new_empty((a.shape[0], b.shape[1])), None)

#: a [M, K] b [K, N] of one dtype, any strides, on the CPU.
gemm = _ops.overload("gemm", "cpp")


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a product for `dtype` on this processor: bfloat16 needs AVX-512 there."""
    if dtype != torch.bfloat16:
        return bool(torch.backends.mkldnn.is_available())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear_of_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear through oneDNN, which takes half the time of MKL on AMD processors with AVX-512."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _row(kind: str, rows: int, columns: int, depth: int, dtype: torch.dtype) -> Row:
    """x W^T, as in a linear layer; g W, its input's gradient; g^T x, its weight's."""

    def operands(device: torch.device) -> tuple[Tensor, Tensor]:
        transposed = {"x W^T": (False, True), "g W": (False, False), "g^T x": (True, False)}[kind]
        shapes = ((rows, depth), (depth, columns))
        made = [values(shape[::-1] if t else shape, dtype, device) for shape, t in zip(shapes, transposed, strict=True)]
        a, b = (tensor.t() if t else tensor for tensor, t in zip(made, transposed, strict=True))
        return a, b

    def variants(device: torch.device) -> dict[str, Callable[[], object]]:
        a, b = operands(device)
        calls: tuple[Callable[[], object], ...] = (
            lambda: gemm(a, b),
            lambda: torch.mm(a, b),
            lambda: linear_of_onednn(a, b.t()),
        )
        return dict(zip(names, calls, strict=False))

    def check(device: torch.device) -> None:
        a, b = operands(device)
        exact, unit = a.double() @ b.double(), torch.finfo(dtype).eps
        if (gemm(a, b).double() - exact).abs().max() > (8 if dtype == torch.float32 else 1) * unit * exact.abs().max():
            raise RuntimeError("gemm: the result differs from float64's")

    names = ("quaver", "torch.mm", *(("oneDNN",) if onednn_multiplies(dtype) else ()))
    name = f"gemm {kind}" + ("" if dtype == torch.float32 else ", bf16")
    moved = dtype.itemsize * (rows * depth + depth * columns + rows * columns)
    work = rows * depth * columns
    return Row(name, f"{rows} x {columns} x {depth}", names, variants, check, moved, work, False)


_SIZES = (
    (96, 96, 96),
    (256, 96, 96),
    (2048, 96, 96),
    (448, 448, 448),
    (256, 448, 448),
    (2048, 448, 448),
    (1024, 1024, 1024),
    (256, 768, 3072),
    (2048, 768, 3072),
    (16, 4096, 4096),
    (256, 4096, 4096),
    (2048, 4096, 4096),
)
#: Elements are multiply-adds: 2 / (ns/element) is GFLOP/s.
ROWS = [_row("x W^T", *size, dtype) for dtype in (torch.float32, torch.bfloat16) for size in _SIZES]
ROWS += [
    _row(kind, *size, torch.float32)
    for size in ((448, 448, 2048), (448, 448, 448), (2048, 3072, 768))
    for kind in ("g W", "g^T x")
]
