"""The gradients of attention in Triton. Probabilities are made again. Windows that fit a tile have all their gradients
made by one program; else one kernel has tiles of queries, with what it learns about their softmax, and another tiles of
keys. README.md has the formulas."""

import triton
import triton.language as tl

from ..philox.triton_kernels import scalar
from .triton_attention import (
    COUNTS,
    VALUES,
    exponent_base,
    keys_of,
    load_queries,
    load_rows,
    sees,
    store_rows,
    tile_rows,
    window_of,
)


@triton.jit
def load_of_summary(of_summary, place, width, compute: tl.constexpr, D: tl.constexpr):
    """The gradient of one window's summary [D]."""
    column = tl.arange(0, D)
    return tl.load(of_summary + place * width + column, mask=column < width, other=0.0).to(compute)


@triton.jit
def load_grads(
    head, row, step, known, width, weight, of_summary, TYPE: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr
):
    """The gradients of rows of one head's outputs, with what comes by way of their window's summary.

    head: None where there is no gradient. weight: of the rows in the summary; None where that has no gradient."""
    if head is None:
        grads = tl.zeros([row.shape[0], D], dtype=TYPE)
    else:
        grads = load_rows(head, row, step, known, width, EVEN, D)
    if weight is not None:
        grads = (grads.to(weight.dtype) + weight[:, None] * of_summary[None, :]).to(TYPE)
    return grads


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def window_gradient_kernel(
    of_q,
    of_q_batch: tl.int64,
    of_q_head: tl.int64,
    of_q_row: tl.int64,
    of_k,
    of_k_batch: tl.int64,
    of_k_head: tl.int64,
    of_k_row: tl.int64,
    of_v,
    of_v_batch: tl.int64,
    of_v_head: tl.int64,
    of_v_row: tl.int64,
    grad,
    grad_batch: tl.int64,
    grad_head: tl.int64,
    grad_row: tl.int64,
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
    weights,
    of_summary,
    of_weights,
    scale_low: tl.int32,
    scale_high: tl.int32,
    length: tl.int32,
    width: tl.int32,
    window: tl.int32,
    tiles: tl.int32,
    heads: tl.int32,
    group: tl.int32,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """All gradients of one window, for the query heads that share a key head, ROWS queries at a time. heads: those of
    keys."""
    program = tl.program_id(0)
    tile = program % tiles
    key_head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    TYPE: tl.constexpr = q.dtype.element_ty
    compute: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    scale = scalar(scale_low, scale_high, compute)
    key, key_known = tile_rows(tile, window, 1, length, BLOCK)
    keys = load_rows(k + batch * k_batch + key_head * k_head, key, k_row, key_known, width, EVEN, D)
    values = load_rows(v + batch * v_batch + key_head * v_head, key, v_row, key_known, width, EVEN, D)
    key_sums = tl.zeros([BLOCK, D], dtype=compute)
    value_sums = key_sums
    parts: tl.constexpr = BLOCK // ROWS
    for step in range(group * parts):
        head = key_head * group + step // parts
        row = tile * window + step % parts * ROWS + tl.arange(0, ROWS)
        known = row < tl.minimum(tile * window + window, length)
        begin, end = keys_of(row, known, None, length, window, CAUSAL, False)
        visible = sees(begin, end, key)
        of_head = batch * heads * group + head
        queries = load_rows(q + batch * q_batch + head * q_head, row, q_row, known, width, EVEN, D)
        weight, summary = weights, of_summary
        if weights is not None:
            weight = tl.load(weights + of_head * length + row, mask=known, other=0.0)
            summary = load_of_summary(of_summary, of_head * tiles + tile, width, compute, D)
        grads_at = None if grad is None else grad + batch * grad_batch + head * grad_head
        grads = load_grads(grads_at, row, grad_row, known, width, weight, summary, TYPE, EVEN, D)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee", out_dtype=compute) * scale
        scores = tl.where(visible, scores, float("-inf"))
        p = tl.exp(scores - exponent_base(tl.max(scores, 1))[:, None])
        p = p / tl.where(known, tl.sum(p, 1), 1.0)[:, None]
        of_p = tl.dot(grads, tl.trans(values), input_precision="ieee", out_dtype=compute)
        mean = tl.sum(tl.where(visible, p * of_p, 0.0), 1)
        of_scores = tl.where(visible, p * (of_p - mean[:, None]), 0.0).to(TYPE)
        value_sums = tl.dot(tl.trans(p.to(TYPE)), grads, value_sums, input_precision="ieee", out_dtype=compute)
        key_sums = tl.dot(tl.trans(of_scores), queries, key_sums, input_precision="ieee", out_dtype=compute)
        query_sums = tl.dot(of_scores, keys, input_precision="ieee", out_dtype=compute) * scale
        to = of_q + batch * of_q_batch + head * of_q_head
        store_rows(to, row, of_q_row, known, width, query_sums, EVEN, D)
        if weights is not None:
            products = tl.sum(values.to(compute) * summary[None, :], 1)
            tl.store(of_weights + of_head * length + row, tl.sum(p * products[None, :], 1), mask=known)
    to = of_k + batch * of_k_batch + key_head * of_k_head
    store_rows(to, key, of_k_row, key_known, width, key_sums * scale, EVEN, D)
    to = of_v + batch * of_v_batch + key_head * of_v_head
    store_rows(to, key, of_v_row, key_known, width, value_sums, EVEN, D)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def query_gradient_kernel(
    of_q,
    of_q_batch: tl.int64,
    of_q_head: tl.int64,
    of_q_row: tl.int64,
    base_out,
    inverse_out,
    mean_out,
    grad,
    grad_batch: tl.int64,
    grad_head: tl.int64,
    grad_row: tl.int64,
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
    of_summary,
    of_weights,
    scale_low: tl.int32,
    scale_high: tl.int32,
    length: tl.int32,
    width: tl.int32,
    window: tl.int32,
    tile_window: tl.int32,
    parts: tl.int32,
    windows: tl.int32,
    tiles: tl.int32,
    heads: tl.int32,
    group: tl.int32,
    CAUSAL: tl.constexpr,
    EXCHANGE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """of_q, and of each row of [B, H, T] what is taken from its scores, by what their exponentials are multiplied, the
    mean, under these probabilities, of their gradients, and that of the products of values with the gradient of the
    summary, of_weights. A logarithm of the sum in place of the first two would lose a digit."""
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    key_head = head // group
    of_head = batch * heads + head
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
    weight, summary = weights, of_summary
    if weights is not None:
        weight = tl.load(weights + of_head * length + row, mask=known, other=0.0)
        summary = load_of_summary(of_summary, of_head * windows + tile // parts, width, compute, D)
    grads_at = None if grad is None else grad + batch * grad_batch + head * grad_head
    grads = load_grads(grads_at, row, grad_row, known, width, weight, summary, TYPE, EVEN, D)
    keys_at = k + batch * k_batch + key_head * k_head
    values_at = v + batch * v_batch + key_head * v_head
    last_key = tl.max(end, 0)
    first_key = tl.min(tl.where(known, begin, last_key), 0)
    largest = tl.full([BLOCK], float("-inf"), dtype=compute)
    total = tl.zeros([BLOCK], dtype=compute)
    mean = tl.zeros([BLOCK], dtype=compute)
    of_weight = tl.zeros([BLOCK], dtype=compute)
    for start in range(first_key, last_key, BLOCK):
        key = start + tl.arange(0, BLOCK)
        keys = load_rows(keys_at, key, k_row, key < last_key, width, EVEN, D)
        values = keys if EXCHANGE else load_rows(values_at, key, v_row, key < last_key, width, EVEN, D)
        visible = sees(begin, end, key)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee", out_dtype=compute) * scale
        scores = tl.where(visible, scores, float("-inf"))
        of_p = tl.dot(grads, tl.trans(values), input_precision="ieee", out_dtype=compute)
        before = largest
        largest = tl.maximum(largest, tl.max(scores, 1))
        base = exponent_base(largest)
        p = tl.exp(scores - base[:, None])
        factor = tl.exp(before - base)
        total = total * factor + tl.sum(p, 1)
        mean = mean * factor + tl.sum(tl.where(visible, p * of_p, 0.0), 1)
        if weights is not None:
            products = tl.sum(values.to(compute) * summary[None, :], 1)
            of_weight = of_weight * factor + tl.sum(tl.where(visible, p * products[None, :], 0.0), 1)
    seeing = begin < end
    base = exponent_base(largest)
    inverse = 1.0 / tl.where(seeing, total, 1.0)
    mean = mean * inverse
    if compute == TYPE:
        # Where one probability is nearly 1 its gradient is nearly the mean, whose rounding all rows' sums would have.
        rest = tl.zeros([BLOCK], dtype=compute)
        for start in range(first_key, last_key, BLOCK):
            key = start + tl.arange(0, BLOCK)
            keys = load_rows(keys_at, key, k_row, key < last_key, width, EVEN, D)
            values = keys if EXCHANGE else load_rows(values_at, key, v_row, key < last_key, width, EVEN, D)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee", out_dtype=compute) * scale
            of_p = tl.dot(grads, tl.trans(values), input_precision="ieee", out_dtype=compute)
            of_scores = tl.exp(scores - base[:, None]) * inverse[:, None] * (of_p - mean[:, None])
            rest += tl.sum(tl.where(sees(begin, end, key), of_scores, 0.0), 1)
        mean += rest
    tl.store(base_out + of_head * length + row, base, mask=known)
    tl.store(inverse_out + of_head * length + row, inverse, mask=known)
    tl.store(mean_out + of_head * length + row, mean, mask=known)
    if weights is not None:
        tl.store(of_weights + of_head * length + row, of_weight * inverse, mask=known)
    sums = tl.zeros([BLOCK, D], dtype=compute)
    for start in range(first_key, last_key, BLOCK):
        key = start + tl.arange(0, BLOCK)
        keys = load_rows(keys_at, key, k_row, key < last_key, width, EVEN, D)
        values = keys if EXCHANGE else load_rows(values_at, key, v_row, key < last_key, width, EVEN, D)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee", out_dtype=compute) * scale
        of_p = tl.dot(grads, tl.trans(values), input_precision="ieee", out_dtype=compute)
        of_scores = tl.exp(scores - base[:, None]) * inverse[:, None] * (of_p - mean[:, None])
        of_scores = tl.where(sees(begin, end, key), of_scores, 0.0).to(TYPE)
        sums += tl.dot(of_scores, keys, input_precision="ieee", out_dtype=compute)
    to = of_q + batch * of_q_batch + head * of_q_head
    store_rows(to, row, of_q_row, known, width, sums * scale, EVEN, D)


@triton.jit(do_not_specialize=VALUES, do_not_specialize_on_alignment=COUNTS)
def key_gradient_kernel(
    of_k,
    of_k_batch: tl.int64,
    of_k_head: tl.int64,
    of_k_row: tl.int64,
    of_v,
    of_v_batch: tl.int64,
    of_v_head: tl.int64,
    of_v_row: tl.int64,
    bases,
    inverses,
    means,
    grad,
    grad_batch: tl.int64,
    grad_head: tl.int64,
    grad_row: tl.int64,
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
    of_summary,
    scale_low: tl.int32,
    scale_high: tl.int32,
    length: tl.int32,
    width: tl.int32,
    window: tl.int32,
    tile_window: tl.int32,
    parts: tl.int32,
    windows: tl.int32,
    tiles: tl.int32,
    heads: tl.int32,
    group: tl.int32,
    CAUSAL: tl.constexpr,
    EXCHANGE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """of_k and of_v of a tile of keys, over the query heads that share its key head; of the exchange their sum, of_k.
    heads: those of keys."""
    program = tl.program_id(0)
    tile = program % tiles
    key_head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    TYPE: tl.constexpr = q.dtype.element_ty
    compute: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    scale = scalar(scale_low, scale_high, compute)
    key, key_known = tile_rows(tile, tile_window, parts, length, BLOCK)
    of_batch = None if bounds is None else bounds + batch * bounds_batch
    sources = None if source is None else source + batch * source_batch
    keys = load_rows(k + batch * k_batch + key_head * k_head, key, k_row, key_known, width, EVEN, D)
    if EXCHANGE:
        values = keys
    else:
        values = load_rows(v + batch * v_batch + key_head * v_head, key, v_row, key_known, width, EVEN, D)
    # The rows that see one of these keys, and maybe some that see none.
    first_row, last_row = window_of(key, of_batch, length, window)
    last_row = tl.max(tl.where(key_known, last_row, 0), 0)
    if CAUSAL:
        first_row = key + 1 if EXCHANGE else key
    first_row = tl.min(tl.where(key_known, first_row, last_row), 0)
    key_sums = tl.zeros([BLOCK, D], dtype=compute)
    value_sums = key_sums
    for member in range(group):
        head = key_head * group + member
        of_head = batch * heads * group + head
        summary = of_summary
        if weights is not None:
            summary = load_of_summary(of_summary, of_head * windows + tile // parts, width, compute, D)
        for start in range(first_row, last_row, ROWS):
            row = start + tl.arange(0, ROWS)
            known = row < last_row
            begin, end = keys_of(row, known, of_batch, length, window, CAUSAL, EXCHANGE)
            visible = tl.trans(sees(begin, end, key))
            at = q + batch * q_batch + head * q_head
            queries = load_queries(at, row, q_row, known, sources, length, width, CAUSAL, EXCHANGE, EVEN, D)
            weight = weights
            if weights is not None:
                weight = tl.load(weights + of_head * length + row, mask=known, other=0.0)
            grads_at = None if grad is None else grad + batch * grad_batch + head * grad_head
            grads = load_grads(grads_at, row, grad_row, known, width, weight, summary, TYPE, EVEN, D)
            base = tl.load(bases + of_head * length + row, mask=known, other=0.0)
            inverse = tl.load(inverses + of_head * length + row, mask=known, other=0.0)
            mean = tl.load(means + of_head * length + row, mask=known, other=0.0)
            # A row for a key, for the products below.
            if compute == TYPE:
                # To the bit as when their sum was made: else a probability near 1 has their whole difference as error.
                scores = tl.trans(tl.dot(queries, tl.trans(keys), input_precision="ieee", out_dtype=compute)) * scale
                of_p = tl.trans(tl.dot(grads, tl.trans(values), input_precision="ieee", out_dtype=compute))
            else:
                scores = tl.dot(keys, tl.trans(queries), out_dtype=compute) * scale
                of_p = tl.dot(values, tl.trans(grads), out_dtype=compute)
            p = tl.where(visible, tl.exp(scores - base[None, :]) * inverse[None, :], 0.0)
            of_scores = tl.where(visible, p * (of_p - mean[None, :]), 0.0).to(TYPE)
            value_sums += tl.dot(p.to(TYPE), grads, input_precision="ieee", out_dtype=compute)
            key_sums += tl.dot(of_scores, queries, input_precision="ieee", out_dtype=compute)
    to = of_k + batch * of_k_batch + key_head * of_k_head
    if EXCHANGE:
        store_rows(to, key, of_k_row, key_known, width, key_sums * scale + value_sums, EVEN, D)
    else:
        store_rows(to, key, of_k_row, key_known, width, key_sums * scale, EVEN, D)
        to = of_v + batch * of_v_batch + key_head * of_v_head
        store_rows(to, key, of_v_row, key_known, width, value_sums, EVEN, D)
