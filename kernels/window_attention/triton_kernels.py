"""window_attention, window_exchange, njx_attention and their gradients in Triton: the host side."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._seeds import compute_dtype
from .._triton import launch
from ..philox.triton_kernels import scalar_words
from . import tuning
from .op import empty_like_heads
from .triton_attention import attention_kernel
from .triton_gradients import key_gradient_kernel, query_gradient_kernel, window_gradient_kernel
from .triton_summary import (
    add_exchanged_kernel,
    document_bounds_kernel,
    gate_gradient_kernel,
    select_gradient_kernel,
    source_gradient_kernel,
    sum_parts_kernel,
    sum_rows_kernel,
    summary_weights_kernel,
)

# Nothing here is defined by single roundings, as noise is.
_launch = functools.partial(launch, enable_fp_fusion=True)


def _with_rows(x: Tensor) -> Tensor:
    """x, or a copy whose rows lie in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> tuple[Tensor, int, int, int]:
    """[B, H, T, d] as the kernels take it: with the strides of batches, heads and rows."""
    return x, x.stride(0), x.stride(1), x.stride(2)


def _power(size: int, least: int) -> int:
    return max(least, int(triton.next_power_of_2(size)))


class _Tiling(NamedTuple):
    """How rows are cut: a window has `parts` tiles and begins `window` rows after the one before it."""

    tile: tuning.Tile
    window: int
    parts: int
    count: int

    @staticmethod
    def of(q: Tensor, window: int, backward: bool, documents: bool) -> "_Tiling":
        length = q.shape[2]
        window = min(window, length)
        tile = tuning.triton_tile(q.dtype, _power(q.shape[3], 16), backward, length if documents else window)
        if documents:  # their windows lie across tiles
            window = tile.rows
        parts = triton.cdiv(window, tile.rows)
        return _Tiling(tile, window, parts, length // window * parts + triton.cdiv(length % window, tile.rows))


class _Call(NamedTuple):
    """One call of attention: that of windows, or the exchange, whose rows are windows and whose q, k and v are one."""

    q: Tensor
    k: Tensor
    v: Tensor
    source: Tensor | None
    bounds: Tensor | None
    window: int
    causal: bool
    scale: float
    exchange: bool
    tiling: _Tiling

    @staticmethod
    def of_windows(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, window: int, causal: bool, scale: float, backward: bool
    ) -> "_Call":
        q, k, v = map(_with_rows, (q, k, v))
        window = min(window, q.shape[2])
        tiling = _Tiling.of(q, window, backward, starts is not None)
        bounds = None if starts is None else _document_bounds(starts, q.shape[2], window)
        return _Call(q, k, v, None, bounds, window, causal, scale, False, tiling)

    @staticmethod
    def of_exchange(z: Tensor, source: Tensor | None, causal: bool, scale: float, backward: bool) -> "_Call":
        z = _with_rows(z)
        source = None if source is None else source.contiguous()
        tiling = _Tiling.of(z, z.shape[2], backward, False)
        return _Call(z, z, z, source, None, z.shape[2], causal, scale, True, tiling)

    @property
    def key_heads(self) -> int:
        return self.k.shape[1]

    def windows(self) -> int:
        return int(triton.cdiv(self.q.shape[2], self.window))

    def rows_of(self) -> tuple[Any, ...]:
        """The kernels' parameters from source to bounds_batch."""
        source_batch = 0 if self.source is None or self.source.dim() == 1 else self.source.stride(0)
        bounds_batch = 0 if self.bounds is None or self.bounds.shape[0] == 1 else self.bounds.stride(0)
        return self.source, source_batch, self.bounds, bounds_batch

    def sizes(self) -> tuple[int, ...]:
        """The kernels' parameters from scale_low to window."""
        return *scalar_words(self.scale, self.q.dtype), self.q.shape[2], self.q.shape[3], self.window

    def constants(self) -> dict[str, Any]:
        columns = _power(self.q.shape[3], 16)
        return {
            "CAUSAL": self.causal,
            "EVEN": self.q.shape[3] == columns,
            "BLOCK": self.tiling.tile.rows,
            "D": columns,
            "num_warps": self.tiling.tile.warps,
            "num_stages": self.tiling.tile.stages,
        }

    def run(self, out: Tensor, weights: Tensor | None, summary: Tensor | None) -> None:
        """out, and with weights the summary."""
        batch, heads, _, width = self.q.shape
        _, window, parts, tiles = self.tiling
        sums = summary
        if summary is not None and parts > 1:
            sums = summary.new_empty((batch, heads, tiles, width), dtype=compute_dtype(summary.dtype))
        inputs = (*_heads(self.q), *_heads(self.k), *_heads(self.v), *self.rows_of())
        counts = (window, parts, tiles, heads, heads // self.key_heads)
        constants = {**self.constants(), "EXCHANGE": self.exchange}
        grid = (tiles * heads * batch,)
        _launch(attention_kernel, grid, *_heads(out), *inputs, weights, sums, *self.sizes(), *counts, **constants)
        if summary is not None and parts > 1:
            windows = summary.shape[2]
            grid = (windows * heads * batch,)
            _launch(
                sum_parts_kernel, grid, summary, sums, width, windows, parts, tiles, D=_power(width, 16), num_warps=1
            )

    def gradients(
        self,
        grad: Tensor | None,
        of_q: Tensor,
        of_k: Tensor,
        of_v: Tensor,
        weights: Tensor | None,
        of_summary: Tensor | None,
        of_weights: Tensor | None,
    ) -> Tensor | None:
        """Writes of_q, of_k and of_v, and with weights, those of the summary, of_weights. Of the exchange of_k is of
        keys and values together. Returns the mean, under each row's softmax, of the gradients of its probabilities,
        where that is made."""
        batch, heads, length, _ = self.q.shape
        _, window, parts, tiles = self.tiling
        grads = (None, 0, 0, 0) if grad is None else _heads(_with_rows(grad))
        inputs = (*grads, *_heads(self.q), *_heads(self.k), *_heads(self.v))
        group, constants = heads // self.key_heads, self.constants()
        key_grid = (tiles * self.key_heads * batch,)
        if parts == 1 and self.bounds is None and not self.exchange:
            outputs = (*_heads(of_q), *_heads(of_k), *_heads(of_v))
            of_rows = (weights, of_summary, of_weights)
            counts = (tiles, self.key_heads, group)
            _launch(window_gradient_kernel, key_grid, *outputs, *inputs, *of_rows, *self.sizes(), *counts, **constants)
            return None
        softmax = self.q.new_empty((3, batch, heads, length), dtype=compute_dtype(self.q.dtype)).unbind()
        inputs = (*softmax, *inputs, *self.rows_of(), weights, of_summary)
        cut = (window, parts, self.windows(), tiles)
        constants["EXCHANGE"] = self.exchange
        grid, counts = (tiles * heads * batch,), (*cut, heads, group)
        _launch(query_gradient_kernel, grid, *_heads(of_q), *inputs, of_weights, *self.sizes(), *counts, **constants)
        counts, outputs = (*cut, self.key_heads, group), (*_heads(of_k), *_heads(of_v))
        _launch(key_gradient_kernel, key_grid, *outputs, *inputs, *self.sizes(), *counts, **constants)
        return softmax[2]


def _document_bounds(starts: Tensor, length: int, window: int) -> Tensor | None:
    """[B or 1, 2, T]: where each token's window begins and ends."""
    starts = starts.contiguous()
    batch = starts.shape[0] if starts.dim() == 2 else 1
    bounds = starts.new_empty((batch, 2, length))
    grid = (triton.cdiv(length, 128), batch)
    documents = starts.shape[-1]
    _launch(document_bounds_kernel, grid, bounds, starts, documents, length, window, documents, BLOCK=128)
    return bounds


def _summary_weights(select: Tensor, window: int, tokens: int) -> Tensor:
    """[B, H, T] of select's dtype."""
    batch, heads, length = select.shape
    weights = torch.empty_like(select, memory_format=torch.contiguous_format)
    windows = triton.cdiv(length, window)
    block = min(tuning.TRITON_TOKENS, _power(window, 16))
    constants = {"ALL": tokens >= window, "BLOCK": block, "num_warps": 1 if block <= 32 else 4}
    grid, select = (batch * heads * windows,), select.contiguous()
    _launch(summary_weights_kernel, grid, weights, select, length, window, windows, tokens, **constants)
    return weights


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor | None,
    starts: Tensor | None,
    window: int,
    exchange_tokens: int,
    causal: bool,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """window_attention with a summary of `dtype`."""
    out, windows = empty_like_heads(q), triton.cdiv(q.shape[2], window)
    summary = q.new_empty((0,) if select is None else (*q.shape[:2], windows, q.shape[3]), dtype=dtype)
    if q.numel() == 0:
        return out, summary
    call = _Call.of_windows(q, k, v, starts, window, causal, scale, False)
    if select is None:
        call.run(out, None, None)
    else:
        call.run(out, _summary_weights(select, call.window, exchange_tokens), summary)
    return out, summary


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, select: Tensor | None, document_starts: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """torch.ops.quaver.window_attention in Triton."""
    return _attention(q, k, v, select, document_starts, *constants, q.dtype)


def window_attention_backward(
    grad: Tensor | None,
    grad_summary: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor | None,
    document_starts: Tensor | None,
    window: int,
    exchange_tokens: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.quaver.window_attention_backward in Triton."""
    of_q, of_k, of_v = map(empty_like_heads, (q, k, v))
    of_select = q.new_empty(0)
    if select is not None:
        of_select = torch.empty_like(select, memory_format=torch.contiguous_format)
    if q.numel() == 0:
        return of_q, of_k.zero_(), of_v.zero_(), of_select.zero_()
    call = _Call.of_windows(q, k, v, document_starts, window, causal, scale, True)
    if select is None or grad_summary is None:
        call.gradients(grad, of_q, of_k, of_v, None, None, None)
        return of_q, of_k, of_v, of_select.zero_()
    weights = _summary_weights(select, call.window, exchange_tokens)
    of_weights = torch.empty_like(weights)
    call.gradients(grad, of_q, of_k, of_v, weights, grad_summary.contiguous(), of_weights)
    batch, heads, length = select.shape
    block = min(tuning.TRITON_TOKENS, _power(call.window, 16))
    grid, sizes = (batch * heads * call.windows(),), (length, call.window, call.windows())
    _launch(select_gradient_kernel, grid, of_select, weights, of_weights, *sizes, BLOCK=block, num_warps=1)
    return of_q, of_k, of_v, of_select


def window_exchange(summary: Tensor, source: Tensor | None, causal: bool, scale: float) -> Tensor:
    """torch.ops.quaver.window_exchange in Triton."""
    e = summary.new_empty(summary.shape)
    if e.numel() > 0:
        _Call.of_exchange(summary, source, causal, scale, False).run(e, None, None)
    return e


def _exchange_gradient(
    grad: Tensor,
    summary: Tensor,
    source: Tensor | None,
    causal: bool,
    scale: float,
    gate: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradient of the summary in `dtype`, times the gate if there is one, and sum_d grad e [B, H, W]."""
    batch, heads, windows, width = summary.shape
    call = _Call.of_exchange(summary, source, causal, scale, True)
    wide = compute_dtype(summary.dtype)
    of_summary = summary.new_empty(summary.shape, dtype=dtype)
    of_queries, of_keys = (summary.new_empty(summary.shape, dtype=wide) for _ in range(2))
    products = call.gradients(grad, of_queries, of_keys, of_keys, None, None, None)
    assert products is not None
    constants = {"CAUSAL": causal, "BLOCK": tuning.TRITON_SOURCES, "D": _power(width, 16), "num_warps": 4}
    sources, grid = call.rows_of()[:2], (batch * heads * windows,)
    inputs = (of_keys, of_queries, *sources, gate)
    _launch(source_gradient_kernel, grid, of_summary, *inputs, width, windows, heads, **constants)
    return of_summary, products


def window_exchange_backward(
    grad: Tensor, summary: Tensor, source: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """torch.ops.quaver.window_exchange_backward in Triton."""
    if summary.numel() == 0:
        return summary.new_empty(summary.shape)
    return _exchange_gradient(grad, summary, source, causal, scale, None, summary.dtype)[0]


def njx_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor,
    source: Tensor | None,
    gate: Tensor,
    window: int,
    exchange_tokens: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """torch.ops.quaver.njx_attention in Triton. The exchange multiplies summaries of q's dtype."""
    out, summary = _attention(q, k, v, select, None, window, exchange_tokens, causal, scale, select.dtype)
    if out.numel() == 0:
        return out, summary
    e = window_exchange(summary.to(q.dtype), source, causal, scale)
    batch, heads, length, width = q.shape
    tiles = triton.cdiv(length, tuning.TRITON_ROWS)
    sizes = (length, width, min(window, length), summary.shape[2], heads, tiles)
    constants = {"BLOCK": tuning.TRITON_ROWS, "D": _power(width, 16), "num_warps": 2}
    grid, gate = (tiles * heads * batch,), gate.contiguous()
    _launch(add_exchanged_kernel, grid, *_heads(out), e, gate, *sizes, **constants)
    return out, summary


def njx_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor,
    summary: Tensor,
    source: Tensor | None,
    gate: Tensor,
    window: int,
    exchange_tokens: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.quaver.njx_attention_backward in Triton."""
    of_gate, of_summary = torch.empty_like(gate, memory_format=torch.contiguous_format), None
    if q.numel() == 0:
        of_gate.zero_()
    else:
        grad, (batch, heads, length, width) = _with_rows(grad), q.shape
        windows, columns = summary.shape[2], _power(width, 16)
        # With the gate left out the exchange's backward gives the gate's gradient too: the sum of grad * e.
        sums = q.new_empty(summary.shape)
        sizes = (length, width, min(window, length), windows, heads)
        grid = (batch * heads * windows,)
        constants = {"BLOCK": tuning.TRITON_ROWS, "D": columns, "num_warps": 2}
        _launch(sum_rows_kernel, grid, sums, *_heads(grad), *sizes, **constants)
        z = summary.to(q.dtype)
        of_summary, products = _exchange_gradient(sums, z, source, causal, scale, gate.contiguous(), gate.dtype)
        _launch(gate_gradient_kernel, (heads,), of_gate, products, batch, heads, windows, BLOCK=256)
    constants = (window, exchange_tokens, causal, scale)
    return *window_attention_backward(grad, of_summary, q, k, v, select, None, *constants), of_gate


def report_launches() -> None:
    """Launches every variant that the resource report should know."""

    def made(dtype: torch.dtype, window: int, width: int, causal: bool, starts: Tensor | None, group: int) -> None:
        """Four windows, by all ops that take them."""
        shape = (2, 4 * window, 4, width)
        q = torch.empty(shape, dtype=dtype).transpose(1, 2)
        k = torch.empty((*shape[:2], 4 // group, width), dtype=dtype).transpose(1, 2)
        select = None if starts is not None else torch.empty(2, 4, 4 * window, dtype=compute_dtype(dtype))
        constants: tuple[Any, ...] = (window, window // 2, causal, 0.125)
        if select is None:
            window_attention(q, k, k, None, starts, *constants)
            window_attention_backward(q, None, q, k, k, None, starts, *constants)
            return
        gate = torch.empty(4, dtype=select.dtype)
        source = torch.zeros(2, 4, dtype=torch.int64)
        _, summary = njx_attention(q, k, k, select, source, gate, *constants)
        njx_attention_backward(q, q, k, k, select, summary, source, gate, *constants)

    for dtype, window, width in (
        (torch.bfloat16, 16, 32),
        (torch.bfloat16, 64, 64),
        (torch.float16, 64, 64),
        (torch.bfloat16, 256, 128),
        (torch.bfloat16, 64, 256),
        (torch.float32, 32, 32),
        (torch.float32, 64, 64),
        (torch.float64, 32, 16),
    ):
        made(dtype, window, width, False, None, 1)
    made(torch.bfloat16, 64, 64, True, None, 2)
    made(torch.bfloat16, 64, 80, False, None, 1)
    made(torch.bfloat16, 64, 64, True, torch.zeros(2, 8, dtype=torch.int32), 1)
    for dtype in (torch.bfloat16, torch.float32):
        summary = torch.empty(2, 4, 256, 64, dtype=dtype)
        for causal in (False, True):
            window_exchange(summary, None, causal, 0.125)
            window_exchange_backward(summary, summary, None, causal, 0.125)
