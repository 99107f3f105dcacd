"""Attention inside windows and between their summaries in plain PyTorch: the definition of these ops.

Tensors are [B, H, T, d]; inside, tokens are folded into windows, [B, H, W, w, d], the last window filled up with zeros.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

Slots = tuple[Tensor | None, int]


def _slots(length: int, window: int, starts: Tensor | None) -> Slots:
    """The place of each token among W windows of `window` places, [T] or [B, T] (None: in order), and W."""
    if starts is None:
        return None, -(-length // window)
    token = torch.arange(length, device=starts.device)
    document = torch.searchsorted(starts.long(), token.expand(*starts.shape[:-1], length).contiguous(), right=True) - 1
    offset = token - starts.long().gather(-1, document)
    index = (offset % window == 0).cumsum(-1) - 1
    # A document more cuts one window more in two.
    return index * window + offset % window, -(-length // window) + starts.shape[-1]


def _fold(x: Tensor, slots: Slots, window: int) -> Tensor:
    """[B, H, T, ..] -> [B, H, W, w, ..]"""
    index, windows = slots
    tail = x.shape[3:]
    if index is None:
        x = F.pad(x, (0, 0) * len(tail) + (0, windows * window - x.shape[2]))
    else:
        index = index.reshape(-1, 1, x.shape[2], *(1 for _ in tail)).expand(x.shape)
        x = x.new_zeros((*x.shape[:2], windows * window, *tail)).scatter(2, index, x)
    return x.reshape(*x.shape[:2], windows, window, *tail)


def _unfold(x: Tensor, slots: Slots, length: int) -> Tensor:
    """[B, H, W, w, d] -> [B, H, T, d]"""
    index, flat = slots[0], x.flatten(2, 3)
    if index is None:
        return flat[:, :, :length]
    return flat.gather(2, index.reshape(-1, 1, length, 1).expand(*x.shape[:2], length, x.shape[-1]))


def summary_weights(select: Tensor, used: Tensor, tokens: int) -> Tensor:
    """The softmax of select [B, H, W, w] over the `tokens` largest of each window, 0 elsewhere."""
    scores = select.masked_fill(~used, -torch.inf)
    chosen = scores.detach().argsort(dim=-1, descending=True, stable=True)[..., :tokens]
    mask = torch.zeros_like(used.expand(scores.shape)).scatter(-1, chosen, True) & used
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    select: Tensor | None,
    document_starts: Tensor | None,
    window: int,
    exchange_tokens: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, d], summary [B, H, W, d], or of no element where select is None)."""
    length, group = q.shape[2], q.shape[1] // max(1, k.shape[1])
    slots = _slots(length, window, document_starts)
    queries, keys, values = (
        _fold(x, slots, window) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    used = _fold(torch.ones_like(q[..., :1], dtype=torch.bool), slots, window).squeeze(-1)
    place = torch.arange(window, device=q.device)
    visible = used.unsqueeze(-2) & (place <= place[:, None]) if causal else used.unsqueeze(-2)
    # A place without a token sees itself: its softmax is of something.
    visible = visible | (place == place[:, None])
    scores = (queries * scale) @ keys.transpose(-1, -2)
    folded = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values
    out = _unfold(folded, slots, length)
    if select is None:
        return out, q.new_empty(0)
    weights = summary_weights(_fold(select, slots, window), used, exchange_tokens)
    return out, (weights.unsqueeze(-1) * folded).sum(-2).to(q.dtype)


def window_exchange(summary: Tensor, source: Tensor | None, causal: bool, scale: float) -> Tensor:
    """e [B, H, W, d]: window w's is softmax over windows j of (z_source(w) . z_j * scale), times z_j."""
    windows = summary.shape[2]
    index = torch.arange(windows, device=summary.device)
    if source is None:
        source = index - 1 if causal else index
    if causal:
        source = torch.where(index == 0, 0, source)
    if source.dim() == 1:
        queries = summary[:, :, source]
    else:
        queries = summary.gather(2, source[:, None, :, None].expand(summary.shape))
    scores = (queries * scale) @ summary.transpose(-1, -2)
    if not causal:
        return scores.softmax(-1) @ summary
    first = index == 0
    hidden = (index >= index[:, None]) & ~(first & first[:, None])
    e = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ summary
    return e.masked_fill(first[:, None], 0)


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
) -> Tensor:
    """out [B, H, T, d]: attention inside each window, plus gate [H] times its part of the exchange."""
    out, summary = window_attention(q, k, v, select, None, window, exchange_tokens, causal, scale)
    e = window_exchange(summary, source, causal, scale).repeat_interleave(window, 2)[:, :, : q.shape[2]]
    return out + (gate[:, None, None] * e).to(q.dtype)
