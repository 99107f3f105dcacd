"""Attention inside windows, with a summary of each, and between the summaries."""

from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .._autograd import differentiable
from .._backends import choose, transformed
from .._second import derivative_of_gradient
from . import arguments, reference
from .tuning import CUDA_ORDER, cuda_width


def empty_like_heads(x: Tensor) -> Tensor:
    """[B, H, T, d] for a result beside x, with the heads of a token side by side where x has them so."""
    batch, heads, length, width = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, length, heads, width)).transpose(1, 2)
    return x.new_empty((batch, heads, length, width))


def _windows(q: Tensor, window: int) -> int:
    return (q.shape[2] + window - 1) // window


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, select: Any, starts: Any, window: int, *_: Any) -> Any:
    shape = (0,) if select is None else (*q.shape[:2], _windows(q, window), q.shape[3])
    return empty_like_heads(q), q.new_empty(shape)


def _fake_attention_backward(
    grad: Any, grad_summary: Any, q: Tensor, k: Tensor, v: Tensor, select: Any, *_: Any
) -> Any:
    of_select = q.new_empty(0) if select is None else torch.empty_like(select, memory_format=torch.contiguous_format)
    return empty_like_heads(q), empty_like_heads(k), empty_like_heads(v), of_select


def _fake_exchange(summary: Tensor, *_: Any) -> Tensor:
    return summary.new_empty(summary.shape)


def _fake_exchange_backward(grad: Tensor, summary: Tensor, *_: Any) -> Tensor:
    return summary.new_empty(summary.shape)


def _fake_njx(q: Tensor, k: Tensor, v: Tensor, select: Tensor, source: Any, gate: Tensor, window: int, *_: Any) -> Any:
    return empty_like_heads(q), select.new_empty((*q.shape[:2], _windows(q, window), q.shape[3]))


def _fake_njx_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, select: Tensor, summary: Tensor, source: Any, gate: Tensor, *_: Any
) -> Any:
    return (
        empty_like_heads(q),
        empty_like_heads(k),
        empty_like_heads(v),
        select.new_empty(select.shape),
        gate.new_empty(gate.shape),
    )


_TRITON = "quaver.kernels.window_attention.triton_kernels"
_HEADS = "Tensor q, Tensor k, Tensor v"
_WINDOW = "int window, int exchange_tokens, bool causal, float scale"
# summary [B, H, W, d] of q's dtype where select, of the compute dtype, is given, else of no element.
_ops.define(
    f"window_attention({_HEADS}, Tensor? select, Tensor? document_starts, {_WINDOW}) -> (Tensor, Tensor)",
    _fake_attention,
    _TRITON,
)
# Gradients of q, k, v and select.
_ops.define(
    f"window_attention_backward(Tensor? grad, Tensor? grad_summary, {_HEADS}, Tensor? select, "
    f"Tensor? document_starts, {_WINDOW}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_attention_backward,
    _TRITON,
)
_ops.define(
    "window_exchange(Tensor summary, Tensor? source, bool causal, float scale) -> Tensor", _fake_exchange, _TRITON
)
_ops.define(
    "window_exchange_backward(Tensor grad, Tensor summary, Tensor? source, bool causal, float scale) -> Tensor",
    _fake_exchange_backward,
    _TRITON,
)
# The summary, of the compute dtype, is for backward.
_ops.define(
    f"njx_attention({_HEADS}, Tensor select, Tensor? source, Tensor gate, {_WINDOW}) -> (Tensor, Tensor)",
    _fake_njx,
    _TRITON,
)
# Gradients of q, k, v, select and gate.
_ops.define(
    f"njx_attention_backward(Tensor grad, {_HEADS}, Tensor select, Tensor summary, Tensor? source, Tensor gate, "
    f"{_WINDOW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_njx_backward,
    _TRITON,
)


