"""Choices of spectral_linear on a GPU. What shapes the CPU's kernels is in csrc/cpu.

Those of Triton follow from what the compiled kernels need (`quaver info --kernels`); they are not measured.
"""

from typing import NamedTuple

import torch

#: The order of backends on a GPU.
CUDA_ORDER = ("cuda", "triton")

#: Triton: programs that a launch aims at, two for each of an H100's 132 processors: sums are cut into parts until there
#: are as many. A constant, so that results have the same bits on every card.
TRITON_PROGRAMS = 264
#: Triton: elements of W + Delta that are in memory at a time where nobody keeps them (256 MiB of 16-bit ones).
TRITON_BUFFER = 2**27
#: Triton: elements at a time of what is elementwise, and rows and columns at a time of sums.
TRITON_BLOCK = 1024
TRITON_SUM_TILE = (16, 64)
#: Triton: terms at a time of a sum that one program makes.
TRITON_TERMS = 256


class Tile(NamedTuple):
    """What a Triton program multiplies at a time: rows and columns of the result, depth; its warps, stages of loads."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def cover(self, rows: int, columns: int) -> int:
        """Tiles that cover a result."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def options(self) -> dict[str, int]:
        """The keywords of a launch."""
        sizes = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


def triton_tile(dtype: torch.dtype, rows: int, columns: int, members: int) -> Tile:
    """The tile of a product.

    128 x 128 where there are tiles enough for half of the programs that a launch aims at. The smaller tile has 32 steps
    of the depth: the addresses of 64 were spilled where rows are ragged. float32 is multiplied without tensor cores: 16
    sums a thread, as 32 were spilled. float64 is for gradcheck; loads ahead of it were spilled.
    """
    if dtype == torch.float64:
        return Tile(32, 32, 16, 4, 1)
    if dtype == torch.float32:
        return Tile(16, 64, 16, 4, 2) if rows <= 16 else Tile(64, 64, 16, 8, 3)
    if rows <= 16:
        return Tile(16, 64, 64, 4, 3)
    large = Tile(128, 128, 32, 8, 3)
    return large if members * large.cover(rows, columns) * 2 >= TRITON_PROGRAMS else Tile(64, 64, 32, 4, 4)


def triton_summed_tile(dtype: torch.dtype) -> Tile:
    """The tile of products of samples beside their sum: with as many sums as a product alone has, some were spilled."""
    if dtype.itemsize == 2:
        return Tile(64, 64, 32, 8, 3)
    return Tile(32, 32, 16, 4, 2) if dtype == torch.float32 else triton_tile(dtype, 64, 64, 1)


def triton_projected_tile(dtype: torch.dtype, rows: int, columns: int) -> Tile:
    """The tile of the gradient of x down^T: three results leave it, and more sums a thread beside them were spilled."""
    tile = triton_tile(dtype, rows, columns, 1)
    return Tile(tile.rows, 64, 32, 8, 3) if dtype.itemsize == 2 and rows > 16 else tile


def triton_shifted_tile(dtype: torch.dtype, wide: bool, rows: int, columns: int, members: int) -> Tile:
    """The tile of a product with W + gain * Delta. wide: one is float32 beside a 16-bit x, of which larger tiles
    would not fit into the 64 KiB of shared memory of an MI300."""
    tile = triton_tile(dtype, rows, columns, members)
    return tile._replace(columns=64, depth=32) if wide and dtype.itemsize == 2 else tile


def triton_wave_tile() -> Tile:
    """The tile of angles: two a thread, as there are hundreds of instructions to each cosine and sine."""
    return Tile(16, 16, 16, 4, 1)
