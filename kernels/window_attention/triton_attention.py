"""Attention of tiles of rows in Triton: of tokens inside windows, and of windows to each other's summaries.

Row t sees the keys begin(t) <= j < end(t), which covers windows, causal or not, and those of documents. For the
exchange rows are windows, all in one "window", keys and values are z, and a row's query is the z of its source.
A tile's rows are of one window, so that nothing of another meets them, not even a zero times a NaN; documents apart.
"""

import triton
import triton.language as tl

from ..philox.triton_kernels import scalar

#: Parameters that change from call to call, or whose divisibility makes no better code.
VALUES = ("scale_low", "scale_high", "length", "window", "tile_window")
COUNTS = ("heads", "group", "tiles", "parts")


@triton.jit
def tile_rows(tile, tile_window, parts, length, BLOCK: tl.constexpr):
    """The rows (int32 [BLOCK]) of a tile, and which of them there are. A window has `parts` tiles."""
    first = tile // parts * tile_window
    row = first + tile % parts * BLOCK + tl.arange(0, BLOCK)
    return row, row < tl.minimum(first + tile_window, length)


@triton.jit
def window_of(row, bounds, length, window):
    """The first row of the windows that rows are in, and their ends; bounds: of documents [2, T], or None."""
    if bounds is None:
        begin = row // window * window
        end = tl.minimum(begin + window, length)
    else:
        inside = tl.minimum(row, length - 1)
        begin = tl.load(bounds + inside)
        end = tl.load(bounds + length + inside)
    return begin, end


@triton.jit
def keys_of(row, known, bounds, length, window, CAUSAL: tl.constexpr, EXCHANGE: tl.constexpr):
    """The first key that each row sees, and the end of them: none where there is no row."""
    begin, end = window_of(row, bounds, length, window)
    if CAUSAL:
        # A window does not see itself.
        end = row if EXCHANGE else row + 1
    return begin, tl.where(known, end, 0)


@triton.jit
def load_rows(head, row, step, known, width, EVEN: tl.constexpr, D: tl.constexpr):
    """Rows of one head [rows, D], 0 where there are none; EVEN: width == D."""
    column = tl.arange(0, D)
    mask = known[:, None] if EVEN else known[:, None] & (column < width)[None, :]
    return tl.load(head + row[:, None] * step + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(head, row, step, known, width, value, EVEN: tl.constexpr, D: tl.constexpr):
    """Rows of one head."""
    column = tl.arange(0, D)
    mask = known[:, None] if EVEN else known[:, None] & (column < width)[None, :]
    tl.store(head + row[:, None] * step + column[None, :], value.to(head.dtype.element_ty), mask=mask)


@triton.jit
def load_queries(
    head,
    row,
    step,
    known,
    source,
    length,
    width,
    CAUSAL: tl.constexpr,
    EXCHANGE: tl.constexpr,
    EVEN: tl.constexpr,
    D: tl.constexpr,
):
    """The queries of rows; of the exchange that of each one's source, NaN where that is out of range.

    source: of the batch, int64 [W], or None: a row itself, or the one before it where CAUSAL."""
    if EXCHANGE:
        at = row - 1 if CAUSAL else row
        if source is not None:
            at = tl.load(source + row, mask=known, other=0)
        inside = (at >= 0) & (at < (row if CAUSAL else length))
        queries = load_rows(head, at, step, known & inside, width, EVEN, D)
        # The first window of a causal exchange has no query.
        outside = known & (inside == 0) & (row > 0 if CAUSAL else known)
        not_a_number = tl.full([row.shape[0], D], float("nan"), dtype=tl.float32).to(queries.dtype)
        return tl.where(outside[:, None], not_a_number, queries)
    return load_rows(head, row, step, known, width, EVEN, D)


@triton.jit
def sees(begin, end, key):
    """Whether rows see keys: [rows, keys]."""
    return (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])


@triton.jit
def exponent_base(largest):
    """What is taken from scores before their exponentials; 0 where there is no score yet."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def attention_kernel(
    out,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int64,
    q,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_row: tl.int64,
    k,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int64,
    v,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int64,
    source,
    source_batch: tl.int64,
    bounds,
    bounds_batch: tl.int64,
    weights,
    summary,
    scale_low: tl.int32,
    scale_high: tl.int32,
    length: tl.int32,
    width: tl.int32,
    window: tl.int32,
    tile_window: tl.int32,
    parts: tl.int32,
    tiles: tl.int32,
    heads: tl.int32,
    group: tl.int32,
    CAUSAL: tl.constexpr,
    EXCHANGE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """out, and with weights [B, H, T] summary [B, H, tiles, d], the weighted sum of each tile's rows."""
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    key_head = head // group
    TYPE: tl.constexpr = q.dtype.element_ty
    compute: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    scale = scalar(scale_low, scale_high, compute)
    row, known = tile_rows(tile, tile_window, parts, length, BLOCK)
    of_batch = None if bounds is None else bounds + batch * bounds_batch
    sources = None if source is None else source + batch * source_batch
    begin, end = keys_of(row, known, of_batch, length, window, CAUSAL, EXCHANGE)
    queries = load_queries(
        q + batch * q_batch + head * q_head, row, q_row, known, sources, length, width, CAUSAL, EXCHANGE, EVEN, D
    )
    keys_at = k + batch * k_batch + key_head * k_head
    values_at = v + batch * v_batch + key_head * v_head
    largest = tl.full([BLOCK], float("-inf"), dtype=compute)
    total = tl.zeros([BLOCK], dtype=compute)
    sums = tl.zeros([BLOCK, D], dtype=compute)
    # begin and end do not fall from row to row; where there is no row end is 0.
    last_key = tl.max(end, 0)
    for start in range(tl.min(tl.where(known, begin, last_key), 0), last_key, BLOCK):
        key = start + tl.arange(0, BLOCK)
        keys = load_rows(keys_at, key, k_row, key < last_key, width, EVEN, D)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee", out_dtype=compute) * scale
        scores = tl.where(sees(begin, end, key), scores, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(scores, 1))
        base = exponent_base(largest)
        p = tl.exp(scores - base[:, None])
        factor = tl.exp(before - base)
        total = total * factor + tl.sum(p, 1)
        values = keys if EXCHANGE else load_rows(values_at, key, v_row, key < last_key, width, EVEN, D)
        added = tl.dot(p.to(TYPE), values, input_precision="ieee", out_dtype=compute)
        sums = sums * factor[:, None] + added
    seeing = begin < end
    sums = tl.where(seeing[:, None], sums / tl.where(seeing, total, 1.0)[:, None], 0.0)
    store_rows(out + batch * out_batch + head * out_head, row, out_row, known, width, sums, EVEN, D)
    if weights is not None:
        weight = tl.load(weights + (batch * heads + head) * length + row, mask=known, other=0.0)
        column = tl.arange(0, D)
        part = tl.sum(sums * weight[:, None], 0).to(summary.dtype.element_ty)
        tl.store(summary + ((batch * heads + head) * tiles + tile) * width + column, part, mask=column < width)
