"""Choices of perturbed_linear. Those of the CPU are constants of csrc/cpu/gemm.h: the README has the table.

Where a GPU's say no time, they follow from instruction counts of the compiled kernels (`quaver info --kernels`).
"""

from typing import NamedTuple

import torch


def cuda_order(dtype: torch.dtype, rows: int, weights: int) -> tuple[str, ...]:
    """The order of backends on a GPU, measured on an H100 (docs/gpu.md).

    Triton's kernels take 0.55 to 0.97 of CUDA C++'s time wherever a layer is not small. A small one is bound by its
    launches, of which CUDA C++'s cost a fraction on the host; and a single row of float32 by its dot products, which
    take 0.5 to 0.75 of the time of a tile that is mostly empty.
    """
    small = weights < 2**18
    return ("cuda", "triton") if small or (dtype.itemsize > 2 and rows == 1) else ("triton", "cuda")


#: Triton: programs that a launch aims at, two for each of an H100's 132 processors: sums are cut into parts until there
#: are as many. A constant, so that results have the same bits on every card.
TRITON_PROGRAMS = 264
#: Triton: elements of W' that are in memory at a time where a GEMM reads them (256 MiB of 16-bit ones): of a
#: population of small layers all members, so that one batched GEMM has them; of large layers one.
TRITON_BUFFER = 2**27
#: Triton: samples and columns of a tile of the sums of parts and of rows: 8 floats a thread, 128 bits twice.
TRITON_SUM_TILE = (16, 64)


class Tile(NamedTuple):
    """What a Triton program multiplies at a time: rows and columns of W, samples; its warps and stages of loads."""

    rows: int
    columns: int
    samples: int
    warps: int
    stages: int


def triton_fused_rows(dtype: torch.dtype) -> int:
    """Rows of x up to which Triton makes W' in registers; with more it is written once, for torch's GEMM to read.

    Up to 64, one program can have all the rows, so that the noise is made once in both forms, and W' is neither written
    nor read: 0.9 of the other form's time for normals, 0.5 for signs (16 x 4096 x 4096). With 256 rows signs that are
    made again take 1.06 to 1.4 of it. float32 is multiplied without tensor cores: an instruction a product, where
    cuBLAS has the same but better tiles.
    """
    if dtype.itemsize > 2:
        return 32
    return 64


def triton_widths(dtype: torch.dtype, distribution: int) -> tuple[int, ...]:
    """Elements of a thread's group of noise: the first that divides the length of a row, or 4, a block of normals.

    Two blocks of normals are the 16 bytes of a 16-bit load: with one the noise changes threads by way of shared memory
    (58 instructions a weight for 56). 16 signs of a word share a Philox: 15 instructions a weight for 18 with 8.
    """
    if distribution == 1:
        return 16, 8
    return (8,) if dtype.itemsize == 2 else ()


def triton_tile(dtype: torch.dtype, distribution: int, samples: int, backward: bool, paired: bool) -> Tile:
    """The tile of product_kernel; dtype: of x.

    16 normals a thread take 96 registers forward, five blocks of 4 warps; 32 take 167 and save 2 of 55 instructions.
    Backward transposes W' through shared memory, which wants the larger tile: 57 for 63. Pairs have two of each: 124
    registers with 16 elements a thread, 226 with 32. float64 is for gradcheck.
    """
    block = next((size for size in (8, 16, 32) if samples <= size), 64)
    if dtype == torch.float64:
        return Tile(32, 32, min(block, 16), 4, 2)
    if dtype == torch.float32:
        return Tile(64, 32, min(block, 32), 4, 2)
    if backward:
        return Tile(32 if paired else 64, 64, block, 4, 3)
    return Tile(64, 64 if distribution == 1 and not paired else 32, block, 4, 3)


def triton_gradient_tile(dtype: torch.dtype, with_noise: bool) -> Tile:
    """The tile of weight_gradient_kernel.

    Products, their sum over members, the noise and the sum of sigma's gradient are all in registers, 16 of each a
    thread; without noise there are products alone, and a larger tile reads less.
    """
    if dtype == torch.float64:
        return Tile(32, 32, 16, 4, 2)
    if dtype == torch.float32:
        return Tile(64, 64, 16, 8, 2)
    return Tile(64, 64, 32, 8, 3) if with_noise else Tile(128, 128, 32, 8, 3)
