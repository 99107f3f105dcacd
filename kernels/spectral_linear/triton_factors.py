"""The gradients of spectral_linear's factors, coefficients and gain in Triton, by tokens and by Delta."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._seeds import compute_dtype
from . import tuning
from .triton_gradients import down_gradient_kernel, finish_up_kernel, sample_gradient_kernel, up_gradient_kernel
from .triton_launch import (
    Factors,
    Tokens,
    add_parts,
    gain_arguments,
    lengths,
    multiply,
    partial,
    product,
    run,
    shares,
    sum_terms,
    token_operands,
)
from .triton_products import combine_kernel, project_kernel, projected_gradient_kernel


class Sums(NamedTuple):
    """Where gradients of the factors, coefficients and gain go; None: not asked for."""

    down: Tensor | None
    up: Tensor | None
    coefficients: Tensor | None
    gain: Tensor | None


def _finish_up(to: Sums, sums: Tensor, of: Factors) -> None:
    """The gradients of up and of the gain from sums [splits, N, columns] of grad times what up multiplies."""
    rows, width = tuning.TRITON_SUM_TILE
    tiles = triton.cdiv(of.columns, width)
    of_gain = None
    if to.gain is not None:
        of_gain = torch.empty((tiles, of.outputs), dtype=to.gain.dtype, device=sums.device)
    run(
        finish_up_kernel,
        triton.cdiv(of.outputs, rows) * tiles,
        *(to.up, of_gain, sums, sums.shape[0], of.up, *of.up.stride(), *of.gain_arguments()),
        *(of.outputs, of.columns),
        **of.rank_option(),
        ROWS=rows,
        COLUMNS=width,
    )
    if to.gain is not None and of_gain is not None:
        _sum_gain(to.gain, of_gain)


def _sum_gain(out: Tensor, terms: Tensor) -> None:
    """The gradient of a gain, 0-dim or [N], from terms [parts, N]."""
    parts, outputs = terms.shape
    one = (outputs, 1) if out.dim() == 0 else (1, 0)
    sum_terms(out, terms, max(1, out.numel()), (0, 1), one, (parts, outputs))


def combine(
    out: Tensor, scaled: Tensor, factor: Tensor, x: Tokens, weight: Tensor, bias: Tensor | None, backward: bool
) -> None:
    """out = scaled up^T + x W^T + bias, or with `backward` scaled down + x W."""
    batch, length, depth = x.tensor.shape
    tokens, size, columns = batch * length, out.shape[-1], scaled.shape[-1]
    strides = (1, size) if backward else (columns, 1)
    of_weight = weight.stride()[::-1] if backward else weight.stride()
    tile = tuning.triton_tile(x.tensor.dtype, tokens, size, 1)
    run(
        combine_kernel,
        tile.cover(tokens, size),
        *(out, scaled, factor, *strides, columns, *x, lengths(x), weight, *of_weight, bias),
        *(tokens, size, depth),
        **tile.options(),
    )


def project(plain: Tensor | None, scaled: Tensor | None, x: Tokens, of: Factors, down: Tensor, c: Tensor) -> None:
    """x down^T, as it is and times the coefficients."""
    batch, length, _ = x.tensor.shape
    tile = tuning.triton_tile(of.dtype, batch * length, of.columns, 1)
    run(
        project_kernel,
        tile.cover(batch * length, of.columns),
        *(plain, scaled, *x, lengths(x), down, c, _shared(c, length), of.number),
        *(batch * length, of.columns, of.inputs),
        **of.rank_option(),
        **tile.options(),
    )


def _shared(coefficients: Tensor, length: int) -> int:
    """Rows of tokens that have the same coefficients."""
    return 1 if coefficients.dim() == 3 else max(1, length)


def gradients_by_tokens(
    of_x: Tensor | None,
    to: Sums,
    grad: Tokens,
    x: Tokens,
    weight: Tensor,
    of: Factors,
    coefficients: Tensor,
    projected: Tensor | None,
) -> None:
    batch, length, _ = x.tensor.shape
    tokens, device = batch * length, x.tensor.device
    for_up = to.up is not None or to.gain is not None
    through = of_x is not None or to.down is not None
    if not (for_up or through or to.coefficients is not None):
        return

    def made(needed: bool) -> Tensor | None:
        return torch.empty((batch, length, of.columns), dtype=of.dtype, device=device) if needed else None

    up, down = of.up_rows(with_gain=True), of.down_rows()
    plain = None if projected is None else projected.contiguous()
    if plain is None and (for_up or to.coefficients is not None):
        plain = made(True)
        project(plain, None, x, of, down, coefficients)
    scaled, gradient = made(for_up), made(through)
    width = triton.next_power_of_2(max(1, of.rank))
    tile = tuning.triton_projected_tile(of.dtype, tokens, of.number * width)
    width = min(width, tile.columns)
    pieces = max(1, triton.cdiv(of.rank, width))
    of_coefficients = to.coefficients
    if to.coefficients is not None and (pieces > 1 or to.coefficients.dim() == 2):
        of_coefficients = to.coefficients.new_empty((pieces, batch, length, of.number))
    run(
        projected_gradient_kernel,
        triton.cdiv(tokens, tile.rows) * triton.cdiv(of.number, tile.columns // width) * pieces,
        *(gradient, scaled, of_coefficients, *grad, lengths(grad), up, plain, coefficients),
        *(_shared(coefficients, length), of.number, tokens, of.columns, of.outputs, pieces),
        **of.rank_option(),
        WIDTH=width,
        **tile.options(),
    )
    if to.coefficients is not None and of_coefficients is not None and of_coefficients is not to.coefficients:
        rows = tokens * of.number
        if to.coefficients.dim() == 3:
            sum_terms(to.coefficients, of_coefficients, of.number, (of.number, 1), (1, 0), (pieces, rows))
        else:
            steps = (length * of.number, 1)
            sum_terms(to.coefficients, of_coefficients, of.number, steps, (length, of.number), (pieces, rows))
    if of_x is not None and gradient is not None:
        combine(of_x, gradient, down, grad, weight.to(of.dtype), None, True)
    if to.down is not None and gradient is not None:
        weight_gradient(to.down.view(of.columns, of.inputs), Tokens.of(gradient), x)
    if scaled is not None:
        _finish_up(to, product(*token_operands(grad, Tokens.of(scaled))), of)


def weight_gradient(out: Tensor, grad: Tokens, x: Tokens) -> None:
    """out = grad^T x over all tokens."""
    multiply(out, *token_operands(grad, x))


def gradients_of_factors(to: Sums, grad: Tokens, of: Factors, coefficients: Tensor) -> None:
    """The gradients of what Delta is made of, from that of Delta, [B, N, K]."""
    members, options = coefficients.shape[0], of.rank_option()
    wide, device = compute_dtype(of.dtype), of.up.device
    up = of.up_rows(with_gain=True)
    if to.up is not None or to.gain is not None or to.coefficients is not None:
        tile = tuning.triton_summed_tile(of.dtype)
        programs = tile.cover(of.outputs, of.columns)
        groups, together = shares(members, programs)
        for_up = to.up is not None or to.gain is not None
        sums = torch.empty((groups, of.outputs, of.columns), dtype=wide, device=device) if for_up else None
        row_tiles, terms = triton.cdiv(of.outputs, tile.rows), None
        if to.coefficients is not None:
            terms = torch.empty((row_tiles, members, of.columns), dtype=wide, device=device)
        run(
            up_gradient_kernel,
            programs * groups,
            *(sums, terms, *grad, of.down_rows(), up, coefficients),
            *(of.number, members, of.outputs, of.columns, of.inputs, together),
            **options,
            **tile.options(),
        )
        if sums is not None:
            _finish_up(to, sums, of)
        if to.coefficients is not None and terms is not None:
            steps, row = (of.columns, of.rank), members * of.columns
            sum_terms(to.coefficients, terms, of.number, steps, (of.rank, 1), (row_tiles, row))
    if to.down is not None:
        tile = tuning.triton_summed_tile(of.dtype)
        programs = tile.cover(of.columns, of.inputs)
        groups, together = shares(members, programs)
        out = to.down.view(of.columns, of.inputs)
        sums = partial(out, groups)
        run(
            down_gradient_kernel,
            programs * groups,
            *(sums, up, *grad, coefficients),
            *(of.number, members, of.outputs, of.columns, of.inputs, together),
            **options,
            **tile.options(),
        )
        add_parts(out, sums)


def sample_gradients(
    of_weight: Tensor | None,
    of_delta: Tensor | None,
    of_gain: Tensor | None,
    grad: Tokens,
    x: Tokens,
    delta: Tensor | None,
    gain: Tensor | None,
) -> None:
    """Of delta_linear, from the products grad_b^T x_b of samples."""
    (members, length, outputs), inputs = grad.tensor.shape, x.tensor.shape[2]
    tile = tuning.triton_summed_tile(x.tensor.dtype)
    programs = tile.cover(outputs, inputs)
    groups, together = shares(members, programs)
    weights = None if of_weight is None else partial(of_weight, groups)
    terms = None
    if of_gain is not None:
        shape = (groups * triton.cdiv(inputs, tile.columns), outputs)
        terms = torch.empty(shape, dtype=of_gain.dtype, device=x.tensor.device)
    strides = (0, 0, 0) if delta is None else delta.stride()
    run(
        sample_gradient_kernel,
        programs * groups,
        *(weights, of_delta, terms, *grad, *x, delta, *strides, *gain_arguments(gain)),
        *(length, members, outputs, inputs, together),
        **tile.options(),
    )
    if of_weight is not None and weights is not None:
        add_parts(of_weight, weights)
    if of_gain is not None and terms is not None:
        _sum_gain(of_gain, terms)
