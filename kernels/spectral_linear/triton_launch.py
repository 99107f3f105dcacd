"""How the host side of spectral_linear's Triton kernels lays out their arguments and shares their sums."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._seeds import compute_dtype
from .._triton import launch
from . import tuning
from .triton_gradients import gather_up_kernel, sum_parts_kernel, sum_rows_kernel, sum_terms_kernel
from .triton_products import product_kernel


def run(kernel: Any, programs: int, *arguments: Any, **keywords: Any) -> None:
    """Launches what has programs. There is no noise in these kernels: multiplications and additions may be fused."""
    if programs > 0:
        launch(kernel, (programs,), *arguments, enable_fp_fusion=True, **keywords)


class Tokens(NamedTuple):
    """Rows of [B, T, columns] as the kernels take them: tensor, strides of samples, rows and columns."""

    tensor: Tensor
    outer: int
    row: int
    column: int

    @staticmethod
    def of(x: Tensor) -> "Tokens":
        outer, row, column = x.stride()
        return Tokens(x, outer, outer if x.shape[1] == 1 else row, column)


def lengths(*all_tokens: Tokens) -> int | None:
    """`length` of the kernels: T; None where all of them go on to the next sample as to the next row."""
    batch, length = all_tokens[0].tensor.shape[:2]
    if batch <= 1 or length == 0 or all(tokens.outer == length * tokens.row for tokens in all_tokens):
        return None
    return int(length)


class Factors(NamedTuple):
    """down [F, r, K] and up [F, N, r] in a dtype; the sizes that the kernels take."""

    down: Tensor
    up: Tensor
    gain: Tensor | None
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return int(self.down.shape[1])

    @property
    def number(self) -> int:
        return int(self.down.shape[0])

    @property
    def columns(self) -> int:
        return self.number * self.rank

    @property
    def outputs(self) -> int:
        return int(self.up.shape[1])

    @property
    def inputs(self) -> int:
        return int(self.down.shape[2])

    def gain_arguments(self) -> tuple[Tensor | None, int]:
        """The kernels' gain and gain_step."""
        return gain_arguments(self.gain)

    def rank_option(self) -> dict[str, int]:
        """The kernels' RANK, a divisor."""
        return {"RANK": max(1, self.rank)}

    def down_rows(self) -> Tensor:
        """[columns, K], contiguous, in the dtype."""
        return self.down.to(self.dtype).reshape(self.columns, self.inputs).contiguous()

    def up_rows(self, with_gain: bool) -> Tensor:
        """up, or gain * up, as [N, columns], contiguous, in the dtype."""
        outputs, columns = self.outputs, self.columns
        gain, gain_step = self.gain_arguments() if with_gain else (None, 0)
        beside = self.up.transpose(0, 1)
        if gain is None and self.up.dtype == self.dtype and beside.is_contiguous():
            return beside.reshape(outputs, columns)
        out = torch.empty((outputs, columns), dtype=self.dtype, device=self.up.device)
        block = min(tuning.TRITON_BLOCK, triton.next_power_of_2(max(1, columns)))
        programs = outputs * triton.cdiv(columns, block)
        arguments = (out, self.up, *self.up.stride(), gain, gain_step, outputs, columns)
        run(gather_up_kernel, programs, *arguments, **self.rank_option(), BLOCK=block)
        return out


def gain_arguments(gain: Tensor | None) -> tuple[Tensor | None, int]:
    """The kernels' gain and gain_step: 0 where one gain is for all."""
    return gain, 0 if gain is None or gain.dim() == 0 else gain.stride(0)


