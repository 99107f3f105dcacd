"""perturbed_linear and its gradients in Triton: few rows make W' as W is read, many write it once for torch's GEMM."""

import torch
import triton
from torch import Tensor

from .._seeds import compute_dtype
from .._triton import launch
from ..perturb.triton_kernels import members_of, perturb_into, sigma_kind
from ..philox.triton_kernels import source_arguments
from . import tuning
from .triton_gradients import perturbed_linear_parameter_gradient
from .triton_launch import Bias, Place, Rows, shares, sigma_arguments, sum_parts
from .triton_products import NO_BIAS, product_kernel


def _fused(
    out: Tensor,
    x: Rows,
    samples: int,
    weight: Tensor,
    sigma: Tensor,
    bias: Bias,
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
    place = Place.of(rows, weight.dtype, distribution, offsets)
    row_tiles, column_tiles = place.row_tiles(rows, tile.rows), place.column_tiles(columns, tile.columns)
    tiles, steps = (column_tiles, row_tiles) if backward else (row_tiles, column_tiles)
    sets = triton.cdiv(members, 2) if members > 1 else members
    grid_sets, sequence = (1, sets) if summed else (sets, 1)
    blocks = triton.cdiv(samples, tile.samples)
    programs = grid_sets * blocks * place.classes * tiles
    splits, length = shares(steps * sequence, programs)
    parts = splits * place.classes if backward else splits
    source = source_arguments(seed, stream, domain)
    kept = 1 if summed else members
    to = out
    if parts > 1:
        to = torch.empty((parts, kept, samples, out.shape[-1]), dtype=compute_dtype(out.dtype), device=out.device)
    launch(
        product_kernel,
        (programs * splits,),
        *(to, *x, samples, weight, *weight.stride(), rows, columns, *sigma_arguments(sigma)),
        *(bias if parts == 1 else Bias())[:-1],
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
        sum_parts(out, to, (parts, kept, samples, out.shape[-1]), bias, source, distribution)


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
    rows, samples = Rows.of(x, member_inputs)
    lead = x.shape[1:-1] if member_inputs else x.shape[:-1]
    out = torch.empty((*seed.shape, *lead, weight.shape[0]), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    flat = out.view(members_of(seed), samples, weight.shape[0])
    if samples > tuning.triton_fused_rows(x.dtype) and weight.shape[1] > 0:
        _linear_of_many(flat, rows.tensor, weight, bias, sigma, bias_sigma, seed, place)
    else:
        of_bias = Bias.of(bias, bias_sigma, offsets[0])
        _fused(flat, rows, samples, weight, sigma, of_bias, seed, False, False, stream, domain, tuple(offsets))
    return out


def perturbed_linear_input_gradient(
    grad: Tensor, weight: Tensor, sigma: Tensor, seed: Tensor, member_inputs: bool, *place: int
) -> Tensor:
    """torch.ops.quaver.perturbed_linear_input_gradient in Triton."""
    stream, domain, *offsets = place
    rows, samples = Rows.of(grad, seed.dim() > 0)
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
    if samples <= tuning.triton_fused_rows(grad.dtype):
        _fused(flat, rows, samples, weight, sigma, Bias(), seed, summed, True, stream, domain, tuple(offsets))
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
