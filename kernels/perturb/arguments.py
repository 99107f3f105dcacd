"""Checks of the perturb family's arguments, and their one form that the ops take."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._seeds import (
    Seed,
    check_floating,
    check_offset,
    check_seed,
    check_stream,
    compute_dtype,
    domain_of,
    scalar_tensor,
    seed_tensor,
)
from .reference import matrix_shape


class NoisePlace(NamedTuple):
    """Where a block of weights gets its noise from: the ops' last arguments, in order."""

    stream: int
    domain: int
    row_offset: int
    column_offset: int
    row_length: int


def noise_place(
    shape: tuple[int, ...],
    stream: int,
    distribution: str,
    row_offset: int,
    column_offset: int,
    row_length: int | None,
) -> NoisePlace:
    """The checked place of a block of `shape`; row_length None means that rows are whole."""
    check_stream(stream)
    domain = domain_of(distribution)
    check_offset("row_offset", row_offset)
    check_offset("column_offset", column_offset)
    _, columns = matrix_shape(shape)
    if row_length is None:
        if column_offset != 0:
            raise ValueError("row_length: must be given with a column_offset")
        row_length = columns
    check_offset("row_length", row_length)
    if row_length < column_offset + columns:
        raise ValueError(
            f"row_length: expected at least column_offset + columns = {column_offset + columns}, got {row_length}"
        )
    return NoisePlace(stream, domain, row_offset, column_offset, row_length)


def sigma_tensor(sigma: float | Tensor, weight: Tensor, name: str = "sigma") -> tuple[Tensor, int | None]:
    """sigma as a 0-dim or [1 or P, 1 or N, 1 or K] tensor of the weight's compute dtype, and its own P if any.

    `name` is what errors call it.
    """
    dtype = compute_dtype(weight.dtype)
    if not isinstance(sigma, Tensor):
        if not isinstance(sigma, (int, float, torch.SymFloat, torch.SymInt)) or isinstance(sigma, bool):
            raise TypeError(f"{name}: expected a float or a tensor, got {type(sigma).__name__}")
        return scalar_tensor(sigma, dtype), None
    check_floating(name, sigma)
    if sigma.device != weight.device and not (sigma.dim() == 0 and sigma.device.type == "cpu"):
        raise ValueError(f"{name}: expected a tensor on {weight.device}, got one on {sigma.device}")
    if sigma.dtype != dtype:
        sigma = sigma.to(dtype)
    if sigma.requires_grad and sigma.device != weight.device:
        # Its gradient is made where the weight is.
        sigma = sigma.to(weight.device)
    if sigma.dim() == 0:
        return sigma, None
    shape, full = tuple(sigma.shape), tuple(weight.shape)
    row = (*full[:1], *[1] * (len(full) - 1)) if len(full) > 1 else None
    rows, columns = matrix_shape(full)
    matrices = {full: (rows, columns)} if full else {}
    if row is not None:
        matrices.setdefault(row, (rows, 1))
    if shape in matrices:
        return sigma.reshape(1, *matrices[shape]), None
    # With a leading P; for a vector [N] one value a member is [P, 1], as [P] is its per-element form.
    matrices[(1,) if len(full) == 1 else ()] = (1, 1)
    if shape[1:] in matrices:
        return sigma.reshape(shape[0], *matrices[shape[1:]]), shape[0]
    raise ValueError(
        f"{name}: expected a float or a tensor of shape (), {' or '.join(map(str, matrices))}, with or without "
        f"a leading P, for a weight of shape {full}; got {shape}"
    )


def seeds_and_sigma(weight: Tensor, sigma: float | Tensor, seed: Seed) -> tuple[Tensor, Tensor]:
    """The checked seed, 0-dim or [P], and sigma, 0-dim or [1 or P, 1 or N, 1 or K]."""
    check_floating("weight", weight)
    check_seed(seed, weight.device)
    seeds = seed_tensor(seed)
    sigmas, members = sigma_tensor(sigma, weight)
    if members is not None:
        if seeds.dim() == 0:
            seeds = seeds.to(weight.device).expand(members)
        elif seeds.shape[0] != members:
            raise ValueError(f"sigma: expected a leading dimension of {seeds.shape[0]}, as seed has, got {members}")
    return seeds, sigmas
