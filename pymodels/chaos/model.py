"""The chaos transformer: every projection has noise in its weights, made inside the kernel at each call."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..generate import Generated, Sampling, generate
from ..layers import LayerCache, NoiseKeys, NoisyLinear, empty_cache, initialize, place_in_context, run_block
from ..tokenizers import Tokenizer
from .config import ChaosConfig


class OscillatingAttention(nn.Module):
    """Causal attention whose temperature oscillates: softmax(q k^T / sqrt(d) (1 + a sin(phase + f))) v.

    f is learned; `phase` is where the oscillation stands, moved on by f after each training step (`advance`), and the
    same in all evaluation and generation. The source adds the sine to the scores, which a softmax does not see.
    """

    phase: Tensor

    def __init__(self, config: ChaosConfig) -> None:
        super().__init__()
        self.heads, self.amplitude = config.heads, config.amplitude
        width = config.width
        self.q, self.k, self.v, self.o = (NoisyLinear(width, width, bias=False) for _ in range(4))
        # One element, not a scalar: FSDP2 shards no scalars.
        self.frequency = nn.Parameter(torch.ones(1))
        self.register_buffer("phase", torch.zeros(1, dtype=torch.float64))

    @torch.no_grad()
    def advance(self) -> None:
        """The oscillation after one more training step."""
        frequency = self.frequency
        whole = frequency.full_tensor() if hasattr(frequency, "full_tensor") else frequency
        self.phase.add_(whole.double()).remainder_(2 * math.pi)

    def forward(self, x: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """x [B, T, width], the same shape."""
        batch, length, width = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        temperature = 1 + self.amplitude * torch.sin(self.phase + self.frequency)
        q, k, v = heads(self.q(x)) * temperature.to(x.dtype), heads(self.k(x)), heads(self.v(x))
        if cache is not None:
            k, v = cache.append(k, v)
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v, attn_mask=mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + feed_forward(x))."""

    def __init__(self, config: ChaosConfig) -> None:
        super().__init__()
        self.attention = OscillatingAttention(config)
        self.attention_norm = nn.LayerNorm(config.width)
        self.up = NoisyLinear(config.width, config.hidden)
        self.down = NoisyLinear(config.hidden, config.width)
        self.feed_forward_norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """x [B, T, width], the same shape."""
        x = self.attention_norm(x + self.attention(x, mask, cache))
        return self.feed_forward_norm(x + self.down(F.relu(self.up(x))))  # type: ignore[no-any-return]


class ChaosTransformer(nn.Module):
    """A causal post-norm transformer; at intensity i each weight w of q, k, v, o and of the feed-forward, its biases
    too, is w + i std(w) normal at every call.

    Gradients are those of the perturbed forward, for the weights and for the inputs; the standard deviations are
    constants. The noise is that of a step: `model.noise.set(step, 0)` draws it anew (the engine does at each one).

    Args:
        config: sizes and schedule.
        seed: of the run, from which the initial weights and the first noise are drawn.
    """

    #: Set by the engine: blocks are computed again in backward instead of keeping their activations.
    recompute = False

    def __init__(self, config: ChaosConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        initialize(self, seed, lambda _, parameter: config.init_std if parameter.dim() >= 2 else None)
        for module in self.modules():
            if isinstance(module, NoisyLinear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.noise = NoiseKeys(self, seed)
        self.noise.set(0, 0)
        self.intensity = config.intensity

    @property
    def intensity(self) -> float:
        """Noise over the standard deviation of each weight."""
        return self._intensity

    @intensity.setter
    def intensity(self, value: float) -> None:
        for module in self.modules():
            if isinstance(module, NoisyLinear):
                module.intensity = value
        self._intensity = float(value)

    @contextlib.contextmanager
    def at(self, intensity: float | None) -> Iterator[None]:
        """Inside, the model has this intensity (None: its own); afterwards the one that it had."""
        before = self.intensity
        self.intensity = before if intensity is None else intensity
        try:
            yield
        finally:
            self.intensity = before

    def advance(self) -> None:
        """Move every oscillation on by a training step."""
        for block in self.blocks:
            block.attention.advance()  # type: ignore[operator, union-attr]

    def generate(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        chaos_intensity: float | None = None,
    ) -> list[Generated]:
        """`quaver.pymodels.generate` at another intensity, which is given back; the noise is that of the last step."""
        with self.at(chaos_intensity):
            return generate(self, tokenizer, prompts, sampling or Sampling())

    def make_cache(self, batch: int) -> list[LayerCache]:
        """An empty cache of keys and values for `batch` sequences of up to `context` tokens."""
        c = self.config
        return empty_cache(c.layers, (batch, c.heads, c.context, c.width // c.heads), self.embedding.weight)

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
        x = self.embedding(tokens) + self.positions.weight[past : past + length]
        for number, block in enumerate(self.blocks):
            x = run_block(block, x, mask, cache[number] if cache else None, recompute=self.recompute)
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x), weight)
