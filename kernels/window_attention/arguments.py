"""Checks the arguments of the public functions and brings them into the form that the ops take."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._autocast import autocast
from .._seeds import check_floating, compute_dtype


class Attention(NamedTuple):
    """The arguments of window_attention, in order."""

    q: Tensor
    k: Tensor
    v: Tensor
    select: Tensor | None
    document_starts: Tensor | None
    window: int
    exchange_tokens: int
    causal: bool
    scale: float


class Exchange(NamedTuple):
    """The arguments of window_exchange, in order."""

    summary: Tensor
    source: Tensor | None
    causal: bool
    scale: float


class NJX(NamedTuple):
    """The arguments of njx_attention, in order."""

    q: Tensor
    k: Tensor
    v: Tensor
    select: Tensor
    source: Tensor | None
    gate: Tensor
    window: int
    exchange_tokens: int
    causal: bool
    scale: float


def _check_same(name: str, tensor: Tensor, like: Tensor, of: str) -> None:
    check_floating(name, tensor)
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, as {of} is, got one on {tensor.device}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype}, as {of} has, got {tensor.dtype}")


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_floating("q", q)
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, H, T, d], got shape {list(q.shape)}")
    batch, heads, length, width = q.shape
    for name, x in (("k", k), ("v", v)):
        _check_same(name, x, q, "q")
        if x.dim() != 4 or x.shape[0] != batch or x.shape[2] != length or x.shape[3] != width:
            raise ValueError(
                f"{name}: expected [{batch}, H, {length}, {width}] for q {list(q.shape)}, got {list(x.shape)}"
            )
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v: expected {k.shape[1]} heads, as k has, got {v.shape[1]}")
    if width == 0:
        raise ValueError("q: expected a head width of at least 1, got 0")
    if heads != k.shape[1] and (k.shape[1] == 0 or heads % k.shape[1] != 0):
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {k.shape[1]}")


def _check_window(window: int) -> None:
    if not isinstance(window, (int, torch.SymInt)) or isinstance(window, bool):
        raise TypeError(f"window: expected an int, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")


def _check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def _scale(scale: float | None, width: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(width)
    if not isinstance(scale, (int, float, torch.SymFloat)) or isinstance(scale, bool):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return float(scale)


def _in_compute_dtype(name: str, tensor: Tensor, q: Tensor, shape: tuple[int, ...], letters: str) -> Tensor:
    """A small input in the dtype that the kernels compute in; q's dtype or that one is taken."""
    check_floating(name, tensor)
    wide = compute_dtype(q.dtype)
    if tensor.device != q.device:
        raise ValueError(f"{name}: expected a tensor on {q.device}, as q is, got one on {tensor.device}")
    if tensor.dtype not in (q.dtype, wide):
        also = "" if wide == q.dtype else f" or {wide}"
        raise TypeError(f"{name}: expected {q.dtype}{also} with a q of {q.dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {letters} {list(shape)} for q {list(q.shape)}, got {list(tensor.shape)}")
    return tensor.to(wide)


def _check_source(source: Tensor, device: torch.device, batch: int, windows: int) -> None:
    if not isinstance(source, Tensor):
        raise TypeError(f"source: expected an int64 tensor or None, got {type(source).__name__}")
    if source.dtype != torch.int64:
        raise TypeError(f"source: expected an int64 tensor, got {source.dtype}")
    if source.device != device:
        raise ValueError(f"source: expected a tensor on {device}, got one on {source.device}")
    if tuple(source.shape) not in ((windows,), (batch, windows)):
        raise ValueError(f"source: expected [{windows}] or [{batch}, {windows}], got {list(source.shape)}")


