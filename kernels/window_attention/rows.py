"""Rows of the speed table of window attention: what a user would otherwise write."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .._backends import use_backend
from .._cases import Row, values
from .op import njx_attention, window_attention

_BATCH, _HEADS, _LENGTH = 8, 8, 1024
#: (window, head width)
_SIZES = ((16, 32), (32, 64), (64, 64))

Heads = tuple[Tensor, Tensor, Tensor]
Call = Callable[[Heads, int], Tensor]


def _folded(x: Tensor, window: int) -> Tensor:
    """[B, H, T, ..] -> [B, H, W, w, ..]"""
    return x.reshape(*x.shape[:2], -1, window, *x.shape[3:])


def _naive(heads: Heads, window: int) -> Tensor:
    q, k, v = (_folded(x, window) for x in heads)
    out: Tensor = ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).flatten(2, 3)
    return out


def _baddbmm(heads: Heads, window: int) -> Tensor:
    """The products as two calls of the BLAS over all windows, the scale within the first."""
    shape = heads[0].shape
    q, k, v = (_folded(x, window).flatten(0, 2) for x in heads)
    nothing = q.new_empty(1)
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v).view(shape)


def _sdpa(heads: Heads, window: int) -> Tensor:
    """Windows as a batch of their own for the library's fused attention."""
    batch, count, _, width = heads[0].shape
    q, k, v = (_folded(x, window).transpose(1, 2).flatten(0, 1) for x in heads)
    out = F.scaled_dot_product_attention(q, k, v).view(batch, -1, count, window, width)
    return out.transpose(1, 2).flatten(2, 3)


def _ours(heads: Heads, window: int) -> Tensor:
    out = window_attention(*heads, window)
    assert isinstance(out, Tensor)
    return out


def _naive_njx(heads: Heads, window: int, select: Tensor, gate: Tensor) -> Tensor:
    """The whole of njx_attention from a product, a softmax and a broadcast each."""
    out = _folded(_naive(heads, window), window)
    z = (_folded(select, window).softmax(-1).unsqueeze(-1) * out).sum(-2)
    e = (z @ z.transpose(-1, -2) * z.shape[-1] ** -0.5).softmax(-1) @ z
    result: Tensor = (out + gate[:, None, None, None] * e.unsqueeze(-2)).flatten(2, 3)
    return result


def _inputs(width: int, dtype: torch.dtype, device: torch.device) -> list[Heads]:
    """q, k and v as projections make them, as many as together exceed the caches."""
    shape = (_BATCH, _LENGTH, _HEADS, width)

    def heads(seed: int) -> Tensor:
        return values(shape, dtype, device, seed).transpose(1, 2)

    return [(heads(3 * i), heads(3 * i + 1), heads(3 * i + 2)) for i in range(3)]


class _Rotated:
    def __init__(self, call: Call, inputs: list[Heads], window: int, training: bool) -> None:
        self._call, self._inputs, self._window, self._training = call, inputs, window, training
        self._next = 0
        self._grad = values((_BATCH, _LENGTH, _HEADS, inputs[0][0].shape[-1]), inputs[0][0].dtype, inputs[0][0].device)

    def __call__(self) -> object:
        self._next = (self._next + 1) % len(self._inputs)
        tensors = self._inputs[self._next]
        if not self._training:
            return self._call(tensors, self._window)
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in tensors)
            out = self._call((q, k, v), self._window)
            return torch.autograd.grad(out, (q, k, v), self._grad.transpose(1, 2))


def _check(call: Call, width: int, window: int, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = (x[:1, :, : 3 * window + 1] for x in _inputs(width, dtype, device)[0])
    got = call((q, k, v), window)
    with use_backend("reference"):
        expected = call((q.double(), k.double(), v.double()), window)
    error = (got.double() - expected).abs().max().item()
    if not error <= 8 * torch.finfo(dtype).eps * expected.abs().max().item():
        raise RuntimeError(f"window_attention: an error of {error} against the reference")


def _row(window: int, width: int, dtype: torch.dtype, training: bool, njx: bool) -> Row:
    elements = _BATCH * _HEADS * _LENGTH * width
    select = values((_BATCH, _HEADS, _LENGTH), dtype, torch.device("cpu"), 7)
    gate = values((_HEADS,), dtype, torch.device("cpu"), 8)

    def our_njx(heads: Heads, window: int) -> Tensor:
        q = heads[0]
        return njx_attention(*heads, select[: q.shape[0], :, : q.shape[2]].to(q), window, gate=gate.to(q))

    def naive_njx(heads: Heads, window: int) -> Tensor:
        return _naive_njx(heads, window, select.to(heads[0]), gate.to(heads[0]))

    def variants(device: torch.device) -> dict[str, Callable[[], object]]:
        torch.compiler.reset()
        naive: Call = naive_njx if njx else _naive
        calls: dict[str, Call] = {"quaver": our_njx if njx else _ours, "naive": naive}
        if not njx:
            calls |= {"baddbmm": _baddbmm, "SDPA": _sdpa}
        calls["torch.compile"] = torch.compile(naive, dynamic=False)
        inputs = _inputs(width, dtype, device)
        return {name: _Rotated(call, inputs, window, training) for name, call in calls.items()}

    names = ("quaver", "naive", "torch.compile") if njx else ("quaver", "naive", "baddbmm", "SDPA", "torch.compile")
    kind = {torch.float32: "", torch.bfloat16: " bf16"}[dtype]
    return Row(
        ("njx" if njx else "window_attention") + (" fwd+bwd" if training else ""),
        f"{_BATCH}x{_HEADS}x{_LENGTH}, w {window} d {width}{kind}",
        names,
        variants,
        lambda device: _check(our_njx if njx else _ours, width, window, dtype, device),
        elements * (8 if training else 4) * dtype.itemsize,
        elements,
        quick=(window, width) == (32, 64) and dtype == torch.float32 and not training,
        slow=("torch.compile",),
    )


ROWS = [
    _row(window, width, dtype, training, njx)
    for dtype in (torch.float32, torch.bfloat16)
    for njx in (False, True)
    for training in (False, True)
    for window, width in _SIZES
]
