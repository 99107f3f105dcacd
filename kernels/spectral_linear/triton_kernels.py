"""The ops of spectral_linear in Triton; schemas: schemas.py; kernels: triton_products.py and triton_gradients.py."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .._seeds import compute_dtype
from . import schemas, tuning
from .triton_factors import (
    Sums,
    combine,
    gradients_by_tokens,
    gradients_of_factors,
    project,
    sample_gradients,
    weight_gradient,
)
from .triton_gradients import angle_gradient_kernel, waves_kernel
from .triton_launch import Factors, Operand, Tokens, gain_arguments, multiply, run, sum_tokens
from .triton_products import delta_kernel, shifted_kernel


def _results(
    tensors: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Where gradients go, [0] where nobody asks for one; and those that are asked for, None where nobody does."""
    results = schemas.gradients(*zip(tensors, needed, strict=True))
    asked = [
        out if need and tensor is not None else None for out, need, tensor in zip(results, needed, tensors, strict=True)
    ]
    return results, asked


# ---- spectral_coefficients -----------------------------------------------------------------------------------------
def spectral_coefficients(theta: Tensor, directions: Tensor) -> Tensor:
    """torch.ops.quaver.spectral_coefficients in Triton."""
    angles, depth = directions.shape
    out = torch.empty((*theta.shape[:-1], 2 * angles), dtype=theta.dtype, device=theta.device)
    rows = theta.reshape(-1, depth) if depth else theta.new_empty((theta.shape[:-1].numel(), 0))
    tile = tuning.triton_wave_tile()
    arguments = (out, rows, *rows.stride(), directions, *directions.stride(), rows.shape[0], angles, depth)
    run(waves_kernel, tile.cover(rows.shape[0], angles), *arguments, **tile.options())
    return out


def spectral_coefficients_backward(
    grad: Tensor, coefficients: Tensor, theta: Tensor, directions: Tensor, need_theta: bool, need_directions: bool
) -> tuple[Tensor, Tensor]:
    """torch.ops.quaver.spectral_coefficients_backward in Triton."""
    (of_theta, of_directions), _ = _results((theta, directions), (need_theta, need_directions))
    angles, depth = directions.shape
    count = theta.shape[:-1].numel()
    of_angles = torch.empty((count, angles), dtype=theta.dtype, device=theta.device)
    if of_angles.numel() > 0:
        rows = grad.reshape(count, 2 * angles)
        block = min(tuning.TRITON_BLOCK, triton.next_power_of_2(angles))
        arguments = (of_angles, rows, *rows.stride(), coefficients.contiguous(), angles)
        run(angle_gradient_kernel, count * triton.cdiv(angles, block), *arguments, BLOCK=block)
    if need_theta:
        b = Operand(directions, 0, directions.stride(1), 0, directions.stride(0))
        multiply(of_theta.view(count, depth), Operand(of_angles, 0, angles, 0, 1), b, (1, count, depth, angles))
    if need_directions:
        rows = theta.reshape(count, depth)
        b = Operand(rows, 0, rows.stride(1), 0, rows.stride(0))
        multiply(of_directions, Operand(of_angles, 0, 1, 0, angles), b, (1, angles, depth, count))
    return of_theta, of_directions


# ---- spectral_linear -----------------------------------------------------------------------------------------------
def _make_delta(
    out: Tensor, of: Factors, up: Tensor, down: Tensor, coefficients: Tensor, weight: Tensor | None
) -> None:
    """out [B, N, K] = gain * up diag(c_b) down, and the weight."""
    members, tile = out.shape[0], tuning.triton_tile(of.dtype, of.outputs, of.inputs, out.shape[0])
    run(
        delta_kernel,
        members * tile.cover(of.outputs, of.inputs),
        *(out, up, down, coefficients, *of.gain_arguments(), weight),
        *(of.number, of.outputs, of.columns, of.inputs),
        **of.rank_option(),
        **tile.options(),
    )


def _by_samples(out: Tensor, x: Tensor, effective: Tensor, bias: Tensor | None, backward: bool) -> None:
    """out_b = x_b effective_b^T + bias, or with `backward` x_b effective_b."""
    members, outputs, inputs = effective.shape
    size, depth, strides = (inputs, outputs, (1, 0, inputs)) if backward else (outputs, inputs, (inputs, 0, 1))
    a = Operand(x, x.stride(0), x.stride(1), 0, x.stride(2))
    b = Operand(effective, outputs * inputs, *strides)
    multiply(out, a, b, (members, x.shape[1], size, depth), None, bias)