def _check_documents(starts: Tensor, q: Tensor) -> None:
    if not isinstance(starts, Tensor):
        raise TypeError(f"document_starts: expected an int32 tensor or None, got {type(starts).__name__}")
    if starts.dtype != torch.int32:
        raise TypeError(f"document_starts: expected an int32 tensor, got {starts.dtype}")
    if starts.device != q.device:
        raise ValueError(f"document_starts: expected a tensor on {q.device}, as q is, got one on {starts.device}")
    if starts.dim() not in (1, 2) or (starts.dim() == 2 and starts.shape[0] != q.shape[0]) or starts.shape[-1] < 1:
        raise ValueError(f"document_starts: expected [n] or [{q.shape[0]}, n], n at least 1, got {list(starts.shape)}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    select: Tensor | None,
    exchange_tokens: int | None,
    causal: bool,
    scale: float | None,
    document_starts: Tensor | None,
) -> Attention:
    """Checked arguments of window_attention.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    q, k, v = autocast(q), autocast(k), autocast(v)
    _check_heads(q, k, v)
    _check_window(window)
    _check_bool("causal", causal)
    if exchange_tokens is not None:
        if not isinstance(exchange_tokens, int) or isinstance(exchange_tokens, bool):
            raise TypeError(f"exchange_tokens: expected an int or None, got {type(exchange_tokens).__name__}")
        if not 1 <= exchange_tokens <= window:
            raise ValueError(f"exchange_tokens: expected 1 to {window}, the window, got {exchange_tokens}")
        if select is None:
            raise ValueError("exchange_tokens: needs select, got None")
    if select is not None:
        if document_starts is not None:
            raise ValueError("select: there is no summary of windows that depend on document_starts; give one of them")
        select = _in_compute_dtype("select", select, q, tuple(q.shape[:3]), "[B, H, T]")
    if document_starts is not None:
        _check_documents(document_starts, q)
    tokens = window if exchange_tokens is None else exchange_tokens
    return Attention(q, k, v, select, document_starts, window, tokens, causal, _scale(scale, q.shape[-1]))


def exchange(summary: Tensor, source: Tensor | None, causal: bool, scale: float | None) -> Exchange:
    """Checked arguments of window_exchange.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    summary = autocast(summary)
    check_floating("summary", summary)
    if summary.dim() != 4 or summary.shape[-1] == 0:
        raise ValueError(f"summary: expected [B, H, W, d], d at least 1, got {list(summary.shape)}")
    _check_bool("causal", causal)
    if source is not None:
        _check_source(source, summary.device, summary.shape[0], summary.shape[2])
    return Exchange(summary, source, causal, _scale(scale, summary.shape[-1]))


def tokens_of(fraction: float, window: int) -> int:
    """How many tokens of a whole window its summary is made of.

    The small number takes back what the fraction's rounding may add: 0.07 * 100 is 7.000000000000001.
    """
    if not isinstance(fraction, (int, float)) or isinstance(fraction, bool):
        raise TypeError(f"exchange_fraction: expected a float, got {type(fraction).__name__}")
    if not 0 < fraction <= 1:
        raise ValueError(f"exchange_fraction: expected a number in (0, 1], got {fraction}")
    return max(1, math.ceil(fraction * window - 1e-9))


def njx(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor,
    window: int,
    source: Tensor | None,
    gate: Tensor,
    exchange_fraction: float,
    causal: bool,
    scale: float | None,
) -> NJX:
    """Checked arguments of njx_attention.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    q, k, v = autocast(q), autocast(k), autocast(v)
    _check_heads(q, k, v)
    _check_window(window)
    _check_bool("causal", causal)
    select = _in_compute_dtype("select", select, q, tuple(q.shape[:3]), "[B, H, T]")
    gate = _in_compute_dtype("gate", gate, q, (q.shape[1],), "[H]")
    if source is not None:
        _check_source(source, q.device, q.shape[0], -(-q.shape[2] // window))
    tokens = tokens_of(exchange_fraction, window)
    return NJX(q, k, v, select, source, gate, window, tokens, causal, _scale(scale, q.shape[-1]))
