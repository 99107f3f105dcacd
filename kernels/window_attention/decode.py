"""njx_attention one token at a time: the keys and values of the current window, and the summaries of those before."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .._seeds import compute_dtype
from .arguments import tokens_of
from .reference import summary_weights


class NJXCache:
    """What causal njx_attention keeps of the tokens so far: a window of keys and values and a summary a window.

    Memory is (2 H_kv + H) w d + H (T / w) d a sequence, in place of the 2 H_kv T d of full attention.

    Args:
        window, exchange_fraction, scale: as in `njx_attention`.
    """

    def __init__(self, window: int, *, exchange_fraction: float = 1.0, scale: float | None = None) -> None:
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        self.window, self.scale = window, scale
        self.tokens = tokens_of(exchange_fraction, window)
        self.length = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._select: list[Tensor] = []
        self._summaries: list[Tensor] = []
        self._exchange: Tensor | None = None

    def append(self, q: Tensor, k: Tensor, v: Tensor, select: Tensor, gate: Tensor) -> Tensor:
        """The outputs of the next tokens, those of `njx_attention(.., causal=True)` on all tokens so far, to rounding.

        Args:
            q: [B, H, T, d], T tokens at least 1; k, v: [B, H_kv, T, d]; select: [B, H, T]; gate: [H].

        Returns:
            [B, H, T, d], q's dtype. No gradient is kept.

        Raises:
            ValueError: for shapes that do not fit.
        """
        if (
            q.dim() != 4
            or k.shape != v.shape
            or k.shape[2:] != q.shape[2:]
            or q.shape[2] == 0
            or select.shape != q.shape[:3]
        ):
            raise ValueError(
                f"q, k, v, select: expected [B, H, T, d], [B, H_kv, T, d] twice and [B, H, T], got {list(q.shape)}, "
                f"{list(k.shape)}, {list(v.shape)}, {list(select.shape)}"
            )
        with torch.no_grad():
            tokens = [
                self._next(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], select[:, :, t : t + 1], gate)
                for t in range(q.shape[2])
            ]
            return torch.cat(tokens, dim=2)

    def _next(self, q: Tensor, k: Tensor, v: Tensor, select: Tensor, gate: Tensor) -> Tensor:
        self._keys.append(k)
        self._values.append(v)
        keys, values = torch.cat(self._keys, 2), torch.cat(self._values, 2)
        out = F.scaled_dot_product_attention(q, keys, values, scale=self.scale, enable_gqa=True)
        wide = out.to(compute_dtype(out.dtype))
        self._outputs.append(wide)
        self._select.append(select.to(wide.dtype))
        e = self._exchange
        self.length += 1
        if self.length % self.window == 0:
            self._close_window()
        return out if e is None else out + (gate.to(wide.dtype)[:, None, None] * e).to(out.dtype)

    def _close_window(self) -> None:
        outputs, select = torch.cat(self._outputs, 2), torch.cat(self._select, 2)
        weights = summary_weights(select, torch.ones_like(select, dtype=torch.bool), self.tokens)
        summary = (weights.unsqueeze(-1) * outputs).sum(2, keepdim=True)
        self._summaries.append(summary)
        z = torch.cat(self._summaries, 2)
        scale = 1 / math.sqrt(z.shape[-1]) if self.scale is None else self.scale
        # The next window's query is the summary of the one before it, which is this one.
        self._exchange = F.scaled_dot_product_attention(summary, z, z, scale=scale)
        self._keys, self._values, self._outputs, self._select = [], [], [], []
