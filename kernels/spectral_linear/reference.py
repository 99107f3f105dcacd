"""A linear layer modulated by spectral coordinates in plain, differentiable PyTorch: what these ops mean.

R = factors * r stands for all columns of the factors side by side. Products are in x's dtype (spectral_delta: in the
factors'), coefficients and gain in the dtype that arithmetic runs in.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._seeds import compute_dtype


def spectral_coefficients(theta: Tensor, directions: Tensor) -> Tensor:
    """[.., 2n]: cosines, then sines, of the angles theta [.., C] . directions [n, C], float32 or float64."""
    angles = theta @ directions.t()
    return torch.cat((angles.cos(), angles.sin()), -1)


def _scaled_up(up: Tensor, coefficients: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gain_n c_bi up_i side by side: [B, N, R]."""
    scaled = coefficients[:, :, None, None] * up
    if gain is not None:
        scaled = scaled * gain.reshape(-1, 1)
    return scaled.transpose(1, 2).flatten(2).to(dtype)


def spectral_delta(down: Tensor, up: Tensor, coefficients: Tensor, gain: Tensor | None) -> Tensor:
    """[B, N, K]: gain * sum_i c_bi up_i down_i."""
    return _scaled_up(up, coefficients, gain, down.dtype) @ down.flatten(0, 1)


def _linear(x: Tensor, effective: Tensor, bias: Tensor | None) -> Tensor:
    out = x @ effective.transpose(1, 2)
    return out if bias is None else out + bias.to(x.dtype)


def delta_linear(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, gain: Tensor | None) -> Tensor:
    """x_b (weight + gain * delta_b)^T + bias, the sum of weights rounded once to x's dtype."""
    delta = delta.to(compute_dtype(x.dtype))
    if gain is not None:
        delta = delta * gain.reshape(-1, 1)
    return _linear(x, (weight + delta).to(x.dtype), bias)


def spectral_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    gain: Tensor | None,
    by_delta: bool,
) -> Tensor:
    """x W^T + b + gain * sum_i c_i (x down_i^T) up_i^T; coefficients [B, 2n], or [B, T, 2n] by tokens."""
    if by_delta:
        delta = _scaled_up(up, coefficients, gain, x.dtype) @ down.to(x.dtype).flatten(0, 1)
        return _linear(x, weight.to(x.dtype) + delta, bias)
    by_token = coefficients if coefficients.dim() == 3 else coefficients.unsqueeze(1)
    projected = x @ down.to(x.dtype).flatten(0, 1).t()
    scaled = (projected * by_token.repeat_interleave(down.shape[1], -1)).to(x.dtype)
    modulation = scaled @ up.to(x.dtype).transpose(1, 2).flatten(0, 1)
    if gain is not None:
        modulation = (gain * modulation).to(x.dtype)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)) + modulation
