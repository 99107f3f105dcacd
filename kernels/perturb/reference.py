"""Perturbed weights in plain, differentiable PyTorch: what the perturb ops mean."""

import torch
from torch import Tensor

from .._seeds import compute_dtype
from ..philox import reference as philox


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight: its first dimension by the rest; fewer than two dimensions are one row."""
    rows = shape[0] if len(shape) > 1 else 1
    columns = 1
    for size in shape[1:] if len(shape) > 1 else shape:
        columns *= size
    return rows, columns


def epsilon(
    shape: tuple[int, ...],
    seed: Tensor,
    stream: int,
    domain: int,
    row_offset: int,
    column_offset: int,
    row_length: int,
    device: torch.device,
) -> Tensor:
    """The noise of a block of weights as float32 [N, K], or [P, N, K] for seeds [P]."""
    rows, columns = matrix_shape(shape)
    row = torch.arange(row_offset, row_offset + rows, dtype=torch.int64, device=device)
    column = torch.arange(column_offset, column_offset + columns, dtype=torch.int64, device=device)
    element = row[:, None] * row_length + column
    return philox.noise(element, seed.reshape(-1, 1, 1) if seed.dim() == 1 else seed, stream, domain)


def perturb(
    weight: Tensor,
    sigma: Tensor,
    seed: Tensor,
    stream: int,
    domain: int,
    row_offset: int,
    column_offset: int,
    row_length: int,
) -> Tensor:
    """weight + sigma * epsilon in float32 (float64 for float64), rounded once to the weight's dtype.

    sigma is 0-dim or [1 or P, 1 or N, 1 or K], seed 0-dim or [P].
    """
    shape, population = tuple(weight.shape), tuple(seed.shape)
    noise = epsilon(shape, seed, stream, domain, row_offset, column_offset, row_length, weight.device)
    wide = weight.to(compute_dtype(weight.dtype)).reshape(matrix_shape(shape))
    scale = sigma.to(weight.device)
    if sigma.dim() == 3 and not population:
        scale = scale.squeeze(0)
    return (wide + scale * noise.to(wide.dtype)).to(weight.dtype).reshape(population + shape)


def perturbation_gradient(
    coefficients: Tensor,
    seeds: Tensor,
    shape: tuple[int, ...],
    stream: int,
    domain: int,
    row_offset: int,
    column_offset: int,
    row_length: int,
) -> Tensor:
    """sum_p c_p epsilon_p in the coefficients' dtype, added in order."""
    total = torch.zeros(matrix_shape(shape), dtype=coefficients.dtype, device=coefficients.device)
    for coefficient, seed in zip(coefficients.unbind(), seeds.unbind(), strict=True):
        noise = epsilon(shape, seed, stream, domain, row_offset, column_offset, row_length, coefficients.device)
        total = total + coefficient * noise.to(total.dtype)
    return total.reshape(shape)


def weight_scale(weight: Tensor) -> Tensor:
    """The unbiased standard deviation of all elements, in float32 or float64; 0 below two elements."""
    wide = weight.to(compute_dtype(weight.dtype))
    return wide.std() if weight.numel() > 1 else (wide * 0).sum()


def weight_scale_gradient(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """grad (w - mean) / ((n - 1) scale) in the scale's dtype; 0 where the scale is 0."""
    if weight.numel() < 2:
        return torch.zeros_like(weight, dtype=scale.dtype)
    wide = weight.to(scale.dtype)
    deviation = wide - wide.mean()
    return torch.where(scale == 0, 0.0, grad * deviation / ((weight.numel() - 1) * scale))
