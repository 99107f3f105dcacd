"""Gradients of spectral_linear's parameters in Triton. Sums that programs share are added up later, in order."""

import triton
import triton.language as tl

from .triton_products import COUNTS, accumulate, tile_of, token_place


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def sample_gradient_kernel(
    of_weight,
    of_delta,
    of_gain,
    grad,
    grad_outer: tl.int64,
    grad_row,
    grad_column,
    x,
    x_outer: tl.int64,
    x_row,
    x_column,
    delta,
    delta_member: tl.int64,
    delta_row,
    delta_column,
    gain,
    gain_step,
    length: tl.int32,
    members: tl.int32,
    outputs: tl.int32,
    inputs: tl.int32,
    together: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """G = grad^T x of each of `together` samples: times the gain to of_delta [members, outputs, inputs]; its sum over
    them to of_weight [groups, outputs, inputs]; and that of G * delta over the columns of a tile and over them to
    of_gain [groups, tiles of columns, outputs]. Each where asked for."""
    row_tiles, column_tiles = tl.cdiv(outputs, ROWS), tl.cdiv(inputs, COLUMNS)
    tiles = row_tiles * column_tiles
    row_tile, column_tile = tile_of(tl.program_id(0) % tiles, row_tiles, column_tiles)
    group = tl.program_id(0) // tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < outputs, column < inputs
    inside = row_inside[:, None] & column_inside[None, :]
    at = row.to(tl.int64)[:, None] * inputs + column[None, :]
    compute: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([ROWS, COLUMNS], dtype=compute)
    gain_total = tl.zeros([ROWS], dtype=compute)
    for number in range(group * together, tl.minimum(group * together + together, members)):
        member = tl.cast(number, tl.int64)
        product = accumulate(
            tl.zeros([ROWS, COLUMNS], dtype=compute),
            grad + member * grad_outer + row.to(tl.int64) * grad_column,
            0,
            grad_row,
            x + member * x_outer + column.to(tl.int64) * x_column,
            0,
            x_row,
            None,
            0,
            length,
            row_inside,
            column_inside,
            DEPTH,
        )
        if of_weight is not None:
            total += product
        if of_gain is not None:
            place = row.to(tl.int64)[:, None] * delta_row + column.to(tl.int64)[None, :] * delta_column
            shift = tl.load(delta + member * delta_member + place, mask=inside, other=0.0).to(compute)
            gain_total += tl.sum(product * shift, 1)
        if of_delta is not None:
            if gain is not None:
                product *= tl.load(gain + row * gain_step, mask=row_inside, other=0.0)[:, None]
            tl.store(of_delta + member * outputs * inputs + at, product.to(of_delta.dtype.element_ty), mask=inside)
    part = group.to(tl.int64)
    if of_weight is not None:
        to = of_weight + part * outputs * inputs + at
        tl.store(to, total.to(of_weight.dtype.element_ty), mask=inside)
    if of_gain is not None:
        tl.store(of_gain + (part * column_tiles + column_tile) * outputs + row, gain_total, mask=row_inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def up_gradient_kernel(
    of_up,
    of_coefficients,
    grad,
    grad_member: tl.int64,
    grad_row,
    grad_column,
    down,
    up,
    coefficients,
    factors: tl.int32,
    members: tl.int32,
    outputs: tl.int32,
    columns: tl.int32,
    inputs: tl.int32,
    together: tl.int32,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """P = grad down^T [outputs, columns] of each of `together` samples: the sum of c * P over them to of_up [groups,
    outputs, columns], and that of P * up over the rows of a tile to of_coefficients [tiles of rows, members, columns].
    Each where asked for; up [outputs, columns] has the gain in it."""
    row_tiles, column_tiles = tl.cdiv(outputs, ROWS), tl.cdiv(columns, COLUMNS)
    tiles = row_tiles * column_tiles
    row_tile, column_tile = tile_of(tl.program_id(0) % tiles, row_tiles, column_tiles)
    group = tl.program_id(0) // tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < outputs, column < columns
    inside = row_inside[:, None] & column_inside[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    compute: tl.constexpr = tl.float64 if down.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([ROWS, COLUMNS], dtype=compute)
    for number in range(group * together, tl.minimum(group * together + together, members)):
        member = tl.cast(number, tl.int64)
        product = accumulate(
            tl.zeros([ROWS, COLUMNS], dtype=compute),
            grad + member * grad_member + row.to(tl.int64) * grad_row,
            0,
            grad_column,
            down + column.to(tl.int64) * inputs,
            0,
            1,
            None,
            0,
            inputs,
            row_inside,
            column_inside,
            DEPTH,
        )
        if of_up is not None:
            scale = tl.load(coefficients + member * factors + column // RANK, mask=column_inside, other=0.0)
            total += product * scale[None, :]
        if of_coefficients is not None:
            value = tl.load(up + at, mask=inside, other=0.0).to(compute)
            to = of_coefficients + (tl.cast(row_tile, tl.int64) * members + member) * columns + column
            tl.store(to, tl.sum(product * value, 0), mask=column_inside)
    if of_up is not None:
        tl.store(of_up + group.to(tl.int64) * outputs * columns + at, total, mask=inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def down_gradient_kernel(
    out,
    up,
    grad,
    grad_member: tl.int64,
    grad_row,
    grad_column,
    coefficients,
    factors: tl.int32,
    members: tl.int32,
    outputs: tl.int32,
    columns: tl.int32,
    inputs: tl.int32,
    together: tl.int32,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out [groups, columns, inputs]: the sum of c * up^T grad over `together` samples; up [outputs, columns] has the
    gain in it."""
    row_tiles, column_tiles = tl.cdiv(columns, ROWS), tl.cdiv(inputs, COLUMNS)
    tiles = row_tiles * column_tiles
    row_tile, column_tile = tile_of(tl.program_id(0) % tiles, row_tiles, column_tiles)
    group = tl.program_id(0) // tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < columns, column < inputs
    compute: tl.constexpr = tl.float64 if up.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([ROWS, COLUMNS], dtype=compute)
    for number in range(group * together, tl.minimum(group * together + together, members)):
        member = tl.cast(number, tl.int64)
        product = accumulate(
            tl.zeros([ROWS, COLUMNS], dtype=compute),
            up + row,
            0,
            columns,
            grad + member * grad_member + column.to(tl.int64) * grad_column,
            0,
            grad_row,
            None,
            0,
            outputs,
            row_inside,
            column_inside,
            DEPTH,
        )
        scale = tl.load(coefficients + member * factors + row // RANK, mask=row_inside, other=0.0)
        total += product * scale[:, None]
    to = out + (group.to(tl.int64) * columns + row[:, None]) * inputs + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def gather_up_kernel(
    out,
    up,
    up_factor: tl.int64,
    up_row,
    up_column,
    gain,
    gain_step,
    rows,
    columns,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [rows, columns of all factors]: gain * up, factors side by side, in the type of out."""
    tiles = tl.cdiv(columns, BLOCK)
    row = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    place = (column // RANK) * up_factor + row.to(tl.int64) * up_row + column % RANK * up_column
    compute: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    value = tl.load(up + place, mask=inside, other=0.0).to(compute)
    if gain is not None:
        value *= tl.load(gain + row * gain_step)
    tl.store(out + row.to(tl.int64) * columns + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def finish_up_kernel(
    of_up,
    of_gain,
    partial,
    splits: tl.int32,
    up,
    up_factor: tl.int64,
    up_row,
    up_column,
    gain,
    gain_step,
    rows: tl.int32,
    columns: tl.int32,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum of partial [splits, rows, columns]: times the gain to of_up [factors, rows, RANK]; and the sum of it
    times up over the columns of a tile to of_gain [tiles of columns, rows]. Each where asked for."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    tile = tl.program_id(0) % column_tiles
    row = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = row < rows
    inside = row_inside[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=partial.dtype.element_ty)
    for split in range(splits):
        total += tl.load(partial + tl.cast(split, tl.int64) * rows * columns + at, mask=inside, other=0.0)
    factor, of_factor = column // RANK, column % RANK
    if of_gain is not None:
        place = factor[None, :] * up_factor + row.to(tl.int64)[:, None] * up_row + of_factor[None, :] * up_column
        value = tl.load(up + place, mask=inside, other=0.0).to(total.dtype)
        tl.store(of_gain + tl.cast(tile, tl.int64) * rows + row, tl.sum(total * value, 1), mask=row_inside)
    if of_up is not None:
        if gain is not None:
            total *= tl.load(gain + row * gain_step, mask=row_inside, other=0.0)[:, None]
        to = of_up + (factor.to(tl.int64)[None, :] * rows + row[:, None]) * RANK + of_factor[None, :]
        tl.store(to, total.to(of_up.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def sum_parts_kernel(out, partial, bias, splits: tl.int32, size: tl.int64, columns: tl.int32, BLOCK: tl.constexpr):
    """out [size]: the sum of partial [splits, size] in order, and the bias [columns] of each row."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = tl.zeros([BLOCK], dtype=partial.dtype.element_ty)
    for split in range(splits):
        total += tl.load(partial + tl.cast(split, tl.int64) * size + index, mask=inside, other=0.0)
    if bias is not None:
        value = tl.load(bias + index % columns, mask=inside, other=0.0)
        total += value.to(out.dtype.element_ty).to(total.dtype)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def sum_rows_kernel(
    partial,
    grad,
    grad_outer: tl.int64,
    grad_row,
    grad_column,
    length,
    tokens: tl.int32,
    columns: tl.int32,
    share: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial [splits, columns]: the sums of a share of the rows of grad."""
    tiles = tl.cdiv(columns, COLUMNS)
    split = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = column < columns
    compute: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([ROWS, COLUMNS], dtype=compute)
    for step in range(split * share, split * share + share):
        row = step * ROWS + tl.arange(0, ROWS)
        place = token_place(row, length, grad_outer, grad_row)[:, None] + column.to(tl.int64)[None, :] * grad_column
        total += tl.load(grad + place, mask=(row < tokens)[:, None] & column_inside[None, :], other=0.0).to(compute)
    tl.store(partial + split.to(tl.int64) * columns + column, tl.sum(total, 0), mask=column_inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def sum_terms_kernel(
    out,
    terms,
    inner: tl.int32,
    outer_step: tl.int64,
    row_step: tl.int64,
    inner_step: tl.int64,
    inner_terms: tl.int32,
    outer_terms: tl.int32,
    term_step: tl.int64,
    BLOCK: tl.constexpr,
):
    """out [.., inner]: each the sum of outer_terms * inner_terms terms at their two steps."""
    first = terms + (tl.program_id(0) // inner) * row_step + (tl.program_id(0) % inner) * inner_step
    total = tl.zeros([BLOCK], dtype=terms.dtype.element_ty)
    for start in range(0, outer_terms * inner_terms, BLOCK):
        index = start + tl.arange(0, BLOCK)
        place = first + (index // inner_terms) * outer_step + (index % inner_terms) * term_step
        total += tl.load(place, mask=index < outer_terms * inner_terms, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(total).to(out.dtype.element_ty))


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def waves_kernel(
    out,
    theta,
    theta_row: tl.int64,
    theta_column,
    directions,
    directions_row: tl.int64,
    directions_column,
    tokens: tl.int32,
    angles: tl.int32,
    depth: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out [tokens, 2 angles]: cosines, then sines, of theta directions^T."""
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.cdiv(angles, COLUMNS))
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < tokens, column < angles
    total = accumulate(
        tl.zeros([ROWS, COLUMNS], dtype=theta.dtype.element_ty),
        theta + row.to(tl.int64) * theta_row,
        0,
        theta_column,
        directions + column.to(tl.int64) * directions_row,
        0,
        directions_column,
        None,
        0,
        depth,
        row_inside,
        column_inside,
        DEPTH,
    )
    to = out + row.to(tl.int64)[:, None] * 2 * angles + column[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(to, tl.cos(total), mask=inside)
    tl.store(to + angles, tl.sin(total), mask=inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def angle_gradient_kernel(
    out,
    grad,
    grad_row: tl.int64,
    grad_column,
    coefficients,
    angles: tl.int32,
    BLOCK: tl.constexpr,
):
    """out [tokens, angles]: the gradient of the angles, from that of the coefficients [tokens, 2 angles] and these."""
    tiles = tl.cdiv(angles, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = column < angles
    source, of_angle = grad + row * grad_row + column * grad_column, coefficients + row * 2 * angles + column
    cosine = tl.load(of_angle, mask=inside, other=0.0)
    sine = tl.load(of_angle + angles, mask=inside, other=0.0)
    of_cosine = tl.load(source, mask=inside, other=0.0)
    of_sine = tl.load(source + angles * grad_column, mask=inside, other=0.0)
    tl.store(out + row * angles + column, of_sine * cosine - of_cosine * sine, mask=inside)
