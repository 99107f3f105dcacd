"""window_attention, window_exchange, njx_attention and their gradients in Triton: the host side."""

from typing import Any

import torch
import triton
from torch import Tensor

from .._seeds import compute_dtype
from . import tuning
from .op import empty_like_heads
from .triton_launch import Call, heads_of, launch_fused, power_of_two, with_rows
from .triton_summary import (
    add_exchanged_kernel,
    gate_gradient_kernel,
    select_gradient_kernel,
    source_gradient_kernel,
    sum_rows_kernel,
    summary_weights_kernel,
)


def _summary_weights(select: Tensor, window: int, tokens: int) -> Tensor:
    """[B, H, T] of select's dtype."""
    batch, heads, length = select.shape
    weights = torch.empty_like(select, memory_format=torch.contiguous_format)
    windows = triton.cdiv(length, window)
    block = min(tuning.TRITON_TOKENS, power_of_two(window, 16))
    constants = {"ALL": tokens >= window, "BLOCK": block, "num_warps": 1 if block <= 32 else 4}
    grid, select = (batch * heads * windows,), select.contiguous()
    launch_fused(summary_weights_kernel, grid, weights, select, length, window, windows, tokens, **constants)
    return weights


def _attention(
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor | None,
    starts: Tensor | None,
    window: int,
    exchange_tokens: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """window_attention with a summary of `dtype`."""
    out, windows = empty_like_heads(q), triton.cdiv(q.shape[2], window)
    summary = q.new_empty((0,) if select is None else (*q.shape[:2], windows, q.shape[3]), dtype=dtype)
    if q.numel() == 0:
        return out, summary
    call = Call.of_windows(q, k, v, starts, window, causal, scale, False)
    if select is None:
        call.run(out, None, None)
    else:
        call.run(out, _summary_weights(select, call.window, exchange_tokens), summary)
    return out, summary


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, select: Tensor | None, document_starts: Tensor | None, *constants: Any
) -> tuple[Tensor, Tensor]:
    """torch.ops.quaver.window_attention in Triton."""
    return _attention(q.dtype, q, k, v, select, document_starts, *constants)


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
    call = Call.of_windows(q, k, v, document_starts, window, causal, scale, True)
    if select is None or grad_summary is None:
        call.gradients(grad, of_q, of_k, of_v, None, None, None)
        return of_q, of_k, of_v, of_select.zero_()
    weights = _summary_weights(select, call.window, exchange_tokens)
    of_weights = torch.empty_like(weights)
    call.gradients(grad, of_q, of_k, of_v, weights, grad_summary.contiguous(), of_weights)
    batch, heads, length = select.shape
    block = min(tuning.TRITON_TOKENS, power_of_two(call.window, 16))
    grid, sizes = (batch * heads * call.windows(),), (length, call.window, call.windows())
    launch_fused(select_gradient_kernel, grid, of_select, weights, of_weights, *sizes, BLOCK=block, num_warps=1)
    return of_q, of_k, of_v, of_select