class _Family:
    """The ops of one backend. The derivative of a backward op is the reference's."""

    def __init__(self, backend: str) -> None:
        def overload(name: str) -> Any:
            return _ops.overload(name, backend)

        self.attention = differentiable(overload("window_attention"), self._save_attention, self._attention_backward)
        self.attention_gradient = differentiable(
            overload("window_attention_backward"), self._save_attention_gradient, self._attention_gradient_backward
        )
        self.exchange = differentiable(overload("window_exchange"), self._save_exchange, self._exchange_backward)
        self.exchange_gradient = differentiable(
            overload("window_exchange_backward"), self._save_exchange_gradient, self._exchange_gradient_backward
        )
        self.njx = differentiable(overload("njx_attention"), self._save_njx, self._njx_backward)
        self.njx_gradient = differentiable(
            overload("njx_attention_backward"), self._save_njx_gradient, self._njx_gradient_backward
        )

    @staticmethod
    def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.constants = inputs[5:]
        ctx.set_materialize_grads(False)

    def _attention_backward(self, ctx: Any, grad: Tensor | None, grad_summary: Tensor | None) -> tuple[Any, ...]:
        q, k, v, select, starts = ctx.saved_tensors
        grad_summary = None if select is None else grad_summary
        if grad is None and grad_summary is None:
            return (None,) * 9
        grads = self.attention_gradient(grad, grad_summary, q, k, v, select, starts, *ctx.constants)
        return *grads[:3], None if grad_summary is None else grads[3], *[None] * 5

    @staticmethod
    def _save_attention_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.constants = inputs[7:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def _attention_gradient_backward(ctx: Any, *of_grads: Tensor | None) -> tuple[Any, ...]:
        grad, grad_summary, q, k, v, select, starts = ctx.saved_tensors

        def attention(q: Tensor, k: Tensor, v: Tensor, select: Tensor | None) -> Any:
            return reference.window_attention(q, k, v, select, starts, *ctx.constants)

        of_select = None if select is None or grad_summary is None else of_grads[3]
        of_inputs, of_outer = derivative_of_gradient(
            attention, (q, k, v, select), (grad, grad_summary), (*of_grads[:3], of_select)
        )
        return *of_outer, *of_inputs, *[None] * 5

    @staticmethod
    def _save_exchange(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.constants = inputs[2:]

    def _exchange_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return self.exchange_gradient(grad, *ctx.saved_tensors, *ctx.constants), None, None, None

    @staticmethod
    def _save_exchange_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.constants = inputs[3:]

    @staticmethod
    def _exchange_gradient_backward(ctx: Any, of_grad: Tensor) -> tuple[Any, ...]:
        grad, summary, source = ctx.saved_tensors

        def exchange(summary: Tensor) -> Tensor:
            return reference.window_exchange(summary, source, *ctx.constants)

        of_inputs, of_outer = derivative_of_gradient(exchange, (summary,), (grad,), (of_grad,))
        return *of_outer, *of_inputs, None, None, None

    @staticmethod
    def _save_njx(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:6], output[1])
        ctx.constants = inputs[6:]
        ctx.set_materialize_grads(False)

    def _njx_backward(self, ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        q, k, v, select, source, gate, summary = ctx.saved_tensors
        if grad is None:
            return (None,) * 10
        # The summary is a function of q, k, v and select: their derivative's derivative covers it.
        saved = (q, k, v, select, summary.detach(), source, gate)
        of_q, of_k, of_v, of_select, of_gate = self.njx_gradient(grad, *saved, *ctx.constants)
        return of_q, of_k, of_v, of_select, None, of_gate, None, None, None, None

    @staticmethod
    def _save_njx_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5], *inputs[6:8])
        ctx.constants = inputs[8:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def _njx_gradient_backward(ctx: Any, *of_grads: Tensor | None) -> tuple[Any, ...]:
        grad, q, k, v, select, source, gate = ctx.saved_tensors

        def njx(q: Tensor, k: Tensor, v: Tensor, select: Tensor, gate: Tensor) -> Tensor:
            return reference.njx_attention(q, k, v, select, source, gate, *ctx.constants)

        of_inputs, of_outer = derivative_of_gradient(njx, (q, k, v, select, gate), (grad,), of_grads)
        return *of_outer, *of_inputs[:4], None, None, of_inputs[4], *[None] * 4


_compiled = _Family("cpp")
_families = {"cpp": _compiled, "cuda": _compiled, "triton": _Family("triton")}


def _family(like: Tensor) -> _Family | None:
    """The ops of the backend that is chosen for heads like this one [.., d], or None for the reference."""
    order = CUDA_ORDER
    if like.device.type == "cuda" and like.shape[-1] > cuda_width(like.dtype):
        order = tuple(backend for backend in order if backend != "cuda")
    backend = "reference" if transformed() else choose(like.device, order)
    return _families.get(backend)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    select: Tensor | None = None,
    exchange_tokens: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    document_starts: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each token to those of its window, and with `select` a summary of each window.

    Token t is in window t // window; the last may be shorter. Linear in T: no T x T matrix is made, forward or
    backward. The summary is the mean of the window's outputs weighted by a softmax of `select` over its largest
    `exchange_tokens` values (ties to the lowest index; the choice is constant in backward).

    Args:
        q: [B, H, T, d], any strides; those of a [B, T, H, d] projection need no copy.
        k, v: [B, H_kv, T, d] of q's dtype; H_kv divides H, H / H_kv query heads share a key head.
        window: tokens in a window, at least 1; made for up to 256.
        select: [B, H, T] in q's dtype or float32, or None for no summary.
        exchange_tokens: how many tokens a summary is made of, 1 to `window`; None for all.
        causal: a token attends to those up to itself.
        scale: of the scores; None for 1 / sqrt(d).
        document_starts: int32 [n] or [B, n], the ascending positions at which documents start, the first 0; windows
            are counted from each start, so none crosses a document. A repeated or last position T adds none. Not with
            `select`.

    Returns:
        out [B, H, T, d] in q's dtype; with select, (out, summary [B, H, W, d]), W = ceil(T / window). out lies as
        [B, T, H, d] in memory where q does. Scores and sums are in float32 or better. Under autocast q, k and v take
        its dtype. Differentiable in q, k, v and select, any number of times: backward computes the probabilities
        again; the second derivative is the reference's, in memory T * window.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    checked = arguments.attention(q, k, v, window, select, exchange_tokens, causal, scale, document_starts)
    family = _family(checked.q)
    out, summary = reference.window_attention(*checked) if family is None else family.attention(*checked)
    return out if select is None else (out, summary)


def window_exchange(
    summary: Tensor, source: Tensor | None = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attention between the summaries of windows: e_w = softmax_j(z_source(w) . z_j * scale) z_j.

    Args:
        summary: z [B, H, W, d], any strides.
        source: int64 [W] or [B, W], the window whose summary is window w's query; repeats are allowed. None: w itself,
            or w - 1 where causal. In [0, W), or where causal in [0, w - 1], source(0) being ignored.
        causal: window w sees windows j < w; e_0 = 0.
        scale: of the scores; None for 1 / sqrt(d).

    Returns:
        e [B, H, W, d], summary's dtype, contiguous. Memory is linear in W; the second derivative, which is the
        reference's, makes a W x W matrix a head. Differentiable any number of times.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
        RuntimeError: on the CPU for a source out of range.
    """
    checked = arguments.exchange(summary, source, causal, scale)
    family = _family(checked.summary)
    result: Tensor = reference.window_exchange(*checked) if family is None else family.exchange(*checked)
    return result


def njx_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor,
    window: int,
    *,
    source: Tensor | None = None,
    gate: Tensor,
    exchange_fraction: float = 1.0,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Windowed attention whose windows exchange their summaries: out_t = o_t + gate_h * e_w(t).

    `window_attention` gives o and a summary of each window, `window_exchange` gives e: all in one op, with nothing of
    the size of q between them.

    Args:
        q, k, v, window, causal, scale: as in `window_attention`; scale is that of both attentions.
        select: [B, H, T] in q's dtype or float32.
        source: as in `window_exchange`.
        gate: [H] in q's dtype or float32.
        exchange_fraction: of a window's tokens, the part that its summary is made of, in (0, 1]: the
            max(1, ceil(exchange_fraction * window)) of largest select.

    Returns:
        [B, H, T, d] in q's dtype, in memory as `window_attention`'s. Differentiable in q, k, v, select and gate, any
        number of times.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
        RuntimeError: on the CPU for a source out of range.
    """
    checked = arguments.njx(q, k, v, select, window, source, gate, exchange_fraction, causal, scale)
    family = _family(checked.q)
    result: Tensor = reference.njx_attention(*checked) if family is None else family.njx(*checked)[0]
    return result
