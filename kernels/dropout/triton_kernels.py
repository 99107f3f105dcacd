"""Dropout in Triton, and with the gradient in x's place its own backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from ..philox.triton_kernels import (
    CALL_VALUES,
    UNIFORM,
    noise,
    noise_options,
    scalar,
    scalar_words,
    source_arguments,
    tile_place,
    tiles_of,
    width_of,
)


@triton.jit(do_not_specialize=(*CALL_VALUES, "p_bits", "scale_low", "scale_high", "skip"))
def dropout_kernel(
    out,
    x,
    seeds,
    low: tl.int32,
    high: tl.int32,
    stream: tl.int32,
    domain: tl.int32,
    p_bits: tl.int32,
    scale_low: tl.int32,
    scale_high: tl.int32,
    group: tl.int64,
    skip: tl.int64,
    count: tl.int64,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """x scale where the uniform of an element exceeds p, else 0. p is a float32, scale of the compute type: as bits.

    The first element is number `skip` of group `group` of the stream, or 0 where it is ALIGNED."""
    # A zero that the compiler knows makes 128-bit loads.
    groups, column = tile_place(tl.program_id(0), 0, 0, group, 0 if ALIGNED else skip, WIDTH, GROUPS)
    inside = (column >= 0) & (column < count)
    value = tl.load(x + column, mask=inside)
    uniform = noise(groups, seeds, 0, low, high, stream, domain, KIND, WIDTH, GROUPS * WIDTH)
    compute: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    scaled = value.to(compute) * scalar(scale_low, scale_high, compute)
    kept = tl.where(uniform > p_bits.to(tl.float32, bitcast=True), scaled, 0.0)
    tl.store(out + column, kept.to(out.dtype.element_ty), mask=inside)


def dropout(x: Tensor, seed: Tensor, p: float, stream: int, offset: int = 0) -> Tensor:
    """torch.ops.quaver.dropout in Triton."""
    x = x.contiguous()
    out = torch.empty_like(x)
    count = x.numel()
    if count == 0:
        return out
    width = width_of(x.dtype)
    source = source_arguments(seed, stream, UNIFORM.value)
    p_bits, _ = scalar_words(p, torch.float32)
    scale = scalar_words(1 / (1 - p) if p < 1 else 0.0, x.dtype)
    group, skip = offset // width, offset % width
    grid = (tiles_of(count, skip == 0, width),)
    options = {"ALIGNED": skip == 0, **noise_options(UNIFORM.value, width, count)}
    launch(dropout_kernel, grid, out, x, *source, p_bits, *scale, group, skip, count, **options)
    return out


def report_launches() -> None:
    """Launches every variant that the resource report should know."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        dropout(torch.empty(4096, dtype=dtype), torch.tensor(1 << 40), 0.1, 0, 0)