def window_exchange(summary: Tensor, source: Tensor | None, causal: bool, scale: float) -> Tensor:
    """torch.ops.quaver.window_exchange in Triton."""
    e = summary.new_empty(summary.shape)
    if e.numel() > 0:
        Call.of_exchange(summary, source, causal, scale, False).run(e, None, None)
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
    call = Call.of_exchange(summary, source, causal, scale, True)
    wide = compute_dtype(summary.dtype)
    of_summary = summary.new_empty(summary.shape, dtype=dtype)
    of_queries, of_keys = (summary.new_empty(summary.shape, dtype=wide) for _ in range(2))
    products = call.gradients(grad, of_queries, of_keys, of_keys, None, None, None)
    assert products is not None
    columns = power_of_two(width, 16)
    constants = {"CAUSAL": causal, "BLOCK": tuning.triton_sources(columns), "D": columns, "num_warps": 4}
    sources, grid = call.rows_of()[:2], (batch * heads * windows,)
    inputs = (of_keys, of_queries, *sources, gate)
    launch_fused(source_gradient_kernel, grid, of_summary, *inputs, width, windows, heads, **constants)
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
    out, summary = _attention(select.dtype, q, k, v, select, None, window, exchange_tokens, causal, scale)
    if out.numel() == 0:
        return out, summary
    e = window_exchange(summary.to(q.dtype), source, causal, scale)
    batch, heads, length, width = q.shape
    tiles = triton.cdiv(length, tuning.TRITON_ROWS)
    sizes = (length, width, min(window, length), summary.shape[2], heads, tiles)
    constants = {"BLOCK": tuning.TRITON_ROWS, "D": power_of_two(width, 16), "num_warps": 2}
    grid, gate = (tiles * heads * batch,), gate.contiguous()
    launch_fused(add_exchanged_kernel, grid, *heads_of(out), e, gate, *sizes, **constants)
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
        grad, (batch, heads, length, width) = with_rows(grad), q.shape
        windows, columns = summary.shape[2], power_of_two(width, 16)
        # With the gate left out the exchange's backward gives the gate's gradient too: the sum of grad * e.
        sums = q.new_empty(summary.shape)
        sizes = (length, width, min(window, length), windows, heads)
        grid = (batch * heads * windows,)
        constants = {"BLOCK": tuning.TRITON_ROWS, "D": columns, "num_warps": 2}
        launch_fused(sum_rows_kernel, grid, sums, *heads_of(grad), *sizes, **constants)
        z = summary.to(q.dtype)
        of_summary, products = _exchange_gradient(sums, z, source, causal, scale, gate.contiguous(), gate.dtype)
        launch_fused(gate_gradient_kernel, (heads,), of_gate, products, batch, heads, windows, BLOCK=256)
    of_inputs = window_attention_backward(
        grad, of_summary, q, k, v, select, None, window, exchange_tokens, causal, scale
    )
    return *of_inputs, of_gate


def report_launches() -> None:
    """Launches every variant that the resource report should know."""

    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

    def heads(dtype: torch.dtype, window: int, width: int, group: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and select of four windows."""
        q, k = (torch.empty(2, 4 * window, number, width, dtype=dtype).transpose(1, 2) for number in (4, 4 // group))
        return q, k, torch.empty(2, 4, 4 * window, dtype=compute_dtype(dtype))

    for dtype, window, width, causal, group in (
        (bf16, 64, 64, False, 1),
        (fp16, 64, 64, True, 2),
        (bf16, 256, 128, False, 1),
        (fp32, 64, 64, False, 1),
        (fp64, 32, 16, True, 1),
    ):
        q, k, select = heads(dtype, window, width, group)
        gate, source = torch.empty(4, dtype=select.dtype), torch.zeros(2, 4, dtype=torch.int64)
        constants = (window, window // 2, causal, 0.125)
        _, summary = njx_attention(q, k, k, select, source, gate, *constants)
        njx_attention_backward(q, q, k, k, select, summary, source, gate, *constants)
    # Small windows, heads whose width is no power of two, wide heads.
    for dtype, window, width in ((bf16, 16, 32), (bf16, 64, 80), (bf16, 64, 256), (fp32, 32, 32)):
        q, k, select = heads(dtype, window, width)
        _, summary = window_attention(q, k, k, select, None, window, window, False, 0.125)
        window_attention_backward(q, summary, q, k, k, select, None, window, window, False, 0.125)
    q, k, _ = heads(bf16, 64, 64)
    starts = torch.zeros(2, 8, dtype=torch.int32)
    window_attention(q, k, k, None, starts, 64, 64, True, 0.125)
    window_attention_backward(q, None, q, k, k, None, starts, 64, 64, True, 0.125)
    for dtype, causal in ((bf16, False), (bf16, True), (fp32, True)):
        summary = torch.empty(2, 4, 256, 64, dtype=dtype)
        window_exchange(summary, None, causal, 0.125)
        window_exchange_backward(summary, summary, None, causal, 0.125)
