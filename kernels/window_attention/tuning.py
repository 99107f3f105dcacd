"""Choices of the window attention kernels. Those of the CPU stand in csrc/cpu, beside what they shape.

Those of Triton follow from what the compiled kernels need (`quaver info --kernels`); they are not measured.
"""

from typing import NamedTuple

import torch

#: The order of backends on a GPU.
CUDA_ORDER: tuple[str, ...] = ("triton",)

#: Triton: tokens at a time of what is done once a window, and rows at a time of sums and of what is elementwise.
TRITON_TOKENS = 64
TRITON_ROWS = 16
#: Triton: windows at a time in the search for those that have a source.
TRITON_SOURCES = 256


class Tile(NamedTuple):
    """What a Triton program has at a time: rows, and as many keys; its warps and stages of loads."""

    rows: int
    warps: int
    stages: int


def triton_tile(dtype: torch.dtype, width: int, backward: bool, rows: int) -> Tile:
    """The tile for heads of `width` (a power of two) where `rows` is all that there is to a window.

    A warp has 16 rows or more of what tensor cores multiply. Sums of 64 rows of 128 in float32 take 64 registers of
    each of 128 threads; the key gradients have two of them. float32 is multiplied without tensor cores, and float64 is
    for gradcheck.
    """
    elements = 2048 if dtype.itemsize > 4 else 4096 if dtype.itemsize == 4 else 8192
    most = max(16, min(64 if dtype.itemsize == 2 else 32, elements // (width * (2 if backward else 1))))
    size = 16
    while size < min(rows, most):
        size *= 2
    warps = max(1, min(8, size * width // 1024)) if dtype.itemsize == 2 else 4
    return Tile(size, warps, 1 if rows <= size else 2)
