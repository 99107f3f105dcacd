"""Products with W' in Triton: made in registers as W is read, for the rows that one program multiplies.

A tile of W is made of whole groups of WIDTH elements of the stream, so that every block of Philox is used in full.
Where rows start at different places in a group, a tile takes every `classes`-th row: these start at the same. Its
columns begin `shift` before the first of W, masked off, and each class of rows has tiles of its own.
"""

import triton
import triton.language as tl

from ..perturb.triton_kernels import MEMBER, ROW
from ..philox.triton_kernels import CALL_VALUES, elements, key_of, noise_of, scalar

#: Whether there is a bias, and noise on it.
NO_BIAS = tl.constexpr(0)
PLAIN = tl.constexpr(1)
NOISY = tl.constexpr(2)
#: Parameters that change from call to call, or whose divisibility makes no better code.
VALUES = (*CALL_VALUES, "sigma_low", "sigma_high", "bias_low", "bias_high", "row_offset", "samples", "length")
COUNTS = ("members", "sets", "sequence", "classes", "tiles", "column_tiles", "blocks", "steps", "count", "together")


@triton.jit
def tile_rows(tile, row_class, classes, ROWS: tl.constexpr):
    """The rows of W (int64 [ROWS]) of a tile of one class."""
    return row_class + classes * (tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))


@triton.jit
def tile_columns(tile, shift, COLUMNS: tl.constexpr):
    """The columns of W (int64 [COLUMNS]) of a tile: it starts with a group, `shift` before a column of W."""
    return tl.cast(tile, tl.int64) * COLUMNS - shift + tl.arange(0, COLUMNS)


