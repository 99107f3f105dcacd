"""How the host side of perturbed_linear's Triton kernels tells them where samples, weights, biases and sums are."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._seeds import signed
from .._triton import launch
from ..philox.triton_kernels import scalar_words
from . import tuning
from .triton_products import NO_BIAS, NOISY, PLAIN, sum_parts_kernel


class Rows(NamedTuple):
    """The samples of x or of a gradient as the kernels take them: tensor, strides of members, samples and columns."""

    tensor: Tensor
    member: int
    row: int
    column: int

    @staticmethod
    def of(x: Tensor, of_members: bool) -> tuple["Rows", int]:
        """Those of x [.., K], or of members' [P, .., K]; and their number. Copied where strides can't tell them."""
        lead = x.shape[1:-1] if of_members else x.shape[:-1]
        samples = torch.Size(lead).numel()
        x = x.reshape(x.shape[0] if of_members else 1, samples, x.shape[-1])
        return Rows(x, x.stride(0) if of_members else 0, x.stride(1), x.stride(2)), samples


class Place(NamedTuple):
    """Where W gets its noise from, and how its tiles are cut."""

    group: int
    skip: int
    row_length: int
    width: int
    classes: int

    @staticmethod
    def of(rows: int, dtype: torch.dtype, distribution: int, offsets: tuple[int, ...]) -> "Place":
        """offsets: row_offset, column_offset, row_length; dtype: of the weight."""
        row_offset, column_offset, row_length = offsets
        widths = tuning.triton_widths(dtype, distribution)
        width = next((size for size in widths if row_length % size == 0), 4)
        first = row_offset * row_length + column_offset
        # The rows that start at the same place in a group follow each other at this distance.
        classes = width // math.gcd(width, row_length)
        return Place(signed(first // width), first % width, row_length, width, max(1, min(classes, rows)))

    def column_tiles(self, columns: int, size: int) -> int:
        """Tiles of `size` columns that cover a row; a row that may start inside a group has one group more."""
        aligned = self.skip == 0 and self.classes == 1
        return int(triton.cdiv(columns + (0 if aligned else self.width - 1), size))

    def row_tiles(self, rows: int, size: int) -> int:
        """Tiles of `size` rows that cover the rows of a class."""
        return int(triton.cdiv(triton.cdiv(rows, self.classes), size))

    def even(self, rows: int, columns: int, tile: tuple[int, int]) -> bool:
        """Whether tiles cover W and nothing else."""
        return self.skip == 0 and self.classes == 1 and rows % tile[0] == 0 and columns % tile[1] == 0


def shares(steps: int, programs: int) -> tuple[int, int]:
    """How many programs share the steps of a sum, and how many each has, where there are `programs` without that."""
    wanted = max(1, min(steps, tuning.TRITON_PROGRAMS // max(1, programs)))
    length = max(1, triton.cdiv(steps, wanted))
    return max(1, triton.cdiv(steps, length)), length


def sigma_arguments(sigma: Tensor) -> tuple[Tensor | None, int, int, int]:
    """The kernels' sigmas, sigma_low, sigma_high and sigma_stride."""
    if sigma.dim() == 0 and sigma.device.type == "cpu":
        return None, *scalar_words(sigma.item(), sigma.dtype), 0
    sigma = sigma.contiguous()
    return sigma, 0, 0, 0 if sigma.dim() == 0 or sigma.shape[0] == 1 else sigma[0].numel()


class Bias(NamedTuple):
    """The kernels' parameters from bias to row_offset, and their constexpr BIAS."""

    bias: Tensor | None = None
    sigmas: Tensor | None = None
    low: int = 0
    high: int = 0
    stride: int = 0
    step: int = 0
    row_offset: int = 0
    kind: int = NO_BIAS.value

    @staticmethod
    def of(bias: Tensor | None, sigma: Tensor | None, row_offset: int) -> "Bias":
        if bias is None:
            return Bias()
        if sigma is None:
            return Bias(bias.contiguous(), kind=PLAIN.value)
        step = int(sigma.dim() > 0 and sigma.shape[-1] > 1)
        return Bias(bias.contiguous(), *sigma_arguments(sigma), step, signed(row_offset), NOISY.value)


def sum_parts(
    out: Tensor, partial: Tensor, shape: tuple[int, int, int, int], bias: Bias, source: Any, distribution: int
) -> None:
    """out: the sum of partial; shape: parts, members, samples, size."""
    parts, members, samples, size = shape
    block, columns = tuning.TRITON_SUM_TILE
    blocks = triton.cdiv(samples, block)
    grid = (members * blocks * triton.cdiv(size, columns),)
    constants = {"BIAS": bias.kind, "KIND": distribution, "BLOCK": block, "COLUMNS": columns}
    launch(
        sum_parts_kernel, grid, out, partial, parts, samples, size, *bias[:-1], *source, members, blocks, **constants
    )
