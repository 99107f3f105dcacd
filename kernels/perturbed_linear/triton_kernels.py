"""perturbed_linear and its gradients in Triton: few rows make W' as W is read, many write it once for torch's GEMM."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._seeds import compute_dtype, signed
from .._triton import launch
from ..perturb.triton_kernels import (
    ELEMENT,
    ROW,
    members_of,
    perturb_into,
    perturb_sigma_gradient,
    sigma_kind,
    sum_partials_kernel,
)
from ..perturb.tuning import TRITON_SUM_BLOCK
from ..philox.triton_kernels import scalar_words, source_arguments
from . import tuning
from .triton_gradients import NONE, sum_rows_kernel, weight_gradient_kernel
from .triton_products import NO_BIAS, NOISY, PLAIN, product_kernel, sum_parts_kernel


class _Rows(NamedTuple):
    """The samples of x or of a gradient as the kernels take them: tensor, strides of members, samples and columns."""

    tensor: Tensor
    member: int
    row: int
    column: int

    @staticmethod
    def of(x: Tensor, of_members: bool) -> tuple["_Rows", int]:
        """Those of x [.., K], or of members' [P, .., K]; and their number. Copied where strides can't tell them."""
        lead = x.shape[1:-1] if of_members else x.shape[:-1]
        samples = torch.Size(lead).numel()
        x = x.reshape(x.shape[0] if of_members else 1, samples, x.shape[-1])
        return _Rows(x, x.stride(0) if of_members else 0, x.stride(1), x.stride(2)), samples


class _Place(NamedTuple):
    """Where W gets its noise from, and how its tiles are cut."""

    group: int
    skip: int
    row_length: int
    width: int
    classes: int

    @staticmethod
    def of(rows: int, dtype: torch.dtype, distribution: int, offsets: tuple[int, ...]) -> "_Place":
        """offsets: row_offset, column_offset, row_length; dtype: of the weight."""
        row_offset, column_offset, row_length = offsets
        widths = tuning.triton_widths(dtype, distribution)
        width = next((size for size in widths if row_length % size == 0), 4)
        first = row_offset * row_length + column_offset
        # The rows that start at the same place in a group follow each other at this distance.
        classes = width // math.gcd(width, row_length)
        return _Place(signed(first // width), first % width, row_length, width, max(1, min(classes, rows)))

    def column_tiles(self, columns: int, size: int) -> int:
        """Tiles of `size` columns that cover a row; a row that may start inside a group has one group more."""
        aligned = self.skip == 0 and self.classes == 1
        return int(triton.cdiv(columns + (0 if aligned else self.width - 1), size))

    def row_tiles(self, rows: int, size: int) -> int:
        """Tiles of `size` rows that cover the rows of a class."""
        return int(triton.cdiv(triton.cdiv(rows, self.classes), size))

    def even(self, rows: int, columns: int, tile: tuple[int, int]) -> bool:
        """Whether tiles cover W and nothing else."""
        return self.skip == 0 and self.classes == 1 and rows % tile[0] == 0 and columns % tile[1] == 0


def _shares(steps: int, programs: int) -> tuple[int, int]:
    """How many programs share the steps of a sum, and how many each has, where there are `programs` without that."""
    wanted = max(1, min(steps, tuning.TRITON_PROGRAMS // max(1, programs)))
    length = max(1, triton.cdiv(steps, wanted))
    return max(1, triton.cdiv(steps, length)), length


def _sigma_arguments(sigma: Tensor) -> tuple[Tensor | None, int, int, int]:
    """The kernels' sigmas, sigma_low, sigma_high and sigma_stride."""
    if sigma.dim() == 0 and sigma.device.type == "cpu":
        return None, *scalar_words(sigma.item(), sigma.dtype), 0
    sigma = sigma.contiguous()
    return sigma, 0, 0, 0 if sigma.dim() == 0 or sigma.shape[0] == 1 else sigma[0].numel()


class _Bias(NamedTuple):
    """The kernels' parameters from bias to row_offset, and their constexpr BIAS."""

    bias: Tensor | None = None
    sigmas: Tensor | None = None
    low: int = 0
    high: int = 0
    stride: int = 0
    step: int = 0
    row_offset: int = 0
    kind: int = NO_BIAS.value

    @staticmethod
    def of(bias: Tensor | None, sigma: Tensor | None, row_offset: int) -> "_Bias":
        if bias is None:
            return _Bias()
        if sigma is None:
            return _Bias(bias.contiguous(), kind=PLAIN.value)
        step = int(sigma.dim() > 0 and sigma.shape[-1] > 1)
        return _Bias(bias.contiguous(), *_sigma_arguments(sigma), step, signed(row_offset), NOISY.value)