@triton.jit
def tile_noise(
    row, tile, shift, key, place, KIND: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The noise (float32 [ROWS, COLUMNS]) of a tile of columns of rows that all start `shift` after a group's start.

    place: stream, domain, group, skip and row_length."""
    stream, domain, group, skip, row_length = place
    first = group + (skip + row * row_length - shift) // WIDTH + tl.cast(tile, tl.int64) * (COLUMNS // WIDTH)
    groups = (first[:, None] + tl.arange(0, COLUMNS // WIDTH)[None, :]).to(tl.uint64)
    stream_word = stream.to(tl.uint32, bitcast=True)
    domain_word = domain.to(tl.uint32, bitcast=True)
    made = elements(groups, stream_word, domain_word, key[0], key[1], KIND, WIDTH, ROWS * COLUMNS)
    return tl.reshape(made, (ROWS, COLUMNS))


@triton.jit
def perturbed(
    value, epsilon, sigma, member, row, column, bounds, SIGMA: tl.constexpr, EVEN: tl.constexpr, TYPE: tl.constexpr
):
    """A member's W' of a tile of weights (float32 or float64), rounded to TYPE; 0 outside of W.

    sigma: pointer or None, the two words of its value, stride of members; bounds: rows and columns of W."""
    sigmas, low, high, stride = sigma
    rows, columns = bounds
    inside = (row < rows)[:, None] & ((column >= 0) & (column < columns))[None, :]
    if sigmas is None:
        scale = scalar(low, high, value.dtype)
    elif SIGMA == MEMBER:
        scale = tl.load(sigmas + member * stride)
    elif SIGMA == ROW:
        scale = tl.load(sigmas + member * stride + row, mask=row < rows, other=0.0)[:, None]
    else:
        scale = tl.load(sigmas + member * stride + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    made = value + scale * epsilon.to(value.dtype)
    if not EVEN:
        # There is noise outside too: an infinite one must not meet the zeros that stand for x there.
        made = tl.where(inside, made, 0.0)
    return made.to(TYPE)


@triton.jit
def perturbed_bias(
    bias,
    sigma,
    member,
    index,
    inside,
    key,
    place,
    row_offset,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
    TYPE: tl.constexpr,
):
    """A member's bias, with its noise if NOISY, rounded to TYPE, in the type that sums are made in."""
    compute: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    value = tl.load(bias + index, mask=inside, other=0.0).to(compute)
    if BIAS == NOISY:
        sigmas, low, high, stride, step = sigma
        if sigmas is None:
            scale = scalar(low, high, compute)
        else:
            scale = tl.load(sigmas + member * stride + index * step, mask=inside, other=0.0)
        element = (row_offset + index).to(tl.uint64)
        value += scale * noise_of(element, place[0], place[1] + 256, key[0], key[1], KIND).to(compute)
    return value.to(TYPE).to(compute)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def product_kernel(
    out,
    x,
    x_member: tl.int64,
    x_row,
    x_column,
    samples: tl.int32,
    weight,
    weight_row,
    weight_column,
    rows: tl.int64,
    columns: tl.int64,
    sigmas,
    sigma_low: tl.int32,
    sigma_high: tl.int32,
    sigma_stride: tl.int64,
    bias,
    bias_sigmas,
    bias_low: tl.int32,
    bias_high: tl.int32,
    bias_stride: tl.int64,
    bias_step: tl.int64,
    row_offset: tl.int64,
    seeds,
    low: tl.int32,
    high: tl.int32,
    stream: tl.int32,
    domain: tl.int32,
    group: tl.int64,
    skip: tl.int64,
    row_length: tl.int64,
    members: tl.int32,
    sets: tl.int32,
    sequence: tl.int32,
    classes: tl.int32,
    tiles: tl.int32,
    blocks: tl.int32,
    steps: tl.int32,
    length: tl.int32,
    BACKWARD: tl.constexpr,
    PAIRED: tl.constexpr,
    SUMMED: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    SIGMA: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x W'^T, or with BACKWARD x W', of BLOCK samples: out [parts, members, samples, rows or columns of W].

    A program has a tile of the result and `length` steps of its sum. A set is a member or, PAIRED, two: they share what
    is read of W, and the noise too if their seeds are equal. SUMMED adds up all members' results."""
    program = tl.program_id(0)
    first_set = program % sets
    sample = (program // sets % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_class = (program // sets // blocks % classes).to(tl.int64)
    tile = program // sets // blocks // classes % tiles
    split = program // sets // blocks // classes // tiles
    TYPE: tl.constexpr = x.dtype.element_ty
    EACH: tl.constexpr = 2 if PAIRED else 1
    compute: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    # A zero that the compiler knows makes 128-bit loads.
    shift = 0 if EVEN else (skip + row_class * row_length) % WIDTH
    place = (stream, domain, group, skip, row_length)
    sigma = (sigmas, sigma_low, sigma_high, sigma_stride)
    bounds = (rows, columns)
    member = (first_set * EACH).to(tl.int64)
    other = tl.minimum(member + EACH - 1, members - 1)
    key, other_key = key_of(seeds, member, low, high), key_of(seeds, other, low, high)
    total = tl.zeros([COLUMNS if BACKWARD else ROWS, BLOCK], dtype=compute)
    other_total = total
    for step in range(split * length, tl.minimum(split * length + length, steps * sequence)):
        at = step
        if SUMMED:
            at = step // sequence
            member = (step % sequence * EACH).to(tl.int64)
            other = tl.minimum(member + EACH - 1, members - 1)
            key, other_key = key_of(seeds, member, low, high), key_of(seeds, other, low, high)
        row = tile_rows(at if BACKWARD else tile, row_class, classes, ROWS)
        column_tile = tile if BACKWARD else at
        column = tile_columns(column_tile, shift, COLUMNS)
        source = weight + row[:, None] * weight_row + column[None, :] * weight_column
        index = row if BACKWARD else column
        factors = x + sample[None, :] * x_row + index[:, None] * x_column
        known = (sample < samples)[None, :]
        if EVEN:
            value = tl.load(source).to(compute)
        else:
            inside = (row < rows)[:, None] & ((column >= 0) & (column < columns))[None, :]
            value = tl.load(source, mask=inside, other=0.0).to(compute)
            known = known & ((index >= 0) & (index < (rows if BACKWARD else columns)))[:, None]
        epsilon = tile_noise(row, column_tile, shift, key, place, KIND, WIDTH, ROWS, COLUMNS)
        made = perturbed(value, epsilon, sigma, member, row, column, bounds, SIGMA, EVEN, TYPE)
        factor = tl.load(factors + member * x_member, mask=known, other=0.0)
        total = tl.dot(tl.trans(made) if BACKWARD else made, factor, total, input_precision="ieee", out_dtype=compute)
        if PAIRED:
            if (key[0] != other_key[0]) | (key[1] != other_key[1]):
                epsilon = tile_noise(row, column_tile, shift, other_key, place, KIND, WIDTH, ROWS, COLUMNS)
            made = perturbed(value, epsilon, sigma, other, row, column, bounds, SIGMA, EVEN, TYPE)
            # The last of an odd number of members is its own other.
            factor = tl.load(factors + other * x_member, mask=known & (other > member), other=0.0)
            made = tl.trans(made) if BACKWARD else made
            if SUMMED:
                total = tl.dot(made, factor, total, input_precision="ieee", out_dtype=compute)
            else:
                other_total = tl.dot(made, factor, other_total, input_precision="ieee", out_dtype=compute)
    index = tile_columns(tile, shift, COLUMNS) if BACKWARD else tile_rows(tile, row_class, classes, ROWS)
    size = columns if BACKWARD else rows
    known = (index >= 0) & (index < size)
    part = (split * classes + row_class if BACKWARD else split).to(tl.int64)
    to = out + (part * (1 if SUMMED else members) * samples + sample[None, :]) * size + index[:, None]
    mask = known[:, None] & (sample < samples)[None, :]
    bias_sigma = (bias_sigmas, bias_low, bias_high, bias_stride, bias_step)
    if BIAS != NO_BIAS:
        made = perturbed_bias(bias, bias_sigma, member, index, known, key, place, row_offset, BIAS, KIND, TYPE)
        total += made[:, None]
    if SUMMED:
        tl.store(to, total.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(to + member * samples * size, total.to(out.dtype.element_ty), mask=mask)
        if PAIRED:
            if BIAS != NO_BIAS:
                made = perturbed_bias(
                    bias, bias_sigma, other, index, known, other_key, place, row_offset, BIAS, KIND, TYPE
                )
                other_total += made[:, None]
            mask = mask & (other > member)
            tl.store(to + other * samples * size, other_total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def sum_parts_kernel(
    out,
    partial,
    count: tl.int32,
    samples: tl.int32,
    size: tl.int64,
    bias,
    bias_sigmas,
    bias_low: tl.int32,
    bias_high: tl.int32,
    bias_stride: tl.int64,
    bias_step: tl.int64,
    row_offset: tl.int64,
    seeds,
    low: tl.int32,
    high: tl.int32,
    stream: tl.int32,
    domain: tl.int32,
    members: tl.int32,
    blocks: tl.int32,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out [members, samples, size]: the sum of partial [count, members, samples, size] in order, and the bias."""
    program = tl.program_id(0)
    member = (program % members).to(tl.int64)
    sample = (program // members % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = (program // members // blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    known = index < size
    mask = (sample < samples)[:, None] & known[None, :]
    position = (member * samples + sample[:, None]) * size + index[None, :]
    total = tl.zeros([BLOCK, COLUMNS], dtype=partial.dtype.element_ty)
    for part in range(count):
        total += tl.load(partial + tl.cast(part, tl.int64) * members * samples * size + position, mask=mask, other=0.0)
    if BIAS != NO_BIAS:
        sigma = (bias_sigmas, bias_low, bias_high, bias_stride, bias_step)
        key, place = key_of(seeds, member, low, high), (stream, domain)
        TYPE: tl.constexpr = out.dtype.element_ty
        made = perturbed_bias(bias, sigma, member, index, known, key, place, row_offset, BIAS, KIND, TYPE)
        total += made[None, :]
    tl.store(out + position, total.to(out.dtype.element_ty), mask=mask)
