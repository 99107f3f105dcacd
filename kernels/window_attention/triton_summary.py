"""What is done once for each window beside its attention, in Triton: the weights of its summary, sums of its rows, what
the exchange adds to them, and where the windows of documents are."""

import triton
import triton.language as tl

#: Parameters that change from call to call, or whose divisibility makes no better code.
VALUES = ("length", "window", "most", "documents", "steps")
COUNTS = ("heads", "windows", "parts", "tiles", "batches")


@triton.jit(do_not_specialize=VALUES)
def document_bounds_kernel(
    bounds, starts, starts_batch: tl.int64, length: tl.int32, window: tl.int32, documents: tl.int32, BLOCK: tl.constexpr
):
    """bounds [B, 2, T]: the first row of each row's window, and its end. Whatever the starts are, a row is in its
    window and that in the rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    known = row < length
    of_batch = starts + batch * starts_batch
    low = tl.zeros([BLOCK], dtype=tl.int32)  # the last start that is at most a row is in low .. high - 1
    high = low + documents
    while tl.max(high - low, 0) > 1:
        middle = (low + high) // 2
        after = tl.load(of_batch + middle, mask=middle < documents, other=0) > row
        single = high - low <= 1
        low, high = tl.where(after | single, low, middle), tl.where(after & (single == 0), middle, high)
    first = tl.maximum(0, tl.minimum(tl.load(of_batch + low), row))
    next_start = tl.load(of_batch + high, mask=high < documents, other=0)
    end = tl.where(high < documents, tl.maximum(row + 1, tl.minimum(next_start, length)), length)
    begin = first + (row - first) // window * window
    to = bounds + batch * 2 * length + row
    tl.store(to, begin, mask=known)
    tl.store(to + length, tl.minimum(begin + window, end), mask=known)


@triton.jit
def tokens_of(length, window, windows):
    """Of this program's window: where its select, its weights and so on are in [B, H, T], and how many."""
    program = tl.program_id(0).to(tl.int64)
    first = program % windows * window
    return program // windows * length + first, tl.minimum(window, length - first).to(tl.int32)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def summary_weights_kernel(
    weights,
    select,
    length: tl.int64,
    window: tl.int64,
    windows: tl.int32,
    most: tl.int64,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weights [B, H, T]: the softmax of select over the `most` largest of a window, ties to the lowest index; 0 of the
    others. ALL: every token is among them."""
    at, count = tokens_of(length, window, windows)
    compute: tl.constexpr = weights.dtype.element_ty
    highest = tl.full([BLOCK], float("-inf"), dtype=compute)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        highest = tl.maximum(highest, tl.load(select + at + token, mask=token < count, other=float("-inf")))
    largest = tl.max(highest, 0)
    totals = tl.zeros([BLOCK], dtype=compute)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        own = tl.load(select + at + token, mask=token < count, other=float("-inf"))
        weight = tl.where(token < count, tl.exp(own - largest), 0.0)
        if not ALL:
            before = tl.zeros([BLOCK], dtype=tl.int32)
            for other_start in range(0, count, BLOCK):
                other = other_start + tl.arange(0, BLOCK)
                value = tl.load(select + at + other, mask=other < count, other=float("-inf"))
                ahead = (value[None, :] == own[:, None]) & (other[None, :] < token[:, None])
                ahead = (ahead | (value[None, :] > own[:, None])) & (other < count)[None, :]
                before += tl.sum(ahead.to(tl.int32), 1)
            weight = tl.where(before < most, weight, 0.0)
        totals += weight
        tl.store(weights + at + token, weight, mask=token < count)
    total = tl.sum(totals, 0)
    # Each thread may read what another has written.
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        weight = tl.load(weights + at + token, mask=token < count, other=0.0)
        tl.store(weights + at + token, weight / total, mask=token < count)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def select_gradient_kernel(
    of_select,
    weights,
    of_weights,
    length: tl.int64,
    window: tl.int64,
    windows: tl.int32,
    BLOCK: tl.constexpr,
):
    """of_select = weights (of_weights - the sum over the window of weights of_weights), all [B, H, T]."""
    at, count = tokens_of(length, window, windows)
    totals = tl.zeros([BLOCK], dtype=weights.dtype.element_ty)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        weight = tl.load(weights + at + token, mask=token < count, other=0.0)
        totals += weight * tl.load(of_weights + at + token, mask=token < count, other=0.0)
    total = tl.sum(totals, 0)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        weight = tl.load(weights + at + token, mask=token < count, other=0.0)
        gradient = weight * (tl.load(of_weights + at + token, mask=token < count, other=0.0) - total)
        tl.store(of_select + at + token, gradient, mask=token < count)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def sum_parts_kernel(
    summary,
    partial,
    width: tl.int64,
    windows: tl.int32,
    parts: tl.int32,
    tiles: tl.int32,
    D: tl.constexpr,
):
    """summary [B, H, W, d]: the sums of the parts of each window, of partial [B, H, tiles, d], in order."""
    program = tl.program_id(0).to(tl.int64)
    first = program % windows * parts
    column = tl.arange(0, D)
    total = tl.zeros([D], dtype=partial.dtype.element_ty)
    for tile in range(first, tl.minimum(first + parts, tiles)):
        total += tl.load(partial + (program // windows * tiles + tile) * width + column, mask=column < width, other=0.0)
    tl.store(summary + program * width + column, total.to(summary.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def sum_rows_kernel(
    sums,
    rows,
    rows_batch: tl.int64,
    rows_head: tl.int64,
    rows_row: tl.int64,
    length: tl.int64,
    width: tl.int64,
    window: tl.int64,
    windows: tl.int32,
    heads: tl.int32,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """sums [B, H, W, d] of the rows of each window."""
    program = tl.program_id(0).to(tl.int64)
    head = program // windows
    first = program % windows * window
    source = rows + head // heads * rows_batch + head % heads * rows_head
    column = tl.arange(0, D)
    compute: tl.constexpr = tl.float64 if rows.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK, D], dtype=compute)
    last = tl.minimum(first + window, length)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = (row < last)[:, None] & (column < width)[None, :]
        total += tl.load(source + row[:, None] * rows_row + column[None, :], mask=mask, other=0.0).to(compute)
    made = tl.sum(total, 0).to(sums.dtype.element_ty)
    tl.store(sums + program * width + column, made, mask=column < width)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def add_exchanged_kernel(
    out,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_row: tl.int64,
    e,
    gate,
    length: tl.int64,
    width: tl.int64,
    window: tl.int64,
    windows: tl.int32,
    heads: tl.int32,
    tiles: tl.int32,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """The rows of each window += gate e, e [B, H, W, d]. Heads before tokens, as they most often lie in memory."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    row = (program // heads % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    batch = (program // heads // tiles).to(tl.int64)
    column = tl.arange(0, D)
    mask = (row < length)[:, None] & (column < width)[None, :]
    compute: tl.constexpr = gate.dtype.element_ty
    to = out + batch * out_batch + head * out_head + row[:, None] * out_row + column[None, :]
    place = ((batch * heads + head) * windows + row // window) * width
    added = tl.load(e + place[:, None] + column[None, :], mask=mask, other=0.0).to(compute)
    result = tl.load(to, mask=mask, other=0.0).to(compute) + tl.load(gate + head) * added
    tl.store(to, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def source_gradient_kernel(
    of_summary,
    of_keys,
    of_queries,
    source,
    source_batch: tl.int64,
    gate,
    width: tl.int64,
    windows: tl.int32,
    heads: tl.int32,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """of_summary [B, H, W, d] = gate (of_keys + the of_queries of the windows whose source a window is), added in a
    fixed order; a gate of None is 1."""
    program = tl.program_id(0).to(tl.int64)
    window = program % windows
    head = program // windows
    column = tl.arange(0, D)
    total = tl.load(of_keys + program * width + column, mask=column < width, other=0.0)
    if source is None:
        user = window + 1 if CAUSAL else window
        mask = (column < width) & (user < windows)
        total += tl.load(of_queries + (head * windows + user) * width + column, mask=mask, other=0.0)
    else:
        # A window uses one before it where CAUSAL; the first uses none.
        for start in range(window + 1 if CAUSAL else window * 0, windows, BLOCK):
            user = start + tl.arange(0, BLOCK)
            at = tl.load(source + head // heads * source_batch + user, mask=user < windows, other=-1)
            uses = at == window
            if tl.max(uses.to(tl.int32), 0) > 0:
                place = (head * windows + user) * width
                mask = uses[:, None] & (column < width)[None, :]
                total += tl.sum(tl.load(of_queries + place[:, None] + column[None, :], mask=mask, other=0.0), 0)
    if gate is not None:
        total *= tl.load(gate + head % heads)
    tl.store(of_summary + program * width + column, total.to(of_summary.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def gate_gradient_kernel(of_gate, products, batches: tl.int32, heads: tl.int32, windows: tl.int32, BLOCK: tl.constexpr):
    """of_gate [H]: the sums of products [B, H, W] over batches and windows."""
    head = tl.program_id(0).to(tl.int64)
    totals = tl.zeros([BLOCK], dtype=products.dtype.element_ty)
    for batch in range(batches):
        first = (tl.cast(batch, tl.int64) * heads + head) * windows
        for start in range(0, windows, BLOCK):
            window = start + tl.arange(0, BLOCK)
            totals += tl.load(products + first + window, mask=window < windows, other=0.0)
    tl.store(of_gate + head, tl.sum(totals, 0))