def shares(steps: int, programs: int) -> tuple[int, int]:
    """How many programs share the steps of a sum, and how many each has, where there are `programs` without that."""
    wanted = max(1, min(steps, tuning.TRITON_PROGRAMS // max(1, programs)))
    length = max(1, triton.cdiv(steps, wanted))
    return max(1, triton.cdiv(steps, length)), length


def partial(out: Tensor, parts: int) -> Tensor:
    """Where sums for `out` go: out itself, or [parts, *out.shape] that are added up later."""
    if parts == 1:
        return out
    return torch.empty((parts, *out.shape), dtype=compute_dtype(out.dtype), device=out.device)


def add_parts(out: Tensor, made: Tensor, bias: Tensor | None = None) -> None:
    """out, from what `partial` gave, and the bias [columns] of each row."""
    if made is out:
        return
    size, block = out.numel(), tuning.TRITON_BLOCK
    arguments = (out, made, bias, made.shape[0], size, max(1, out.shape[-1]))
    run(sum_parts_kernel, triton.cdiv(size, block), *arguments, BLOCK=block)


class Operand(NamedTuple):
    """A factor of a product: tensor, and strides of members, of rows (or columns of the product), of samples (of a
    depth that is tokens), and of the depth."""

    tensor: Tensor
    member: int
    row: int
    outer: int
    step: int


def product(
    a: Operand,
    b: Operand,
    sizes: tuple[int, int, int, int],
    length: int | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """out [members, rows, columns] = a b + bias; sizes: members, rows, columns, depth.

    Where programs share the depth, or there is no out: [splits, members, rows, columns], sums without the bias that are
    to be added up, in float32 or float64."""
    members, rows, columns, depth = sizes
    tile = tuning.triton_tile(a.tensor.dtype, rows, columns, members)
    programs = members * tile.cover(rows, columns)
    splits, share = shares(triton.cdiv(depth, tile.depth), programs)
    if out is None or splits > 1:
        dtype, bias = compute_dtype(a.tensor.dtype), None
        out = torch.empty((splits, members, rows, columns), dtype=dtype, device=a.tensor.device)
    arguments = (out, *a, *b, length, bias, rows, columns, depth, members, share)
    run(product_kernel, programs * splits, *arguments, **tile.options())
    return out


def multiply(
    out: Tensor,
    a: Operand,
    b: Operand,
    sizes: tuple[int, int, int, int],
    length: int | None = None,
    bias: Tensor | None = None,
) -> None:
    """out [members, rows, columns] = a b + bias; sizes: members, rows, columns, depth."""
    add_parts(out, product(a, b, sizes, length, bias, out), bias)


def token_operands(grad: Tokens, x: Tokens) -> tuple[Operand, Operand, tuple[int, int, int, int], int | None]:
    """What makes grad^T x over all tokens, as arguments of `product`."""
    batch, length, columns = x.tensor.shape
    a = Operand(grad.tensor, 0, grad.column, grad.outer, grad.row)
    b = Operand(x.tensor, 0, x.column, x.outer, x.row)
    return a, b, (1, grad.tensor.shape[-1], columns, batch * length), lengths(grad, x)


def sum_tokens(out: Tensor, grad: Tokens) -> None:
    """out [columns]: the sums of all rows."""
    (batch, length, columns), (rows, width) = grad.tensor.shape, tuning.TRITON_SUM_TILE
    tiles = triton.cdiv(columns, width)
    splits, share = shares(triton.cdiv(batch * length, rows), tiles)
    to = torch.empty((splits, columns), dtype=compute_dtype(out.dtype), device=out.device)
    arguments = (to, *grad, lengths(grad), batch * length, columns, share)
    run(sum_rows_kernel, tiles * splits, *arguments, ROWS=rows, COLUMNS=width)
    add_parts(out, to)


def sum_terms(
    out: Tensor, terms: Tensor, inner: int, steps: tuple[int, int], inner_terms: tuple[int, int], outer: tuple[int, int]
) -> None:
    """out [.., inner]: sums of terms; steps: of rows and of columns of out; inner_terms and outer: how many, and their
    step."""
    block = tuning.TRITON_TERMS
    arguments = (inner, outer[1], *steps, inner_terms[0], outer[0], inner_terms[1])
    run(sum_terms_kernel, out.numel(), out, terms, *arguments, BLOCK=block)
