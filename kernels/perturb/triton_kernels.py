"""The perturb family in Triton. A reduction has two stages: a program for each block of positions, then one for each
result, that adds in order what the first left."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._seeds import compute_dtype, signed
from .._triton import launch
from ..philox.triton_kernels import (
    CALL_VALUES,
    COUNTS,
    RADEMACHER,
    SourceArguments,
    noise,
    noise_options,
    scalar,
    scalar_words,
    source_arguments,
    tile_place,
    tiles_of,
    width_of,
)
from . import tuning
from .reference import matrix_shape

#: What sigma's values belong to.
MEMBER = tl.constexpr(0)
ROW = tl.constexpr(1)
ELEMENT = tl.constexpr(2)
#: What sum_members_kernel adds: coefficient times noise, gradient times noise, or gradients.
COEFFICIENTS = tl.constexpr(0)
PRODUCTS = tl.constexpr(1)
GRADIENTS = tl.constexpr(2)


@triton.jit(do_not_specialize=(*CALL_VALUES, "sigma_low", "sigma_high"), do_not_specialize_on_alignment=COUNTS)
def perturb_kernel(
    out,
    weight,
    sigmas,
    sigma_low: tl.int32,
    sigma_high: tl.int32,
    sigma_stride: tl.int64,
    seeds,
    low: tl.int32,
    high: tl.int32,
    stream: tl.int32,
    domain: tl.int32,
    group: tl.int64,
    skip: tl.int64,
    members: tl.int32,
    rows: tl.int32,
    columns: tl.int64,
    row_length: tl.int64,
    tiles: tl.int32,
    SIGMA: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out [members, rows, columns] = weight [rows, columns] + sigma epsilon. Programs of one tile follow each other, so
    that all members but the first find the weight in the cache."""
    member = (tl.program_id(0) % members).to(tl.int64)
    tile = tl.program_id(0) // members
    row = (tile // tiles % rows).to(tl.int64)
    groups, column = tile_place(tile % tiles, row, row_length, group, skip, WIDTH, GROUPS)
    inside = (column >= 0) & (column < columns)
    position = row * columns + column
    value = tl.load(weight + position, mask=inside)
    compute: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    if sigmas is None:
        sigma = scalar(sigma_low, sigma_high, compute)
    elif SIGMA == MEMBER:
        sigma = tl.load(sigmas + member * sigma_stride)
    elif SIGMA == ROW:
        sigma = tl.load(sigmas + member * sigma_stride + row)
    else:
        sigma = tl.load(sigmas + member * sigma_stride + position, mask=inside)
    epsilon = noise(groups, seeds, member, low, high, stream, domain, KIND, WIDTH, GROUPS * WIDTH)
    perturbed = value.to(compute) + sigma * epsilon.to(compute)
    tl.store(out + member * rows * columns + position, perturbed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=(*CALL_VALUES, "count"), do_not_specialize_on_alignment=COUNTS)
def sum_members_kernel(
    out,
    factors,
    factor_stride: tl.int64,
    count: tl.int64,
    seeds,
    low: tl.int32,
    high: tl.int32,
    stream: tl.int32,
    domain: tl.int32,
    group: tl.int64,
    skip: tl.int64,
    members: tl.int32,
    rows: tl.int32,
    columns: tl.int64,
    row_length: tl.int64,
    tiles: tl.int32,
    TERM: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out [members, rows, columns]: each the sum of `count` members' terms, added in order and rounded once."""
    result = (tl.program_id(0) % members).to(tl.int64)
    tile = tl.program_id(0) // members
    row = (tile // tiles % rows).to(tl.int64)
    groups, column = tile_place(tile % tiles, row, row_length, group, skip, WIDTH, GROUPS)
    inside = (column >= 0) & (column < columns)
    position = row * columns + column
    compute: tl.constexpr = tl.float64 if factors.dtype.element_ty == tl.float64 else tl.float32
    if TERM == COEFFICIENTS:
        # Zeros, by way of a load that never happens: its layout is that of the noise, which then needs no shared memory
        # in the loop (sm_90, normals: 459 instructions for 554).
        total = tl.load(out + position, mask=inside & (count < 0), other=0.0)
    else:
        total = tl.zeros([GROUPS * WIDTH], dtype=compute)
    for member in range(result * count, result * count + count):
        if TERM == COEFFICIENTS:
            term = tl.load(factors + member * factor_stride)
        else:
            term = tl.load(factors + member * factor_stride + position, mask=inside).to(compute)
        if TERM != GRADIENTS:
            term *= noise(groups, seeds, member, low, high, stream, domain, KIND, WIDTH, GROUPS * WIDTH).to(compute)
        total += term
    tl.store(out + result * rows * columns + position, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=(*CALL_VALUES, "length"), do_not_specialize_on_alignment=(*COUNTS, "blocks"))
def dot_with_noise_kernel(
    partial,
    grad,
    grad_stride: tl.int64,
    blocks: tl.int32,
    length: tl.int32,
    seeds,
    low: tl.int32,
    high: tl.int32,
    stream: tl.int32,
    domain: tl.int32,
    group: tl.int64,
    skip: tl.int64,
    members: tl.int32,
    rows: tl.int32,
    columns: tl.int64,
    row_length: tl.int64,
    tiles: tl.int32,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """partial [members, rows, blocks]: the sum of grad epsilon over `length` tiles of a row."""
    member = (tl.program_id(0) % members).to(tl.int64)
    block = tl.program_id(0) // members % blocks
    row = (tl.program_id(0) // members // blocks % rows).to(tl.int64)
    compute: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([GROUPS * WIDTH], dtype=compute)
    for tile in range(block * length, tl.minimum(block * length + length, tiles)):
        groups, column = tile_place(tile, row, row_length, group, skip, WIDTH, GROUPS)
        inside = (column >= 0) & (column < columns)
        position = member * grad_stride + row * columns + column
        value = tl.load(grad + position, mask=inside, other=0.0).to(compute)
        epsilon = noise(groups, seeds, member, low, high, stream, domain, KIND, WIDTH, GROUPS * WIDTH)
        total += value * epsilon.to(compute)
    tl.store(partial + (member * rows + row) * blocks + block, tl.sum(total))


@triton.jit(do_not_specialize=("count", "rows", "blocks"))
def sum_partials_kernel(out, partial, count: tl.int32, rows: tl.int32, blocks: tl.int32, BLOCK: tl.constexpr):
    """out [members, rows]: the sum of partial [members, count, rows, blocks], over counts and blocks, in float64."""
    member = (tl.program_id(0) // rows).to(tl.int64) * count
    row = tl.program_id(0) % rows
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, count * blocks, BLOCK):
        index = first + tl.arange(0, BLOCK)
        position = ((member + index // blocks) * rows + row) * blocks + index % blocks
        total += tl.load(partial + position, mask=index < count * blocks, other=0.0).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(total).to(out.dtype.element_ty))


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


class Place(NamedTuple):
    """Where a block of weights gets its noise from: the kernels' parameters from `group` to `tiles`."""

    group: int
    skip: int
    members: int
    rows: int
    columns: int
    row_length: int
    tiles: int


def place_of(shape: Sequence[int], members: int, by_row: bool, width: int, offsets: tuple[int, ...]) -> Place:
    """The place of `members` blocks of `shape`; offsets: row_offset, column_offset, row_length.

    Rows that follow each other without a gap are one, unless each has its own sigma."""
    (rows, columns), (row_offset, column_offset, row_length) = matrix_shape(tuple(shape)), offsets
    first = row_offset * row_length + column_offset
    if row_length == columns and not by_row:
        rows, columns, row_length = 1, rows * columns, 0
    aligned = first % width == 0 and (rows == 1 or row_length % width == 0)
    tiles = tiles_of(columns, aligned, width)
    return Place(signed(first // width), first % width, members, rows, columns, row_length, tiles)


def sigma_kind(sigma: Tensor, shape: Sequence[int]) -> Any:
    """What the values of a 0-dim or [1 or P, 1 or N, 1 or K] sigma belong to."""
    if sigma.dim() == 0 or tuple(sigma.shape[1:]) == (1, 1):
        return MEMBER
    return ELEMENT if tuple(sigma.shape[1:]) == matrix_shape(tuple(shape)) else ROW


def members_of(values: Tensor) -> int:
    return values.shape[0] if values.dim() else 1


def perturb_into(
    out: Tensor, weight: Tensor, sigma: Tensor, seed: Tensor, stream: int, domain: int, *offsets: int
) -> None:
    if out.numel() == 0:
        return
    width, kind = width_of(weight.dtype), sigma_kind(sigma, weight.shape)
    place = place_of(weight.shape, members_of(seed), kind is ROW, width, offsets)
    sigmas: tuple[Tensor | None, int, int, int]
    if sigma.dim() == 0 and sigma.device.type == "cpu":
        sigmas = (None, *scalar_words(sigma.item(), sigma.dtype), 0)
    else:
        sigma = sigma.contiguous()
        shared = sigma.dim() == 0 or sigma.shape[0] == 1
        sigmas = (sigma, 0, 0, 0 if shared else sigma[0].numel())
    source = source_arguments(seed, stream, domain)
    grid = (place.members * place.rows * place.tiles,)
    options = noise_options(domain & 255, width, place.columns)
    launch(perturb_kernel, grid, out, weight, *sigmas, *source, *place, SIGMA=kind.value, **options)


def perturb(weight: Tensor, sigma: Tensor, seed: Tensor, *place: int) -> Tensor:
    """torch.ops.quaver.perturb in Triton."""
    weight = weight.contiguous()
    out = torch.empty((*seed.shape, *weight.shape), dtype=weight.dtype, device=weight.device)
    perturb_into(out, weight, sigma, seed, *place)
    return out


def perturb_(weight: Tensor, sigma: Tensor, seed: Tensor, *place: int) -> None:
    """torch.ops.quaver.perturb_ in Triton."""
    dense = weight.contiguous()
    perturb_into(dense, dense, sigma, seed, *place)
    if dense is not weight:
        weight.copy_(dense)


def _sum_members(
    out: Tensor, factors: Tensor, stride: int, count: int, source: SourceArguments, place: Place, **options: Any
) -> None:
    if out.numel() == 0:
        return
    grid = (place.members * place.rows * place.tiles,)
    launch(sum_members_kernel, grid, out, factors, stride, count, *source, *place, **options)


def perturb_sigma_gradient(
    grad: Tensor, sigma: Tensor, seed: Tensor, stream: int, domain: int, *offsets: int
) -> Tensor:
    """torch.ops.quaver.perturb_sigma_gradient in Triton."""
    shape, members = grad.shape[seed.dim() :], members_of(seed)
    stride = 0
    if seed.dim() and members and grad.stride(0) == 0:
        grad = grad[0].contiguous()
    else:
        grad = grad.contiguous()
        stride = grad.numel() // members if members else 0
    out = torch.empty(sigma.shape, dtype=sigma.dtype, device=grad.device)
    results = members_of(sigma)
    count = members if results == 1 else 1
    kind, width = sigma_kind(sigma, shape), width_of(grad.dtype)
    source = source_arguments(seed, stream, domain)
    place = place_of(shape, results if kind is ELEMENT else members, kind is ROW, width, offsets)
    options = noise_options(domain & 255, width, place.columns)
    if kind is ELEMENT:
        _sum_members(out, grad, stride, count, source, place, TERM=PRODUCTS.value, **options)
    elif out.numel():
        sums = members * place.rows
        # Tiles of one program, so that there are about TRITON_PARTIALS programs in all.
        length = max(1, triton.cdiv(place.tiles * sums, tuning.TRITON_PARTIALS))
        blocks = max(1, triton.cdiv(place.tiles, length))
        rows, terms = (place.rows, blocks) if kind is ROW else (1, place.rows * blocks)
        partial = out if count * terms == 1 else torch.empty(sums * blocks, dtype=sigma.dtype, device=grad.device)
        if sums:
            grid = (sums * blocks,)
            launch(dot_with_noise_kernel, grid, partial, grad, stride, blocks, length, *source, *place, **options)
        if partial is not out:
            block = tuning.TRITON_SUM_BLOCK
            launch(sum_partials_kernel, (out.numel(),), out, partial, count, rows, terms, BLOCK=block)
    return out.to(sigma.device)


def perturb_weight_gradient(grad: Tensor) -> Tensor:
    """torch.ops.quaver.perturb_weight_gradient in Triton."""
    grad = grad.contiguous()
    out = torch.empty(grad.shape[1:], dtype=grad.dtype, device=grad.device)
    width = width_of(grad.dtype)
    place = place_of((out.numel(),), 1, False, width, (0, 0, out.numel()))
    source = SourceArguments(None, 0, 0, 0, 0)
    options = noise_options(0, width, place.columns)
    _sum_members(out, grad, out.numel(), grad.shape[0], source, place, TERM=GRADIENTS.value, **options)
    return out


def perturbation_gradient(
    coefficients: Tensor, seeds: Tensor, shape: Sequence[int], stream: int, domain: int, *offsets: int
) -> Tensor:
    """torch.ops.quaver.perturbation_gradient in Triton."""
    coefficients = coefficients.contiguous()
    out = torch.empty(shape, dtype=coefficients.dtype, device=coefficients.device)
    distribution = domain & 255
    width = tuning.TRITON_SIGNS if distribution == RADEMACHER.value else width_of(out.dtype)
    place = place_of(shape, 1, False, width, offsets)
    source = source_arguments(seeds, stream, domain)
    options = noise_options(distribution, width, place.columns)
    _sum_members(out, coefficients, 1, seeds.shape[0], source, place, TERM=COEFFICIENTS.value, **options)
    return out


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


def report_launches() -> None:
    """Launches every variant that the resource report should know."""
    seed, seeds = torch.tensor(1 << 40), torch.zeros(2, dtype=torch.int64)
    place = (0, 0, 0, 0, 1024)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        compute = compute_dtype(dtype)
        weight = torch.empty(64, 1024, dtype=dtype)
        sigma = torch.tensor(0.1, dtype=compute)
        perturb(weight, sigma, seed, *place)
        perturb_sigma_gradient(weight, sigma, seed, *place)
        perturb_weight_gradient(weight.expand(2, 64, 1024))
        weight_scale(weight)
        weight_scale_gradient(sigma, weight, sigma)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.empty(64, 1024, dtype=dtype)
        for values in ((64, 1), (64, 1024)):
            sigmas = torch.empty(2, *values)
            perturb(weight, sigmas, seeds, *place)
            perturb_sigma_gradient(weight.expand(2, 64, 1024), sigmas, seeds, *place)
        perturb(weight, sigma.float(), seed, 0, 1, 0, 0, 1024)
        # A shard: columns 1024 .. 2047 of 4096.
        perturb(weight, sigma.float(), seed, 0, 0, 0, 1024, 4096)
    # Narrow rows.
    perturb(torch.empty(64, 64), torch.empty(1, 64, 1), seed, 0, 0, 0, 0, 64)
    for domain in (0, 1):
        perturbation_gradient(torch.empty(2), seeds, (64, 1024), 0, domain, 0, 0, 1024)
