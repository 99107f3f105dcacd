"""Choices of perturbed_linear. Those of the CPU are constants of csrc/cpu/gemm.h: the README has the table.

Those of Triton are modelled, not measured."""

from typing import NamedTuple

import torch

#: The order of backends on a GPU.
CUDA_ORDER: tuple[str, ...] = ("triton",)
#: The backends without a kernel, and why.
MISSING = {
    "cuda": "perturbed_linear has no CUDA C++ kernel yet",
}


def triton_widths(dtype: torch.dtype, distribution: int) -> tuple[int, ...]:
    if distribution == 1:
        return (16, 8)
    return (8,) if dtype.itemsize == 2 else ()


TRITON_PROGRAMS = 264
TRITON_BUFFER = 2**26
TRITON_SUM_TILE = (16, 64)


class Tile(NamedTuple):
    """Rows and columns of W and samples of x that a program multiplies at a time, its warps, its stages of loads."""

    rows: int
    columns: int
    block: int
    warps: int
    stages: int


def triton_fused_rows(dtype: torch.dtype, distribution: int) -> int:
    if dtype in (torch.float32, torch.float64):
        return 32
    return 256 if distribution == 1 else 64


def triton_tile(dtype: torch.dtype, distribution: int, samples: int, backward: bool) -> Tile:
    block = 8 if samples <= 8 else 16 if samples <= 16 else 32 if samples <= 32 else 64
    if dtype == torch.float64:
        return Tile(16, 32, min(block, 16), 4, 2)
    if dtype == torch.float32:
        return Tile(64, 32, min(block, 32), 4, 2)
    return Tile(64, 64 if backward or distribution == 1 else 32, block, 4, 3)


def triton_gradient_tile(dtype: torch.dtype, samples: int) -> Tile:
    if dtype == torch.float64:
        return Tile(32, 32, 16, 4, 2)
    if dtype == torch.float32:
        return Tile(64, 64, 16, 8, 2)
    return Tile(64, 128, 16 if samples <= 16 else 32, 8, 3)