def _modulated_by_delta(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    of: Factors,
    coefficients: Tensor,
    kept: Tensor | None,
    backward: bool,
) -> None:
    """out_b = x_b (W + Delta_b)^T + bias, or x_b (W + Delta_b). Not kept, W + Delta has a buffer."""
    up, down = of.up_rows(with_gain=False), of.down_rows()
    size = max(1, of.outputs * of.inputs)
    chunk = max(1, x.shape[0] if kept is not None else tuning.TRITON_BUFFER // size)
    for first in range(0, x.shape[0], chunk):
        some = slice(first, min(x.shape[0], first + chunk))
        effective = kept
        if effective is None:
            shape = (some.stop - some.start, of.outputs, of.inputs)
            effective = torch.empty(shape, dtype=x.dtype, device=x.device)
        _make_delta(effective, of, up, down, coefficients[some], weight)
        _by_samples(out[some], x[some], effective, bias, backward)


def spectral_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    gain: Tensor | None,
    by_delta: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """torch.ops.quaver.spectral_linear in Triton."""
    of, coefficients = Factors(down, up, gain, x.dtype), coefficients.contiguous()
    batch, length, _ = x.shape
    out = torch.empty((batch, length, of.outputs), dtype=x.dtype, device=x.device)
    kept_shape = (batch, of.outputs, of.inputs) if by_delta else (batch, length, of.columns)
    kept = torch.empty(kept_shape if keep else 0, dtype=x.dtype, device=x.device)
    if by_delta:
        _modulated_by_delta(out, x, weight.contiguous(), bias, of, coefficients, kept if keep else None, False)
        return out, kept
    tokens = Tokens.of(x)
    scaled = torch.empty((batch * length, of.columns), dtype=x.dtype, device=x.device)
    project(kept if keep else None, scaled, tokens, of, of.down_rows(), coefficients)
    combine(out, scaled, of.up_rows(with_gain=True), tokens, weight.to(x.dtype), bias, False)
    return out, kept


def spectral_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    gain: Tensor | None,
    effective: Tensor | None,
    projected: Tensor | None,
    by_delta: bool,
    *needed: bool,
) -> tuple[Tensor, ...]:
    """torch.ops.quaver.spectral_linear_backward in Triton."""
    results, asked = _results((x, weight, bias, down, up, coefficients, gain), needed)
    of_x, of_weight, of_bias = asked[:3]
    to, of, coefficients = Sums(*asked[3:]), Factors(down, up, gain, x.dtype), coefficients.contiguous()
    grads, inputs = Tokens.of(grad.to(x.dtype)), Tokens.of(x)
    if of_bias is not None:
        sum_tokens(of_bias, grads)
    for_factors = any(out is not None for out in to)
    if by_delta and of_x is not None:
        if effective is not None:
            _by_samples(of_x, grads.tensor, effective.contiguous(), None, True)
        else:
            _modulated_by_delta(of_x, grads.tensor, weight.contiguous(), None, of, coefficients, None, True)
    if by_delta and for_factors:
        # The weight's gradient is the sum of those of samples that are made for the factors.
        of_delta = torch.empty((x.shape[0], of.outputs, of.inputs), dtype=x.dtype, device=x.device)
        sample_gradients(of_weight, of_delta, None, grads, inputs, None, None)
        gradients_of_factors(to, Tokens.of(of_delta), of, coefficients)
    elif of_weight is not None:
        weight_gradient(of_weight, grads, inputs)
    if not by_delta:
        gradients_by_tokens(of_x, to, grads, inputs, weight, of, coefficients, projected)
    return results


# ---- Delta that layers share ---------------------------------------------------------------------------------------
def spectral_delta(down: Tensor, up: Tensor, coefficients: Tensor, gain: Tensor | None) -> Tensor:
    """torch.ops.quaver.spectral_delta in Triton."""
    of = Factors(down, up, gain, down.dtype)
    out = torch.empty((coefficients.shape[0], of.outputs, of.inputs), dtype=down.dtype, device=down.device)
    _make_delta(out, of, of.up_rows(with_gain=False), of.down_rows(), coefficients.contiguous(), None)
    return out


def spectral_delta_backward(
    grad: Tensor, down: Tensor, up: Tensor, coefficients: Tensor, gain: Tensor | None, *needed: bool
) -> tuple[Tensor, ...]:
    """torch.ops.quaver.spectral_delta_backward in Triton."""
    results, asked = _results((down, up, coefficients, gain), needed)
    of = Factors(down, up, gain, down.dtype)
    gradients_of_factors(Sums(*asked), Tokens.of(grad.to(down.dtype)), of, coefficients.contiguous())
    return results


