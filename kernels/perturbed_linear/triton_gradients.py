"""The gradients of perturbed_linear's weights in Triton: grad^T x, and its sums with noise that is made again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._seeds import compute_dtype
from .._triton import launch
from ..perturb.triton_kernels import (
    ELEMENT,
    MEMBER,
    ROW,
    members_of,
    perturb_sigma_gradient,
    sigma_kind,
    sum_partials_kernel,
)
from ..perturb.tuning import TRITON_SUM_BLOCK
from ..philox.triton_kernels import key_of, source_arguments
from . import tuning
from .triton_launch import Bias, Place, Rows, shares, sum_parts
from .triton_products import COUNTS, VALUES, tile_columns, tile_noise, tile_rows

#: What the kernel is told of sigma when its gradient is not wanted.
NONE = tl.constexpr(-1)


@triton.jit
def transposed_product(
    total,
    left,
    left_step,
    right,
    right_step,
    first,
    last,
    row_inside,
    column_inside,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total + grad^T x of samples first .. last - 1; left and right: where the rows and columns of sample 0 are."""
    for start in range(first, last, BLOCK):
        sample = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        known = (sample < last)[None, :]
        grad_known, x_known = known, tl.trans(known)
        if not EVEN:
            grad_known, x_known = known & row_inside[:, None], x_known & column_inside[None, :]
        grad = tl.load(left[:, None] + sample[None, :] * left_step, mask=grad_known, other=0.0)
        x = tl.load(right[None, :] + sample[:, None] * right_step, mask=x_known, other=0.0)
        total = tl.dot(grad, x, total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def weight_gradient_kernel(
    weight_out,
    sigma_out,
    grad,
    grad_member: tl.int64,
    grad_row,
    grad_column,
    x,
    x_member: tl.int64,
    x_row,
    x_column,
    samples: tl.int32,
    rows: tl.int64,
    columns: tl.int64,
    seeds,
    low: tl.int32,
    high: tl.int32,
    stream: tl.int32,
    domain: tl.int32,
    group: tl.int64,
    skip: tl.int64,
    row_length: tl.int64,
    members: tl.int32,
    together: tl.int32,
    classes: tl.int32,
    tiles: tl.int32,
    column_tiles: tl.int32,
    blocks: tl.int32,
    length: tl.int32,
    SIGMA: tl.constexpr,
    SHARED: tl.constexpr,
    EVEN: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad^T x of a tile of W, added over `together` members and `length` samples of each; and of each member the sums
    of that times its noise over what a value of sigma belongs to.

    weight_out [parts, rows, columns], a part being a block of samples of `together` members. sigma_out: a MEMBER's
    [members, tiles, blocks], a ROW's [members, rows, tiles of columns, blocks], an ELEMENT's [members, rows, columns],
    or, of one that members have SHARED, [parts, rows, columns]."""
    program = tl.program_id(0)
    column_tile = program % column_tiles
    row_class = (program // column_tiles % classes).to(tl.int64)
    row_tile = program // column_tiles // classes % tiles
    all_tiles = column_tiles * classes * tiles
    tile = program % all_tiles
    part = program // all_tiles
    block = part % blocks
    first_member = part // blocks * together
    place = (stream, domain, group, skip, row_length)
    shift = 0 if EVEN else (skip + row_class * row_length) % WIDTH
    row = tile_rows(row_tile, row_class, classes, ROWS)
    column = tile_columns(column_tile, shift, COLUMNS)
    row_inside = row < rows
    column_inside = (column >= 0) & (column < columns)
    inside = row_inside[:, None] & column_inside[None, :]
    position = row[:, None] * columns + column[None, :]
    compute: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    first, last = block * length, tl.minimum(block * length + length, samples)
    total = tl.zeros([ROWS, COLUMNS], dtype=compute)
    sigma_total = total
    for number in range(first_member, tl.minimum(first_member + together, members)):
        member = tl.cast(number, tl.int64)
        left = grad + member * grad_member + row * grad_column
        right = x + member * x_member + column * x_column
        if SIGMA == NONE:
            total = transposed_product(
                total, left, grad_row, right, x_row, first, last, row_inside, column_inside, EVEN, BLOCK
            )
        else:
            zero = tl.zeros([ROWS, COLUMNS], dtype=compute)
            product = transposed_product(
                zero, left, grad_row, right, x_row, first, last, row_inside, column_inside, EVEN, BLOCK
            )
            total += product
            key = key_of(seeds, member, low, high)
            epsilon = tile_noise(row, column_tile, shift, key, place, KIND, WIDTH, ROWS, COLUMNS)
            product *= epsilon.to(compute)
            if SIGMA == MEMBER:
                tl.store(sigma_out + (member * all_tiles + tile) * blocks + block, tl.sum(product))
            elif SIGMA == ROW:
                to = sigma_out + ((member * rows + row) * column_tiles + column_tile) * blocks + block
                tl.store(to, tl.sum(product, 1), mask=row_inside)
            elif SHARED:
                sigma_total += product
            else:
                tl.store(sigma_out + member * rows * columns + position, product, mask=inside)
    position += part.to(tl.int64) * rows * columns
    if weight_out is not None:
        tl.store(weight_out + position, total.to(weight_out.dtype.element_ty), mask=inside)
    if SIGMA == ELEMENT and SHARED:
        tl.store(sigma_out + position, sigma_total, mask=inside)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def sum_rows_kernel(
    partial,
    grad,
    grad_member: tl.int64,
    grad_row,
    grad_column,
    samples: tl.int32,
    size: tl.int64,
    blocks: tl.int32,
    tiles: tl.int32,
    length: tl.int32,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial [members, blocks, size]: the sums of `length` samples of grad."""
    program = tl.program_id(0)
    column = (program % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    block = program // tiles % blocks
    member = (program // tiles // blocks).to(tl.int64)
    compute: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK, COLUMNS], dtype=compute)
    source = grad + member * grad_member + column[None, :] * grad_column
    for first in range(block * length, tl.minimum(block * length + length, samples), BLOCK):
        sample = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
        mask = (sample < samples)[:, None] & (column < size)[None, :]
        total += tl.load(source + sample[:, None] * grad_row, mask=mask, other=0.0).to(compute)
    tl.store(partial + (member * blocks + block) * size + column, tl.sum(total, 0), mask=column < size)


def _library_product(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad^T x over samples and members, [P, M, N] and [P, M, K], by torch's GEMM, in x's dtype or the wider one."""
    left, right = grad.flatten(0, 1).t(), x.flatten(0, 1)
    if dtype == x.dtype:
        return torch.mm(left, right)
    if x.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left.to(dtype), right.to(dtype))


def _weight_gradients(
    of_weight: Tensor | None,
    of_sigma: Tensor | None,
    grad: Rows,
    x: Rows,
    samples: int,
    shape: tuple[int, int],
    seed: Tensor,
    stream: int,
    domain: int,
    offsets: tuple[int, ...],
) -> None:
    (rows, columns), members, device = shape, members_of(seed), x.tensor.device
    kind, shared, distribution = NONE, False, domain & 255
    place = Place(0, 0, columns, 4, 1)
    if of_sigma is not None:
        kind, shared = sigma_kind(of_sigma, shape), members_of(of_sigma) == 1
        place = Place.of(rows, x.tensor.dtype, distribution, offsets)
    tile = tuning.triton_gradient_tile(x.tensor.dtype, of_sigma is not None)
    row_tiles, column_tiles = place.row_tiles(rows, tile.rows), place.column_tiles(columns, tile.columns)
    programs = row_tiles * column_tiles * place.classes
    sets, together = shares(members, programs)
    # The samples of a member are cut only where nothing else makes enough programs, and its gradients add up later.
    apart = kind is ELEMENT and not shared
    blocks, steps = (
        (1, triton.cdiv(samples, tile.samples))
        if apart
        else shares(triton.cdiv(samples, tile.samples), programs * sets)
    )
    parts = sets * blocks
    wide = compute_dtype(x.tensor.dtype)

    def partial(out: Tensor | None, shape: tuple[int, ...], needed: bool) -> Tensor | None:
        return torch.empty(shape, dtype=wide, device=device) if out is not None and needed else out

    weight_to = partial(of_weight, (parts, rows, columns), parts > 1)
    if kind is ELEMENT:
        sigma_to = partial(of_sigma, (parts, rows, columns), shared and parts > 1)
    else:
        values, terms = (rows, column_tiles * blocks) if kind is ROW else (1, programs * blocks)
        sigma_to = partial(of_sigma, (members, values, terms), True)
    source = source_arguments(seed, stream, domain)
    launch(
        weight_gradient_kernel,
        (programs * parts,),
        *(weight_to, sigma_to, *grad, *x, samples, rows, columns, *source),
        *(place.group, place.skip, place.row_length, members, together),
        *(place.classes, row_tiles, column_tiles, blocks, steps * tile.samples),
        SIGMA=kind.value,
        SHARED=shared,
        EVEN=place.even(rows, columns, (tile.rows, tile.columns)),
        KIND=distribution,
        WIDTH=place.width,
        BLOCK=tile.samples,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    for out, made in ((of_weight, weight_to), (of_sigma if kind is ELEMENT else None, sigma_to)):
        if out is not None and made is not None and made is not out:
            sum_parts(out, made, (parts, 1, rows, columns), Bias(), source, distribution)
    if of_sigma is not None and sigma_to is not None and kind is not ELEMENT:
        count = members if shared else 1
        launch(
            sum_partials_kernel, (of_sigma.numel(),), of_sigma, sigma_to, count, values, terms, BLOCK=TRITON_SUM_BLOCK
        )


def _sum_rows(grad: Rows, samples: int, members: int, size: int) -> Tensor:
    """The sums over samples, [members, size], in float32 or float64."""
    block, columns = tuning.TRITON_SUM_TILE
    tiles, dtype, device = triton.cdiv(size, columns), compute_dtype(grad.tensor.dtype), grad.tensor.device
    blocks, length = shares(triton.cdiv(samples, block), members * tiles)
    out = torch.empty((members, size), dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    partial = out if blocks == 1 else torch.empty((members, blocks, size), dtype=dtype, device=device)
    grid, constants = (members * blocks * tiles,), {"BLOCK": block, "COLUMNS": columns}
    launch(sum_rows_kernel, grid, partial, *grad, samples, size, blocks, tiles, length * block, **constants)
    if blocks > 1:
        launch(sum_partials_kernel, (out.numel(),), out, partial, blocks, size, 1, BLOCK=TRITON_SUM_BLOCK)
    return out


def perturbed_linear_parameter_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    bias_sigma: Tensor | None,
    seed: Tensor,
    need_weight: bool,
    need_sigma: bool,
    need_bias: bool,
    need_bias_sigma: bool,
    member_inputs: bool,
    *place: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.quaver.perturbed_linear_parameter_gradient in Triton."""
    stream, domain, *offsets = place
    shape = weight.shape[0], weight.shape[1]
    grads, samples = Rows.of(grad, seed.dim() > 0)
    inputs, _ = Rows.of(x, member_inputs)

    def result(like: Tensor | None, needed: bool) -> Tensor | None:
        return torch.empty(like.shape, dtype=like.dtype, device=x.device) if needed and like is not None else None

    of_weight = of_sigma = None
    many = samples > tuning.triton_fused_rows(x.dtype)
    if need_weight and not need_sigma and inputs.tensor.shape[0] == grads.tensor.shape[0]:
        of_weight = _library_product(grads.tensor, inputs.tensor, weight.dtype)
    elif need_sigma and many and grads.tensor.shape[0] == 1:
        # The product is written once, in the type it was added up in, and read for its sums with the noise.
        product = _library_product(grads.tensor, inputs.tensor, sigma.dtype)
        of_weight = product.to(weight.dtype) if need_weight else None
        of_sigma = perturb_sigma_gradient(product.reshape(*seed.shape, *shape), sigma, seed, *place)
    elif need_weight or need_sigma:
        of_weight, of_sigma = result(weight, need_weight), result(sigma, need_sigma)
        _weight_gradients(of_weight, of_sigma, grads, inputs, samples, shape, seed, stream, domain, tuple(offsets))
    of_bias, of_bias_sigma = result(bias, need_bias), None
    if need_bias or need_bias_sigma:
        members = members_of(seed)
        sums = _sum_rows(grads, samples, members, shape[0])
        if of_bias is not None:
            sum_parts(of_bias, sums, (members, 1, 1, shape[0]), Bias(), source_arguments(seed, 0, 0), 0)
        if need_bias_sigma and bias_sigma is not None:
            bias_place = (stream, domain + 256, 0, offsets[0], offsets[0] + shape[0])
            of_bias_sigma = perturb_sigma_gradient(sums.reshape(*seed.shape, shape[0]), bias_sigma, seed, *bias_place)
    nothing = [torch.empty(0, dtype=like.dtype, device=x.device) for like in (weight, sigma, weight, sigma)]
    made = (of_weight, of_sigma, of_bias, of_bias_sigma)
    first, second, third, fourth = (a if a is not None else b for a, b in zip(made, nothing, strict=True))
    return first, second, third, fourth
