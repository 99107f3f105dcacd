"""weight_scale and its gradient in Triton: the moments of blocks, then one program that combines them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._seeds import compute_dtype
from .._triton import launch
from . import tuning


@triton.jit
def moments_kernel(partial, weight, count: tl.int64, blocks: tl.int64, BLOCK: tl.constexpr):
    """partial [2, blocks]: the mean of a block, and the sum of squares about it."""
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    compute: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    value = tl.load(weight + index, mask=inside, other=0.0).to(compute)
    size = tl.minimum(count - block * BLOCK, BLOCK).to(tl.float64)
    middle = (tl.sum(value).to(tl.float64) / size).to(compute)
    deviation = tl.where(inside, value - middle, 0.0)
    # `middle` is rounded: the sum of what is left about it corrects both moments.
    error = tl.sum(deviation).to(tl.float64)
    tl.store(partial + block, middle.to(tl.float64) + error / size)
    tl.store(partial + blocks + block, tl.sum(deviation * deviation).to(tl.float64) - error * error / size)


@triton.jit(do_not_specialize=("count", "blocks"))
def combine_moments_kernel(
    out, partial, grad, scale, count: tl.int64, blocks: tl.int64, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """The moments of all blocks, each of SIZE elements but the last. out: the standard deviation; or, for a gradient,
    the mean and grad / ((count - 1) scale)."""
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, blocks, BLOCK):
        index = first + tl.arange(0, BLOCK)
        size = tl.minimum(count - index * SIZE, SIZE).to(tl.float64)
        total += size * tl.load(partial + index, mask=index < blocks, other=0.0)
    mean = tl.sum(total) / tl.maximum(count, 1).to(tl.float64)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, blocks, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < blocks
        size = tl.minimum(count - index * SIZE, SIZE).to(tl.float64)
        away = tl.load(partial + index, mask=inside, other=0.0) - mean
        squares = tl.load(partial + blocks + index, mask=inside, other=0.0)
        total += tl.where(inside, squares + size * away * away, 0.0)
    others = tl.maximum(count - 1, 1).to(tl.float64)
    if grad is None:
        tl.store(out, tl.sqrt(tl.sum(total) / others).to(out.dtype.element_ty))
    else:
        deviation = tl.load(scale).to(tl.float64)
        usable = (count > 1) & (deviation != 0)
        factor = tl.load(grad).to(tl.float64) / tl.where(usable, others * deviation, 1.0)
        tl.store(out, mean)
        tl.store(out + 1, tl.where(usable, factor, 0.0))


@triton.jit
def scale_about_kernel(out, weight, moments, count: tl.int64, BLOCK: tl.constexpr):
    """(weight - mean) factor, 0 where the factor is 0."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    compute: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    mean = tl.load(moments).to(compute)
    factor = tl.load(moments + 1).to(compute)
    value = tl.load(weight + index, mask=inside).to(compute)
    scaled = tl.where(factor == 0, 0.0, (value - mean) * factor)
    tl.store(out + index, scaled.to(out.dtype.element_ty), mask=inside)


def _combined_moments(weight: Tensor, out: Tensor, grad: Tensor | None, scale: Tensor | None) -> None:
    size = tuning.TRITON_SCALE_BLOCK
    count, blocks = weight.numel(), triton.cdiv(weight.numel(), size)
    partial = torch.empty((2, blocks), dtype=torch.float64, device=weight.device)
    if blocks:
        launch(moments_kernel, (blocks,), partial, weight, count, blocks, BLOCK=size)
    block = tuning.TRITON_SUM_BLOCK
    launch(combine_moments_kernel, (1,), out, partial, grad, scale, count, blocks, SIZE=size, BLOCK=block)


def weight_scale(weight: Tensor) -> Tensor:
    """torch.ops.quaver.weight_scale in Triton."""
    weight = weight.contiguous()
    out = torch.empty((), dtype=compute_dtype(weight.dtype), device=weight.device)
    _combined_moments(weight, out, None, None)
    return out


def weight_scale_gradient(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """torch.ops.quaver.weight_scale_gradient in Triton."""
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    if out.numel():
        moments = torch.empty(2, dtype=torch.float64, device=weight.device)
        _combined_moments(weight, moments, grad, scale)
        block = tuning.TRITON_SCALE_BLOCK
        grid = (triton.cdiv(out.numel(), block),)
        launch(scale_about_kernel, grid, out, weight, moments, out.numel(), BLOCK=block)
    return out