def _shifted(
    out: Tensor, x: Tensor, weight: Tensor, delta: Tensor, gain: Tensor | None, bias: Tensor | None, backward: bool
) -> None:
    """out_b = x_b (W + gain * delta_b)^T + bias, or with `backward` x_b (W + gain * delta_b)."""
    (members, length, depth), size = x.shape, out.shape[-1]
    order = (1, 0) if backward else (0, 1)
    wide = weight.dtype != x.dtype or delta.dtype != x.dtype
    tile = tuning.triton_shifted_tile(x.dtype, wide, length, size, members)
    run(
        shifted_kernel,
        members * tile.cover(length, size),
        *(out, *Tokens.of(x), weight, *(weight.stride(i) for i in order)),
        *(delta, delta.stride(0), *(delta.stride(1 + i) for i in order), *gain_arguments(gain), bias),
        *(length, size, depth),
        BACKWARD=backward,
        **tile.options(),
    )


def delta_linear(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, gain: Tensor | None) -> Tensor:
    """torch.ops.quaver.delta_linear in Triton."""
    out = torch.empty((*x.shape[:2], weight.shape[0]), dtype=x.dtype, device=x.device)
    _shifted(out, x, weight, delta, gain, bias, False)
    return out


def delta_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, gain: Tensor | None, *needed: bool
) -> tuple[Tensor, ...]:
    """torch.ops.quaver.delta_linear_backward in Triton."""
    results, asked = _results((x, weight, bias, delta, gain), needed)
    of_x, of_weight, of_bias, of_delta, of_gain = asked
    grads, inputs = Tokens.of(grad.to(x.dtype)), Tokens.of(x)
    if of_x is not None:
        _shifted(of_x, grads.tensor, weight, delta, gain, None, True)
    if of_bias is not None:
        sum_tokens(of_bias, grads)
    if of_delta is not None or of_gain is not None:
        sample_gradients(of_weight, of_delta, of_gain, grads, inputs, delta, gain)
    elif of_weight is not None:
        weight_gradient(of_weight, grads, inputs)
    return results


def report_launches() -> None:
    """Launches every variant that the resource report should know."""
    # float16's kernels are bfloat16's but for the letters in their instructions.
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        wide = compute_dtype(dtype)
        x, weight = torch.empty(8, 1024, 1024, dtype=dtype), torch.empty(1024, 1024, dtype=dtype)
        down, up = torch.empty(20, 16, 1024, dtype=dtype), torch.empty(20, 1024, 16, dtype=dtype)
        coefficients, gain = torch.empty(8, 20, dtype=wide), torch.empty(1024, dtype=wide)
        tensors = (x, weight, weight[0], down, up, coefficients, gain)
        for by_delta in (False, True):
            if dtype != torch.float64:
                spectral_linear(*tensors, by_delta, True)
            spectral_linear_backward(x, *tensors, None, None, by_delta, *[True] * 7)
        if dtype == torch.bfloat16:
            spectral_linear_backward(x, *tensors, None, None, True, False, True, *[False] * 5)
            spectral_delta(down, up, coefficients, gain)
        delta_linear(x, weight, weight[0], x, gain)
        delta_linear_backward(x, x, weight, weight[0], x, gain, *[True] * 5)
        if dtype.itemsize > 2:
            theta, directions = torch.empty(64, 16, dtype=dtype), torch.empty(20, 16, dtype=dtype)
            waves = spectral_coefficients(theta, directions)
            spectral_coefficients_backward(waves, waves, theta, directions, True, True)
    # Few rows; coefficients by tokens, whose rows are slices; small layers, with float32 weights.
    x, weight = torch.empty(4, 1024, 1024, dtype=torch.bfloat16), torch.empty(1024, 1024, dtype=torch.bfloat16)
    down, up = weight[:320].view(20, 16, 1024), torch.empty(20, 1024, 16, dtype=torch.bfloat16)
    by_sample, by_token = torch.empty(4, 20), torch.empty(4, 512, 20)
    spectral_linear(x[:, :1], weight, None, down, up, by_sample, None, False, False)
    sliced = x[:, :512]
    spectral_linear(sliced, weight, None, down, up, by_token, None, False, False)
    spectral_linear_backward(*(sliced, sliced, weight, None, down, up, by_token, None), None, None, False, *[True] * 7)
    delta_linear(x, weight.float(), None, x.float(), None)
    few, narrow, gain = x[:, :64, :256], torch.empty(256, 256), torch.empty(256)
    spectral_delta(down[..., :256], up[:, :256], by_sample, gain)
    delta_linear(few, narrow, None, torch.empty(4, 256, 256), gain)
    delta_linear_backward(few, few, narrow, None, torch.empty(4, 256, 256), gain, *[True] * 5)
