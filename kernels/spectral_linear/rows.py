"""Rows of the speed table of spectral_linear: what a user would otherwise write."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._backends import use_backend
from .._cases import Row, values
from .._gemm import linear_of_onednn, onednn_multiplies
from .op import spectral_linear

_WIDTH = 448  # N = K
#: Of the geometric Llama: 64 directions, so R = 1536 columns.
_FACTORS, _RANK = 128, 12


class Inputs(NamedTuple):
    """As in spectral_linear; the alternatives that take all factors at once have `up` side by side, [N, R]."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor
    coefficients: Tensor


Call = Callable[[Inputs], Tensor]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _ours(of: Inputs) -> Tensor:
    return spectral_linear(*of)


def _loop(of: Inputs) -> Tensor:
    """A pass over the tokens for each factor."""
    out = F.linear(of.x, of.weight, of.bias)
    for i in range(_FACTORS):
        out = out + of.coefficients[:, i, None, None].to(out.dtype) * ((of.x @ of.down[i].t()) @ of.up[i].t())
    return out


def _by_column(of: Inputs) -> Tensor:
    """The coefficient of each column of the factors, [B, 1, R]."""
    return of.coefficients.to(of.x.dtype).repeat_interleave(_RANK, 1).unsqueeze(1)


def _concatenated(of: Inputs, product: Product = F.linear) -> Tensor:
    """All factors in two products, the coefficients between them; the last is added to the layer's."""
    x = of.x.flatten(0, 1)
    projected = product(x, of.down.flatten(0, 1), None).view(*of.x.shape[:2], -1) * _by_column(of)
    base = product(x, of.weight, of.bias)
    if torch.is_grad_enabled():
        out = torch.addmm(base, projected.flatten(0, 1), of.up.t())
    else:
        out = base.add_(product(projected.flatten(0, 1), of.up, None))
    return out.view(*of.x.shape[:2], -1)


def _effective(of: Inputs) -> Tensor:
    """Each sample's weight, then a batched product."""
    weights = torch.matmul(of.up * _by_column(of), of.down.flatten(0, 1)) + of.weight
    return torch.baddbmm(of.bias, of.x, weights.transpose(1, 2))


def _products(of: Inputs) -> Tensor:
    """Each factor's product [2n, N, K] in memory, once for all samples; then each sample's weight from those."""
    products = torch.matmul(of.up.view(_WIDTH, _FACTORS, _RANK).transpose(0, 1), of.down)
    weights = (of.coefficients.to(of.x.dtype) @ products.flatten(1)).view(-1, *of.weight.shape) + of.weight
    return torch.baddbmm(of.bias, of.x, weights.transpose(1, 2))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_of_onednn(x, weight, bias) if x.device.type == "cpu" else F.linear(x, weight, bias)


def _effective_onednn(of: Inputs) -> Tensor:
    """The same through oneDNN, which has no batched product."""
    down, scaled = of.down.flatten(0, 1).t(), of.up * _by_column(of)
    weights = _onednn(scaled.flatten(0, 1), down, None).view(-1, *of.weight.shape).add_(of.weight)
    return torch.stack([_onednn(x, weight, of.bias) for x, weight in zip(of.x, weights, strict=True)])


def _concatenated_onednn(of: Inputs) -> Tensor:
    return _concatenated(of, _onednn)


def _inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    def made(shape: tuple[int, ...], number: int, depth: int) -> Tensor:
        return (values(shape, torch.float32, device, 10 * seed + number) / math.sqrt(depth)).to(dtype)

    return Inputs(
        made((batch, length, _WIDTH), 1, 1),
        made((_WIDTH, _WIDTH), 2, _WIDTH),
        made((_WIDTH,), 3, 1),
        made((_FACTORS, _RANK, _WIDTH), 4, _WIDTH),
        made((_FACTORS, _WIDTH, _RANK), 5, _FACTORS * _RANK),
        values((batch, _FACTORS), torch.float32, device, 6),
    )


class _Rotated:
    """Calls with inputs that take turns: three layers."""

    def __init__(self, call: Call, inputs: list[Inputs], training: bool) -> None:
        self._call, self._inputs, self._training, self._next = call, inputs, training, 0
        self._grad = torch.ones_like(inputs[0].x)

    def __call__(self) -> object:
        self._next = (self._next + 1) % len(self._inputs)
        of = self._inputs[self._next]
        if not self._training:
            return self._call(of)
        with torch.enable_grad():
            leaves = Inputs(*(tensor.detach().requires_grad_() for tensor in of))
            return torch.autograd.grad(self._call(leaves), leaves, self._grad)


def _check(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
    of = _inputs(min(batch, 2), length, dtype, device)
    with use_backend("reference"):
        expected = _ours(Inputs(*(tensor.double() for tensor in of)))
    error, largest = (_ours(of).double() - expected).abs().max().item(), expected.abs().max().item()
    if not error <= 8 * torch.finfo(dtype).eps * largest:
        raise RuntimeError(f"spectral_linear: an error of {error} against the reference")


def _row(batch: int, length: int, dtype: torch.dtype, training: bool) -> Row:
    calls: dict[str, Call] = {"quaver": _ours, "naive": _loop, "concatenated": _concatenated, "W_eff": _effective}
    if length > 1:
        calls["products"] = _products
    if dtype == torch.float32 and not training and onednn_multiplies(dtype):  # bfloat16 goes to it anyway
        calls |= {"concatenated (oneDNN)": _concatenated_onednn, "W_eff (oneDNN)": _effective_onednn}
    if batch == 8 and length != 128 and not training:
        calls["torch.compile"] = _loop  # 20 seconds to compile: a graph of 128 factors

    def variants(device: torch.device) -> dict[str, Callable[[], object]]:
        torch.compiler.reset()
        inputs = [_inputs(batch, length, dtype, device, seed) for seed in range(3)]
        beside = [of._replace(up=of.up.transpose(0, 1).flatten(1)) for of in inputs]
        made: dict[str, Callable[[], object]] = {}
        for name, call in calls.items():
            called = torch.compile(call, dynamic=False) if name == "torch.compile" else call
            made[name] = _Rotated(called, inputs if call in (_ours, _loop) else beside, training)
        return made

    kind = {torch.float32: "", torch.bfloat16: " bf16"}[dtype]
    elements = batch * length * _WIDTH
    return Row(
        "spectral_linear" + (" fwd+bwd" if training else ""),
        f"{batch}x{length}, {_WIDTH}x{_WIDTH}, R {_FACTORS * _RANK}{kind}",
        tuple(calls),
        variants,
        lambda device: _check(batch, length, dtype, device),
        (2 * elements + _WIDTH * _WIDTH) * dtype.itemsize,
        elements,
        quick=(batch, length) == (8, 512) and dtype == torch.float32 and not training,
        slow=("torch.compile",),
    )


ROWS = [
    _row(batch, length, dtype, training)
    for dtype in (torch.float32, torch.bfloat16)
    for training in (False, True)
    for batch, length in ((8, 512), (8, 128), (64, 512), (1, 1), (8, 1), (64, 1))
    if not (training and length == 1)
]
