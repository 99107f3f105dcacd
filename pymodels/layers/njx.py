"""Attention inside windows that exchange summaries."""

from typing import Any

import torch
from torch import Tensor, nn

from quaver.kernels import njx_attention, philox_permutation, philox_uniform, window_attention
from quaver.kernels.window_attention.arguments import tokens_of

from .basic import rotate
from .noise import signed

#: Of the choice of the windows whose source is drawn; the draws themselves are stream 0 of the same seed.
_CHOICE_STREAM = 1


class NJXAttention(nn.Module):
    """Attention inside windows that exchange summaries, with projections of its own and no biases.

    In training the windows' sources are drawn from the noise stream, the same for all rows of a step; in evaluation a
    window's source is itself, or where causal the one before it.

    Args:
        width, heads, kv_heads: as in `Attention`.
        window: tokens in a window.
        causal: tokens see those before in their window, windows the windows before.
        exchange: "random", attention between summaries with drawn sources; "sinkhorn", a doubly stochastic mixing by
            `iterations` normalizations in the logarithm (Sinkhorn 1964; not causal); "low-rank", z <- U V^T z with
            learned U and V [max_windows, rank], strictly lower triangular where causal; "none".
        exchange_fraction: of a window's tokens, the part that its summary is made of.
        jitter_probability: that a window's source is drawn.
        jitter_range: where causal, sources are drawn from so many windows before; None for all.
        gate: the exchange's weight at the start, one learned number a head.
    """

    seed: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        window: int,
        *,
        causal: bool = True,
        exchange: str = "random",
        exchange_fraction: float = 1.0,
        jitter_probability: float = 1.0,
        jitter_range: int | None = None,
        gate: float = 0.1,
        max_windows: int = 64,
        rank: int = 8,
        iterations: int = 20,
    ) -> None:
        super().__init__()
        if exchange not in ("random", "sinkhorn", "low-rank", "none"):
            raise ValueError(f"exchange: expected random, sinkhorn, low-rank or none, got {exchange!r}")
        if exchange == "sinkhorn" and causal:
            raise ValueError("exchange: sinkhorn normalizes over all windows, so it cannot be causal")
        if not 0 <= jitter_probability <= 1:
            raise ValueError(f"jitter_probability: expected a number in [0, 1], got {jitter_probability}")
        if jitter_range is not None and jitter_range < 1:
            raise ValueError(f"jitter_range: expected at least 1 or None, got {jitter_range}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.window, self.causal, self.exchange, self.exchange_fraction = window, causal, exchange, exchange_fraction
        self.jitter_probability, self.jitter_range, self.iterations = jitter_probability, jitter_range, iterations
        self.q = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(heads * self.head_dim, width, bias=False)
        if exchange != "none":
            self.select = nn.Linear(width, heads, bias=False)
            self.gate = nn.Parameter(torch.full((heads,), float(gate)))
        if exchange == "low-rank":
            self.to_windows = nn.Parameter(torch.randn(max_windows, rank) / rank**0.5)
            self.from_windows = nn.Parameter(torch.randn(max_windows, rank) / max_windows**0.5)
        # A buffer, not an int: a new step must compile nothing.
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64), persistent=False)

    def set_noise(self, key: int, step: int, row: int) -> None:
        """See Noisy."""
        self.seed.fill_(signed(key + step))

    def source(self, windows: int) -> Tensor | None:
        """int64 [windows], the window whose summary is each window's query; None where none is drawn."""
        if not self.training or self.exchange != "random" or self.jitter_probability == 0:
            return None
        device = self.seed.device
        index = torch.arange(windows, device=device)
        if self.causal:
            most = index if self.jitter_range is None else index.clamp(max=self.jitter_range)
            # Uniforms are in (0, 1]: their ceiling counts windows back from 1 on.
            uniform = philox_uniform(windows, self.seed, device=device)
            drawn, plain = index - (uniform * most).ceil().long(), index - 1
        else:
            drawn, plain = philox_permutation(windows, self.seed, device=device), index
        if self.jitter_probability < 1:
            chosen = philox_uniform(windows, self.seed, stream=_CHOICE_STREAM, device=device) <= self.jitter_probability
            drawn = torch.where(chosen, drawn, plain)
        return drawn.clamp(min=0)

    def _mixed(self, z: Tensor) -> Tensor:
        """The exchanged summaries of z [B, H, W, d], by a matrix over windows."""
        windows = z.shape[2]
        if self.exchange == "sinkhorn":
            logits = (z @ z.transpose(-1, -2)).float() * self.head_dim**-0.5
            for _ in range(self.iterations):
                logits = logits - logits.logsumexp(-1, keepdim=True)
                logits = logits - logits.logsumexp(-2, keepdim=True)
            mixed: Tensor = logits.exp().to(z.dtype) @ z
            return mixed
        if windows > self.to_windows.shape[0]:
            raise ValueError(f"x: expected at most {self.to_windows.shape[0]} windows, max_windows, got {windows}")
        mixing = self.to_windows[:windows] @ self.from_windows[:windows].T
        return (mixing.tril(-1) if self.causal else mixing).to(z.dtype) @ z

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, T, width], the same shape. tables: of `rotary_tables`, or None for no rotation."""
        batch, length, _ = x.shape

        def heads(projected: Tensor, count: int) -> Tensor:
            return projected.view(batch, length, count, self.head_dim).transpose(1, 2)

        q, k, v = heads(self.q(x), self.heads), heads(self.k(x), self.kv_heads), heads(self.v(x), self.kv_heads)
        if tables is not None:
            q, k = rotate(q, tables), rotate(k, tables)
        if self.exchange == "none":
            y: Any = window_attention(q, k, v, self.window, causal=self.causal)
            return self.o(y.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]
        select = self.select(x).transpose(1, 2)
        if self.exchange == "random":
            source = self.source(-(-length // self.window))
            y = njx_attention(
                *(q, k, v, select, self.window),
                source=source,
                gate=self.gate,
                exchange_fraction=self.exchange_fraction,
                causal=self.causal,
            )
        else:
            tokens = tokens_of(self.exchange_fraction, self.window)
            local: Any = window_attention(
                q, k, v, self.window, select=select, exchange_tokens=tokens, causal=self.causal
            )
            y, z = local
            e = (self.gate[:, None, None] * self._mixed(z)).to(y.dtype)
            y = y + e.repeat_interleave(self.window, 2)[:, :, :length]
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]
