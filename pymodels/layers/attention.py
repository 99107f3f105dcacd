"""Causal attention over a whole context, its masks and its cache of keys and values."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .basic import rotate


def empty_cache(layers: int, shape: tuple[int, int, int, int], like: Tensor) -> "list[LayerCache]":
    """For each layer, keys and values of `shape` [B, kv heads, context, d], of a tensor's device and dtype."""
    return [LayerCache(*shape, device=like.device, dtype=like.dtype) for _ in range(layers)]


class LayerCache:
    """Keys and values of one layer, [B, kv heads, capacity, d], filled up to `length`."""

    def __init__(self, batch: int, heads: int, capacity: int, head_dim: int, device: Any, dtype: torch.dtype) -> None:
        shape = (batch, heads, capacity, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v [B, kv heads, T, d]; returns all of them so far."""
        end = self.length + k.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"cache: expected at most {self.keys.shape[2]} positions, got {end}")
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: list[int]) -> None:
        """Keep only some of the sequences."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def causal_mask(queries: int, keys: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """bool [1 or B, 1, queries, keys], true where attention is allowed: back, to unmasked keys, and to oneself.

    The queries are the last of the keys. Padding attends to itself, so that no row of a softmax is empty.
    """
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    allowed = (distance >= 0)[None, None]
    if attention_mask is None:
        return allowed
    return (allowed & attention_mask[:, None, None, :].bool()) | (distance == 0)


def place_in_context(
    tokens: Tensor, attention_mask: Tensor | None, cache: list[LayerCache] | None, context: int
) -> tuple[int, Tensor | None]:
    """How many tokens come before those of a call, and the mask of its attention: None for plain causal attention.

    Raises:
        ValueError: for more tokens than the context holds, or a mask with a cache.
    """
    past, length = cache[0].length if cache else 0, tokens.shape[1]
    if past + length > context:
        raise ValueError(f"tokens: expected at most context = {context}, got {past + length}")
    if cache and attention_mask is not None:
        raise ValueError("attention_mask: expected None together with a cache")
    plain = attention_mask is None and past == 0
    return past, None if plain else causal_mask(length, past + length, attention_mask, tokens.device)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped queries (Ainslie et al. 2023), without biases."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [B, T, width], the same shape. mask: of `causal_mask`, or None for plain causal attention of T with T."""
        batch, length, _ = x.shape

        def heads(projected: Tensor, count: int) -> Tensor:
            return projected.view(batch, length, count, self.head_dim).transpose(1, 2)

        q = rotate(heads(self.q(x), self.heads), tables)
        k, v = rotate(heads(self.k(x), self.kv_heads), tables), heads(self.v(x), self.kv_heads)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.kv_heads != self.heads:
            k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]
