"""Products of spectral_linear in Triton: x to the factors, the factors beside the weight, and W + Delta.

Tokens [B, T] are one axis: token i has its row at i // T * (stride of samples) + i % T * (stride of rows), or, where
those are one stride, at i * stride; then `length`, T, is None. Operands are in x's dtype T unless said otherwise.
"""

import triton
import triton.language as tl

#: Parameters whose divisibility makes no better code.
COUNTS = ("tokens", "length", "members", "share", "splits", "shared", "factors", "pieces", "terms", "together", "tiles")
#: Rows of tiles that programs take together, so that what they read is in the L2 cache.
GROUP = tl.constexpr(8)


@triton.jit
def tile_of(index, row_tiles, column_tiles):
    """The row and the column of a tile."""
    first = index // (GROUP * column_tiles) * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    return first + index % (GROUP * column_tiles) % rows, index % (GROUP * column_tiles) // rows


@triton.jit
def token_place(index, length, outer, step):
    """Where rows of tokens are (int64)."""
    if length is None:
        return index.to(tl.int64) * step
    else:  # noqa: RET505 - the other branch would be compiled too
        return (index // length).to(tl.int64) * outer + (index % length).to(tl.int64) * step


@triton.jit
def accumulate(
    total, a, a_outer, a_step, b, b_outer, b_step, length, first, last, row_inside, column_inside, DEPTH: tl.constexpr
):
    """total + a b over first .. last - 1 of the depth; a [rows], b [columns]: pointers to their depth 0."""
    for start in range(first, last, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth < last
        left = a[:, None] + token_place(depth, length, a_outer, a_step)[None, :]
        right = b[None, :] + token_place(depth, length, b_outer, b_step)[:, None]
        left = tl.load(left, mask=row_inside[:, None] & inside[None, :], other=0.0)
        right = tl.load(right, mask=inside[:, None] & column_inside[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit
def coefficient_place(row, column, shared, factors, RANK: tl.constexpr):
    """Where the coefficients of columns of the factors are; `shared` rows have the same ones."""
    return (row // shared).to(tl.int64) * factors + column // RANK


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def product_kernel(
    out,
    a,
    a_member: tl.int64,
    a_row,
    a_outer: tl.int64,
    a_step,
    b,
    b_member: tl.int64,
    b_column,
    b_outer: tl.int64,
    b_step,
    length,
    bias,
    rows: tl.int32,
    columns: tl.int32,
    depth: tl.int32,
    members: tl.int32,
    share: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out [splits, members, rows, columns]: a b, a share of the depth each, and the bias. The depth may be tokens."""
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    tiles = row_tiles * column_tiles
    row_tile, column_tile = tile_of(tl.program_id(0) % tiles, row_tiles, column_tiles)
    member = (tl.program_id(0) // tiles % members).to(tl.int64)
    split = tl.program_id(0) // tiles // members
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows, column < columns
    compute: tl.constexpr = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    total = accumulate(
        tl.zeros([ROWS, COLUMNS], dtype=compute),
        a + member * a_member + row.to(tl.int64) * a_row,
        a_outer,
        a_step,
        b + member * b_member + column.to(tl.int64) * b_column,
        b_outer,
        b_step,
        length,
        split * share * DEPTH,
        tl.minimum((split + 1) * share * DEPTH, depth),
        row_inside,
        column_inside,
        DEPTH,
    )
    if bias is not None:
        TYPE: tl.constexpr = a.dtype.element_ty
        total += tl.load(bias + column, mask=column_inside, other=0.0).to(TYPE).to(compute)[None, :]
    first = (split * members + member) * rows
    to = out + (first + row[:, None]) * columns + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def project_kernel(
    plain,
    scaled,
    x,
    x_outer: tl.int64,
    x_row,
    x_column,
    length,
    down,
    coefficients,
    shared: tl.int32,
    factors: tl.int32,
    tokens: tl.int32,
    columns: tl.int32,
    inputs: tl.int32,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x down^T [tokens, columns of the factors]: as it is, and times the coefficients; each where asked for."""
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.cdiv(columns, COLUMNS))
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < tokens, column < columns
    compute: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = accumulate(
        tl.zeros([ROWS, COLUMNS], dtype=compute),
        x + token_place(row, length, x_outer, x_row),
        0,
        x_column,
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
    inside = row_inside[:, None] & column_inside[None, :]
    to = row.to(tl.int64)[:, None] * columns + column[None, :]
    if plain is not None:
        tl.store(plain + to, total.to(plain.dtype.element_ty), mask=inside)
    if scaled is not None:
        place = coefficient_place(row[:, None], column[None, :], shared, factors, RANK)
        total *= tl.load(coefficients + place, mask=inside, other=0.0)
        tl.store(scaled + to, total.to(scaled.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def projected_gradient_kernel(
    gradient,
    scaled,
    of_coefficients,
    grad,
    grad_outer: tl.int64,
    grad_row,
    grad_column,
    length,
    up,
    plain,
    coefficients,
    shared: tl.int32,
    factors: tl.int32,
    tokens: tl.int32,
    columns: tl.int32,
    outputs: tl.int32,
    pieces: tl.int32,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The gradient grad up [tokens, columns] of c * plain, plain = x down^T: c times it; beside it c * plain; and
    of_coefficients [pieces, tokens, factors], the sums over a factor's columns of it times plain; each where asked for.

    A tile has COLUMNS / WIDTH factors of WIDTH places for their columns, so that a row's sums are of whole rows of
    places; or a piece of one factor. up [outputs, columns] has the gain in it."""
    each: tl.constexpr = COLUMNS // WIDTH
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.cdiv(factors, each) * pieces)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    place, piece = tl.arange(0, COLUMNS), column_tile % pieces
    of_factor = piece * WIDTH + place % WIDTH
    factor = column_tile // pieces * each + place // WIDTH
    column = factor * RANK + of_factor
    row_inside = row < tokens
    column_inside = (of_factor < RANK) & (factor < factors) & (column < columns)
    compute: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    total = accumulate(
        tl.zeros([ROWS, COLUMNS], dtype=compute),
        grad + token_place(row, length, grad_outer, grad_row),
        0,
        grad_column,
        up + column,
        0,
        columns,
        None,
        0,
        outputs,
        row_inside,
        column_inside,
        DEPTH,
    )
    inside = row_inside[:, None] & column_inside[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    place = (row // shared).to(tl.int64)[:, None] * factors + factor[None, :]
    scale = tl.load(coefficients + place, mask=inside, other=0.0)
    if plain is not None:
        value = tl.load(plain + at, mask=inside, other=0.0).to(compute)
        if scaled is not None:
            tl.store(scaled + at, (value * scale).to(scaled.dtype.element_ty), mask=inside)
        if of_coefficients is not None:
            sums = tl.sum(tl.reshape(total * value, (ROWS, each, WIDTH)), 2)
            number = column_tile // pieces * each + tl.arange(0, each)
            first = (piece.to(tl.int64) * tokens + row[:, None]) * factors
            known = row_inside[:, None] & (number < factors)[None, :]
            tl.store(of_coefficients + first + number[None, :], sums, mask=known)
    if gradient is not None:
        tl.store(gradient + at, (total * scale).to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def combine_kernel(
    out,
    scaled,
    factor,
    factor_column,
    factor_step,
    columns: tl.int32,
    x,
    x_outer: tl.int64,
    x_row,
    x_column,
    length,
    weight,
    weight_column,
    weight_step,
    bias,
    tokens: tl.int32,
    outputs: tl.int32,
    depth: tl.int32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out [tokens, outputs] = scaled [tokens, columns] factor + x weight + bias, in one tile of sums."""
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.cdiv(outputs, COLUMNS))
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < tokens, column < outputs
    compute: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = accumulate(
        tl.zeros([ROWS, COLUMNS], dtype=compute),
        scaled + row.to(tl.int64) * columns,
        0,
        1,
        factor + column.to(tl.int64) * factor_column,
        0,
        factor_step,
        None,
        0,
        columns,
        row_inside,
        column_inside,
        DEPTH,
    )
    total = accumulate(
        total,
        x + token_place(row, length, x_outer, x_row),
        0,
        x_column,
        weight + column.to(tl.int64) * weight_column,
        0,
        weight_step,
        None,
        0,
        depth,
        row_inside,
        column_inside,
        DEPTH,
    )
    if bias is not None:
        TYPE: tl.constexpr = x.dtype.element_ty
        total += tl.load(bias + column, mask=column_inside, other=0.0).to(TYPE).to(compute)[None, :]
    to = out + row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def delta_kernel(
    out,
    up,
    down,
    coefficients,
    gain,
    gain_step,
    weight,
    factors: tl.int32,
    outputs: tl.int32,
    columns: tl.int32,
    inputs: tl.int32,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out [members, outputs, inputs] = gain * up diag(c) down, and the weight (of T or float32) where there is one."""
    row_tiles, column_tiles = tl.cdiv(outputs, ROWS), tl.cdiv(inputs, COLUMNS)
    tiles = row_tiles * column_tiles
    row_tile, column_tile = tile_of(tl.program_id(0) % tiles, row_tiles, column_tiles)
    member = (tl.program_id(0) // tiles).to(tl.int64)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < outputs, column < inputs
    TYPE: tl.constexpr = down.dtype.element_ty
    compute: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    total = tl.zeros([ROWS, COLUMNS], dtype=compute)
    from_row = up + row.to(tl.int64) * columns
    for start in range(0, columns, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth < columns
        scale = tl.load(coefficients + member * factors + depth // RANK, mask=inside, other=0.0)
        left = from_row[:, None] + depth[None, :]
        left = tl.load(left, mask=row_inside[:, None] & inside[None, :], other=0.0)
        left = (left.to(compute) * scale[None, :]).to(TYPE)
        right = down + depth.to(tl.int64)[:, None] * inputs + column[None, :]
        right = tl.load(right, mask=inside[:, None] & column_inside[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=compute)
    if gain is not None:
        total *= tl.load(gain + row * gain_step, mask=row_inside, other=0.0)[:, None]
    at = row.to(tl.int64)[:, None] * inputs + column[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    if weight is not None:
        total += tl.load(weight + at, mask=inside, other=0.0).to(compute)
    to = out + member * outputs * inputs + at
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def shifted_kernel(
    out,
    x,
    x_outer: tl.int64,
    x_row,
    x_column,
    weight,
    weight_column,
    weight_step,
    delta,
    delta_member: tl.int64,
    delta_column,
    delta_step,
    gain,
    gain_step,
    bias,
    length: tl.int32,
    columns: tl.int32,
    depth: tl.int32,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out [members, length, columns] = x (weight + gain * delta) + bias; the sum is made in registers, rounded once.

    The gain is of a row of the weight: of a column here, BACKWARD of the depth."""
    row_tiles, column_tiles = tl.cdiv(length, ROWS), tl.cdiv(columns, COLUMNS)
    tiles = row_tiles * column_tiles
    row_tile, column_tile = tile_of(tl.program_id(0) % tiles, row_tiles, column_tiles)
    member = (tl.program_id(0) // tiles).to(tl.int64)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < length, column < columns
    TYPE: tl.constexpr = x.dtype.element_ty
    compute: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    total = tl.zeros([ROWS, COLUMNS], dtype=compute)
    from_row = x + member * x_outer + row.to(tl.int64) * x_row
    from_weight = weight + column.to(tl.int64) * weight_column
    from_delta = delta + member * delta_member + column.to(tl.int64) * delta_column
    if gain is not None and not BACKWARD:
        scale = tl.load(gain + column * gain_step, mask=column_inside, other=0.0)[None, :]
    for start in range(0, depth, DEPTH):
        index = start + tl.arange(0, DEPTH)
        inside = index < depth
        left = from_row[:, None] + index.to(tl.int64)[None, :] * x_column
        left = tl.load(left, mask=row_inside[:, None] & inside[None, :], other=0.0)
        known = inside[:, None] & column_inside[None, :]
        shift = tl.load(from_delta[None, :] + index.to(tl.int64)[:, None] * delta_step, mask=known, other=0.0)
        shift = shift.to(compute)
        if gain is not None:
            if BACKWARD:
                scale = tl.load(gain + index * gain_step, mask=inside, other=0.0)[:, None]
            shift *= scale
        right = tl.load(from_weight[None, :] + index.to(tl.int64)[:, None] * weight_step, mask=known, other=0.0)
        right = (right.to(compute) + shift).to(TYPE)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=compute)
    if bias is not None:
        total += tl.load(bias + column, mask=column_inside, other=0.0).to(TYPE).to(compute)[None, :]
    to = out + (member * length + row[:, None]) * columns + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])
