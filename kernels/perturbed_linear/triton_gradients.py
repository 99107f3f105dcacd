"""The gradients of perturbed_linear's weights in Triton: grad^T x, and its sums with noise that is made again."""

import triton
import triton.language as tl

from ..perturb.triton_kernels import ELEMENT, MEMBER, ROW
from ..philox.triton_kernels import key_of
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