def _sum_parts(
    out: Tensor, partial: Tensor, shape: tuple[int, int, int, int], bias: _Bias, source: Any, distribution: int
) -> None:
    """out: the sum of partial; shape: parts, members, samples, size."""
    parts, members, samples, size = shape
    block, columns = tuning.TRITON_SUM_TILE
    blocks = triton.cdiv(samples, block)
    grid = (members * blocks * triton.cdiv(size, columns),)
    constants = {"BIAS": bias.kind, "KIND": distribution, "BLOCK": block, "COLUMNS": columns}
    launch(
        sum_parts_kernel, grid, out, partial, parts, samples, size, *bias[:-1], *source, members, blocks, **constants
    )


def _fused(
    out: Tensor,
    x: _Rows,
    samples: int,
    weight: Tensor,
    sigma: Tensor,
    bias: _Bias,
    seed: Tensor,
    summed: bool,
    backward: bool,
    stream: int,
    domain: int,
    offsets: tuple[int, ...],
) -> None:
    """x W'^T and the bias, or with `backward` x W', into out [members, samples, rows or columns], or one sum of all."""
    (rows, columns), distribution, members = weight.shape, domain & 255, members_of(seed)
    tile = tuning.triton_tile(x.tensor.dtype, distribution, samples, backward, members > 1)
    place = _Place.of(rows, weight.dtype, distribution, offsets)
    row_tiles, column_tiles = place.row_tiles(rows, tile.rows), place.column_tiles(columns, tile.columns)
    tiles, steps = (column_tiles, row_tiles) if backward else (row_tiles, column_tiles)
    sets = triton.cdiv(members, 2) if members > 1 else members
    grid_sets, sequence = (1, sets) if summed else (sets, 1)
    blocks = triton.cdiv(samples, tile.samples)
    programs = grid_sets * blocks * place.classes * tiles
    splits, length = _shares(steps * sequence, programs)
    parts = splits * place.classes if backward else splits
    source = source_arguments(seed, stream, domain)
    kept = 1 if summed else members
    to = out
    if parts > 1:
        to = torch.empty((parts, kept, samples, out.shape[-1]), dtype=compute_dtype(out.dtype), device=out.device)
    launch(
        product_kernel,
        (programs * splits,),
        *(to, *x, samples, weight, *weight.stride(), rows, columns, *_sigma_arguments(sigma)),
        *(bias if parts == 1 else _Bias())[:-1],
        *(*source, place.group, place.skip, place.row_length, members),
        *(grid_sets, sequence, place.classes, tiles, blocks, steps, length),
        BACKWARD=backward,
        PAIRED=members > 1,
        SUMMED=summed,
        EVEN=place.even(rows, columns, (tile.rows, tile.columns)),
        BIAS=bias.kind if parts == 1 else NO_BIAS.value,
        SIGMA=sigma_kind(sigma, weight.shape).value,
        KIND=distribution,
        WIDTH=place.width,
        BLOCK=tile.samples,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if parts > 1:
        _sum_parts(out, to, (parts, kept, samples, out.shape[-1]), bias, source, distribution)


def _chunks(members: int, weight: Tensor) -> list[slice]:
    """The members whose W' are made at a time, so that these fit into the transient buffer."""
    size = max(1, tuning.TRITON_BUFFER // max(1, weight.numel()))
    return [slice(first, min(members, first + size)) for first in range(0, members, size)]


def _member_sigma(sigma: Tensor, chunk: slice) -> Tensor:
    return sigma if sigma.dim() == 0 or sigma.shape[0] == 1 else sigma[chunk]


def _stored(weight: Tensor, sigma: Tensor, seed: Tensor, dtype: torch.dtype, place: tuple[int, ...]) -> Tensor:
    """W' in a transient buffer: [*seed.shape, *weight.shape]."""
    out = torch.empty((*seed.shape, *weight.shape), dtype=dtype, device=weight.device)
    perturb_into(out, weight.contiguous(), sigma, seed, *place)
    return out


def _multiply(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
    """out [P, M, N]: left [P, M, K] times right [P, K, N], and the bias [P, 1, N], by torch's GEMM."""
    if out.shape[0] > 1:
        if bias is None:
            torch.bmm(left, right, out=out)
        else:
            torch.baddbmm(bias, left, right, out=out)
    elif bias is None:
        out[0].addmm_(left[0], right[0], beta=0)
    else:
        torch.addmm(bias[0, 0], left[0], right[0], out=out[0])


def _linear_of_many(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    bias_sigma: Tensor | None,
    seed: Tensor,
    place: tuple[int, ...],
) -> None:
    """out [P, M, N] of x [P or 1, M, K]: W' is written once, and read by torch's GEMM."""
    stream, domain, row_offset = place[:3]
    seeds = seed.reshape(-1)
    of_bias = None
    if bias is not None and bias_sigma is not None:
        bias_place = (stream, domain + 256, 0, row_offset, row_offset + bias.shape[0])
        of_bias = _stored(bias, bias_sigma, seed, out.dtype, bias_place).reshape(-1, 1, bias.shape[0])
    elif bias is not None:
        of_bias = bias.to(out.dtype).expand(seeds.shape[0], 1, -1)
    for chunk in _chunks(seeds.shape[0], weight):
        some = seed if seed.dim() == 0 else seed[chunk]
        weights = _stored(weight, _member_sigma(sigma, chunk), some, out.dtype, place).reshape(-1, *weight.shape)
        inputs = x[chunk] if x.shape[0] > 1 else x.expand(weights.shape[0], -1, -1)
        _multiply(out[chunk], inputs, weights.transpose(1, 2), None if of_bias is None else of_bias[chunk])


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    bias_sigma: Tensor | None,
    seed: Tensor,
    member_inputs: bool,
    *place: int,
) -> Tensor:
    """torch.ops.quaver.perturbed_linear in Triton."""
    stream, domain, *offsets = place
    rows, samples = _Rows.of(x, member_inputs)
    lead = x.shape[1:-1] if member_inputs else x.shape[:-1]
    out = torch.empty((*seed.shape, *lead, weight.shape[0]), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    flat = out.view(members_of(seed), samples, weight.shape[0])
    if samples > tuning.triton_fused_rows(x.dtype, domain & 255) and weight.shape[1] > 0:
        _linear_of_many(flat, rows.tensor, weight, bias, sigma, bias_sigma, seed, place)
    else:
        of_bias = _Bias.of(bias, bias_sigma, offsets[0])
        _fused(flat, rows, samples, weight, sigma, of_bias, seed, False, False, stream, domain, tuple(offsets))
    return out


def perturbed_linear_input_gradient(
    grad: Tensor, weight: Tensor, sigma: Tensor, seed: Tensor, member_inputs: bool, *place: int
) -> Tensor:
    """torch.ops.quaver.perturbed_linear_input_gradient in Triton."""
    stream, domain, *offsets = place
    rows, samples = _Rows.of(grad, seed.dim() > 0)
    lead = grad.shape[seed.dim() : -1]
    members, summed = members_of(seed), seed.dim() > 0 and not member_inputs
    out = torch.empty(
        (*(seed.shape if member_inputs else ()), *lead, weight.shape[1]), dtype=grad.dtype, device=grad.device
    )
    if out.numel() == 0:
        return out
    if members == 0 or weight.shape[0] == 0:
        return out.zero_()
    flat = out.view(1 if summed else members, samples, weight.shape[1])
    if samples <= tuning.triton_fused_rows(grad.dtype, domain & 255):
        _fused(flat, rows, samples, weight, sigma, _Bias(), seed, summed, True, stream, domain, tuple(offsets))
        return out
    for chunk in _chunks(members, weight):
        some = seed if seed.dim() == 0 else seed[chunk]
        weights = _stored(weight, _member_sigma(sigma, chunk), some, grad.dtype, place).reshape(-1, *weight.shape)
        grads = rows.tensor[chunk]
        if not summed:
            _multiply(flat[chunk], grads, weights, None)
            continue
        # One product adds up the members: their gradients beside each other, their W' below each other.
        beside, below = grads.transpose(0, 1).flatten(1), weights.flatten(0, 1)
        flat[0].addmm_(beside, below, beta=int(chunk.start > 0))
    return out


def _weight_gradients(
    of_weight: Tensor | None,
    of_sigma: Tensor | None,
    grad: _Rows,
    x: _Rows,
    samples: int,
    shape: tuple[int, int],
    seed: Tensor,
    stream: int,
    domain: int,
    offsets: tuple[int, ...],
) -> None:
    (rows, columns), members, device = shape, members_of(seed), x.tensor.device
    kind, shared, distribution = NONE, False, domain & 255
    place = _Place(0, 0, columns, 4, 1)
    if of_sigma is not None:
        kind, shared = sigma_kind(of_sigma, shape), members_of(of_sigma) == 1
        place = _Place.of(rows, x.tensor.dtype, distribution, offsets)
    tile = tuning.triton_gradient_tile(x.tensor.dtype, of_sigma is not None)
    row_tiles, column_tiles = place.row_tiles(rows, tile.rows), place.column_tiles(columns, tile.columns)
    programs = row_tiles * column_tiles * place.classes
    sets, together = _shares(members, programs)
    # The samples of a member are cut only where nothing else makes enough programs, and its gradients add up later.
    apart = kind is ELEMENT and not shared
    blocks, steps = (
        (1, triton.cdiv(samples, tile.samples))
        if apart
        else _shares(triton.cdiv(samples, tile.samples), programs * sets)
    )
    parts = sets * blocks
    wide = compute_dtype(x.tensor.dtype)

    def partial(out: Tensor | None, shape: tuple[int, ...], needed: bool) -> Tensor | None:
        return torch.empty(shape, dtype=wide, device=device) if out is not None and needed else out

    weight_to = partial(of_weight, (parts, rows, columns), parts > 1)
    if kind is ELEMENT:
        sigma_to = partial(of_sigma, (parts, rows, columns), shared and parts > 1)
    else:
        values, terms = (rows, column_tiles * blocks) if kind is ROW else (1, programs * blocks)
        sigma_to = partial(of_sigma, (members, values, terms), True)
    source = source_arguments(seed, stream, domain)
    launch(
        weight_gradient_kernel,
        (programs * parts,),
        *(weight_to, sigma_to, *grad, *x, samples, rows, columns, *source),
        *(place.group, place.skip, place.row_length, members, together),
        *(place.classes, row_tiles, column_tiles, blocks, steps * tile.samples),
        SIGMA=kind.value,
        SHARED=shared,
        EVEN=place.even(rows, columns, (tile.rows, tile.columns)),
        KIND=distribution,
        WIDTH=place.width,
        BLOCK=tile.samples,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    for out, made in ((of_weight, weight_to), (of_sigma if kind is ELEMENT else None, sigma_to)):
        if out is not None and made is not None and made is not out:
            _sum_parts(out, made, (parts, 1, rows, columns), _Bias(), source, distribution)
    if of_sigma is not None and sigma_to is not None and kind is not ELEMENT:
        count = members if shared else 1
        launch(
            sum_partials_kernel, (of_sigma.numel(),), of_sigma, sigma_to, count, values, terms, BLOCK=TRITON_SUM_BLOCK
        )


def _sum_rows(grad: _Rows, samples: int, members: int, size: int) -> Tensor:
    """The sums over samples, [members, size], in float32 or float64."""
    block, columns = tuning.TRITON_SUM_TILE
    tiles, dtype, device = triton.cdiv(size, columns), compute_dtype(grad.tensor.dtype), grad.tensor.device
    blocks, length = _shares(triton.cdiv(samples, block), members * tiles)
    out = torch.empty((members, size), dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    partial = out if blocks == 1 else torch.empty((members, blocks, size), dtype=dtype, device=device)
    grid, constants = (members * blocks * tiles,), {"BLOCK": block, "COLUMNS": columns}
    launch(sum_rows_kernel, grid, partial, *grad, samples, size, blocks, tiles, length * block, **constants)
    if blocks > 1:
        launch(sum_partials_kernel, (out.numel(),), out, partial, blocks, size, 1, BLOCK=TRITON_SUM_BLOCK)
    return out


def perturbed_linear_parameter_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    bias_sigma: Tensor | None,
    seed: Tensor,
    need_weight: bool,
    need_sigma: bool,
    need_bias: bool,
    need_bias_sigma: bool,
    member_inputs: bool,
    *place: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.quaver.perturbed_linear_parameter_gradient in Triton."""
    stream, domain, *offsets = place
    shape = weight.shape[0], weight.shape[1]
    grads, samples = _Rows.of(grad, seed.dim() > 0)
    inputs, _ = _Rows.of(x, member_inputs)

    def result(like: Tensor | None, needed: bool) -> Tensor | None:
        return torch.empty(like.shape, dtype=like.dtype, device=x.device) if needed and like is not None else None

    of_weight, of_sigma = result(weight, need_weight), result(sigma, need_sigma)
    if need_weight or need_sigma:
        _weight_gradients(of_weight, of_sigma, grads, inputs, samples, shape, seed, stream, domain, tuple(offsets))
    of_bias, of_bias_sigma = result(bias, need_bias), None
    if need_bias or need_bias_sigma:
        members = members_of(seed)
        sums = _sum_rows(grads, samples, members, shape[0])
        if of_bias is not None:
            _sum_parts(of_bias, sums, (members, 1, 1, shape[0]), _Bias(), source_arguments(seed, 0, 0), 0)
        if need_bias_sigma and bias_sigma is not None:
            bias_place = (stream, domain + 256, 0, offsets[0], offsets[0] + shape[0])
            of_bias_sigma = perturb_sigma_gradient(sums.reshape(*seed.shape, shape[0]), bias_sigma, seed, *bias_place)
    nothing = [torch.empty(0, dtype=like.dtype, device=x.device) for like in (weight, sigma, weight, sigma)]
    made = (of_weight, of_sigma, of_bias, of_bias_sigma)
    first, second, third, fourth = (a if a is not None else b for a, b in zip(made, nothing, strict=True))
    return first, second, third, fourth


def report_launches() -> None:
    """Launches every variant that the resource report should know."""
    seed, seeds, whole = torch.tensor(1 << 40), torch.zeros(4, dtype=torch.int64), (0, 0, 0, 0, 1024)
    of_all, of_weight, of_sigma = (True,) * 4, (True, False, False, False), (False, True, False, False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        sigma, weight = torch.tensor(0.1, dtype=compute_dtype(dtype)), torch.empty(1024, 1024, dtype=dtype)
        x, bias = torch.empty(16, 1024, dtype=dtype), torch.empty(1024, dtype=dtype)
        perturbed_linear(x, weight, bias, sigma, sigma, seed, False, *whole)
        perturbed_linear_input_gradient(x, weight, sigma, seed, False, *whole)
        for needed in (of_all, of_weight):
            perturbed_linear_parameter_gradient(x, x, weight, bias, sigma, sigma, seed, *needed, False, *whole)
    x, weight = torch.empty(64, 1024, dtype=torch.bfloat16), torch.empty(1024, 1024, dtype=torch.bfloat16)
    signs, sigma = (0, 1, 0, 0, 1024), torch.tensor(0.1)
    for samples in (1, 64):
        perturbed_linear(x[:samples], weight, None, sigma, None, seed, False, *whole)
    perturbed_linear(x, weight, None, sigma, None, seed, False, *signs)
    perturbed_linear_input_gradient(x, weight, sigma, seed, False, *signs)
    # float32 weights beside 16-bit inputs, with each form of sigma.
    wide = weight.float()
    for shape in ((1024, 1), (1024, 1024)):
        sigmas = torch.empty(1, *shape)
        perturbed_linear(x[:16], wide, None, sigmas, None, seed, False, *whole)
        perturbed_linear_parameter_gradient(x[:16], x[:16], wide, None, sigmas, None, seed, *of_sigma, False, *whole)
    # Populations, in pairs, whose members share x, or have an input and a sigma each.
    inputs, sigmas = torch.empty(4, 16, 1024, dtype=torch.bfloat16), torch.empty(4, 1024, 1024)
    for place in (whole, signs):
        perturbed_linear(x[:16], weight, None, sigma, None, seeds, False, *place)
    perturbed_linear(inputs, weight, None, sigmas, None, seeds, True, *whole)
    perturbed_linear_input_gradient(inputs, weight, sigma, seeds, False, *whole)
    perturbed_linear_input_gradient(inputs, weight, sigma, seeds, True, *whole)
    # Rows that start inside groups.
    narrow, shard = weight[:, :1000], (0, 0, 3, 1, 4097)
    perturbed_linear(x[:16, :1000], narrow, None, sigma, None, seed, False, *shard)
    perturbed_linear_input_gradient(x[:16], narrow, sigma, seed, False, *shard)
    perturbed_linear_parameter_gradient(
        x[:16], x[:16, :1000], narrow, None, sigma, None, seed, *of_sigma, False, *shard
    )
