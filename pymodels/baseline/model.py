"""The baseline: embedding, blocks of attention and SwiGLU with RMSNorm before each, norm, head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import (
    Attention,
    Dropout,
    LayerCache,
    RMSNorm,
    SwiGLU,
    empty_cache,
    initialize,
    place_in_context,
    rotary_tables,
    run_block,
)
from .config import BaselineConfig


class Block(nn.Module):
    """x + attention(norm x), then x + feed_forward(norm x)."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config.width, config.heads, config.kv_heads)
        self.attention_dropout = Dropout(config.dropout)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(config.width, config.hidden)
        self.feed_forward_dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """x [B, T, width], the same shape."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), tables, mask, cache))
        return x + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x)))  # type: ignore[no-any-return]


class Baseline(nn.Module):
    """A causal transformer whose logits equal those of Hugging Face's LlamaForCausalLM with the same weights.

    Args:
        config: sizes.
        seed: of the run, from which the initial weights are drawn.
    """

    #: Set by the engine: blocks are computed again in backward instead of keeping their activations.
    recompute = False

    def __init__(self, config: BaselineConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.embedding_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)

        def std(path: str, parameter: nn.Parameter) -> float | None:
            if parameter.dim() == 1:
                return None
            writes = path.endswith((".o.weight", ".down.weight"))
            return config.init_std / (2 * config.layers) ** 0.5 if writes else config.init_std

        initialize(self, seed, std)

    def make_cache(self, batch: int) -> list[LayerCache]:
        """An empty cache of keys and values for `batch` sequences of up to `context` tokens."""
        c = self.config
        return empty_cache(c.layers, (batch, c.kv_heads, c.context, c.width // c.heads), self.embedding.weight)

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, cache: list[LayerCache] | None = None
    ) -> Tensor:
        """Logits of the token after each.

        Args:
            tokens: int64 [B, T], T at most `context`; with a cache, those after what it holds.
            attention_mask: [B, T], 0 for padding that nothing attends to; not together with a cache.
            cache: of `make_cache`; the keys and values of `tokens` are added to it.

        Returns:
            [B, T, vocab_size].

        Raises:
            ValueError: for more tokens than the context holds, or a mask with a cache.
        """
        past, mask = place_in_context(tokens, attention_mask, cache, self.config.context)
        length = tokens.shape[1]
        positions = torch.arange(past, past + length, device=tokens.device)
        tables = rotary_tables(positions, self.config.width // self.config.heads, self.config.rope_base)
        x = self.embedding_dropout(self.embedding(tokens))
        for number, block in enumerate(self.blocks):
            x = run_block(block, x, tables, mask, cache[number] if cache else None, recompute=self.recompute)
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x), weight)
