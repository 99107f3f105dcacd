"""Dropout whose mask is made in the kernel, forward and backward, and never stored."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .._autograd import differentiable
from .._backends import choose, transformed
from .._seeds import Seed, check_floating, check_offset, check_seed, check_stream, seed_tensor
from . import reference
from .tuning import CUDA_ORDER


def _fake(x: Tensor, seed: Tensor, p: float, stream: int, offset: int = 0) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_ops.define(
    "dropout(Tensor x, Tensor seed, float p, int stream, SymInt offset=0) -> Tensor",
    _fake,
    "quaver.kernels.dropout.triton_kernels",
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, seed, ctx.p, ctx.stream, ctx.offset = inputs
    ctx.save_for_backward(seed)


def _differentiable(backend: str) -> Callable[..., Tensor]:
    # Linear and symmetric in x: dropout of the gradient, with the mask made again.
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (seed,) = ctx.saved_tensors
        return call(grad, seed, ctx.p, ctx.stream, ctx.offset), None, None, None, None

    call = differentiable(_ops.overload("dropout", backend), _save, backward)
    return call


_compiled = _differentiable("")
_calls = {"cpp": _compiled, "cuda": _compiled, "triton": _differentiable("triton")}


def validate(x: Tensor, p: float, seed: Seed, stream: int, offset: int) -> None:
    """Raise for arguments that dropout does not take."""
    check_floating("x", x)
    if not isinstance(p, (int, float, torch.SymFloat)) or isinstance(p, bool):
        raise TypeError(f"p: expected a float, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability in [0, 1], got {p}")
    check_seed(seed, x.device, population=False)
    check_stream(stream)
    check_offset("offset", offset)


def dropout(x: Tensor, p: float, seed: Seed, *, stream: int = 0, offset: int = 0) -> Tensor:
    """Zero each element of x with probability p and scale the others by 1 / (1 - p).

    Element e is kept where `philox_uniform(x.shape, seed, stream=stream, offset=offset)` exceeds p. The mask depends on
    nothing else and is made again in backward.

    Args:
        x: any shape and strides; float64, float32, bfloat16 or float16.
        p: probability of a zero, in [0, 1].
        seed: an int (taken modulo 2^64), or a 0-dim int64 tensor.
        stream: an independent stream, in [0, 2^32).
        offset: the number of the first element: rows k.. of a batch [B, D] have the mask of the whole with k D.

    Returns:
        x's shape and dtype, contiguous. Differentiable in x, any number of times.

    Raises:
        TypeError, ValueError: for arguments out of range, naming the argument.
    """
    validate(x, p, seed, stream, offset)
    seeds = seed_tensor(seed)
    backend = "reference" if transformed() else choose(x.device, CUDA_ORDER)
    if backend == "reference":
        return reference.dropout(x, seeds, float(p), stream, offset)
    return _calls[backend](x, seeds, float(p), stream, offset)
