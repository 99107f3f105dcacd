"""Choices of the window attention kernels. Those of the CPU stand in csrc/cpu, beside what they shape.

Those of Triton follow from what the compiled kernels need (`quaver info --kernels`); they are not measured.
"""

from typing import NamedTuple

import torch

#: The order of backends on a GPU. Nothing of it was measured on a card yet.
CUDA_ORDER: tuple[str, ...] = ("cuda", "triton")

#: Triton: tokens at a time of what is done once a window, and rows at a time of sums and of what is elementwise.
TRITON_TOKENS = 64
TRITON_ROWS = 16


def cuda_width(dtype: torch.dtype) -> int:
    """The CUDA kernels' largest head width: the sums of wider heads would not fit a thread's 255 registers."""
    return 32 if dtype == torch.float64 else 128


class Tile(NamedTuple):
    """What a Triton program has at a time: rows, and as many keys; queries, of gradients of keys; its warps and stages
    of loads."""

    rows: int
    queries: int
    warps: int
    stages: int


def triton_tile(dtype: torch.dtype, width: int, backward: bool, rows: int) -> Tile:
    """The tile for heads of `width` (a power of two) where `rows` is all that there is to a window.

    A warp has 16 rows or more of what tensor cores multiply. A program that makes gradients of 64 keys has 32 queries
    at a time: scores, their gradients and the sums of two products are in registers, which 64 made spill. float32 is
    multiplied without tensor cores, and float64 is for gradcheck.
    """
    elements = {8: 512, 4: 2048, 2: 8192}[dtype.itemsize] // (2 if backward else 1)
    most = max(16, min(64 if dtype.itemsize == 2 else 32, elements // width))
    size = 16
    while size < min(rows, most):
        size *= 2
    if dtype.itemsize == 2:
        warps = max(1, min(8, size * width // (512 if backward else 1024)))
    else:
        warps = 8 if size * width >= 1024 else 4
    # Loads ahead of wide heads' products, and of float32's, made registers spill.
    ahead = rows > size and dtype.itemsize == 2 and not (backward and width > 64)
    return Tile(size, min(size, 32), warps, 2 if ahead else 1)


def triton_sources(width: int) -> int:
    """Windows at a time in the search for those that have a source, whose rows of `width` are then in registers."""
    return max(16, min(128, 4096 // width))
