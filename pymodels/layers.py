"""Parts that several systems are made of: norms, rotary positions, attention, SwiGLU, dropout, noise keys."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from quaver.kernels import (
    PerturbedLinear,
    dropout,
    njx_attention,
    perturb,
    perturbed_linear,
    philox_permutation,
    philox_uniform,
    seed_for,
    window_attention,
)
from quaver.kernels.window_attention.arguments import tokens_of

#: Of the noise in biases; that in weights is stream 0 of the same seed.
_BIAS_STREAM = 1


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [.., width], the same shape and dtype."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) without biases (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., width], the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def rotary_tables(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of each position and frequency, float32 [T, head_dim], the halves alike (Su et al. 2021)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float().unsqueeze(-1) / base**exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, H, T, d] with pairs (i, i + d/2) rotated by their positions' angles."""
    cos, sin = (table.to(x.dtype) for table in tables)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


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


@runtime_checkable
class Noisy(Protocol):
    """A module with noise: `key` is made by `NoiseKeys` from the run's seed and the module's path."""

    def set_noise(self, key: int, step: int, row: int) -> None:
        """The noise of a step: seed key + step, and the number in the global batch of the first row to come."""


def signed(seed: int) -> int:
    """A seed modulo 2^64 as an int64 has it."""
    return (seed + 2**63) % 2**64 - 2**63


class Dropout(nn.Module):
    """Dropout from the package's stream: row r of the global batch has the same mask however the batch is cut."""

    seed: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.row = 0
        # A buffer, not an int: a new step must compile nothing.
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64), persistent=False)

    def set_noise(self, key: int, step: int, row: int) -> None:
        """See Noisy."""
        self.seed.fill_(signed(key + step))
        self.row = row

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..], rows first; the same shape. Nothing is dropped in evaluation."""
        if not self.training or self.p == 0:
            return x
        return dropout(x, self.p, self.seed, offset=self.row * (x.numel() // x.shape[0]))


class NoisyLinear(PerturbedLinear):
    """PerturbedLinear whose seed is a step's: all rows of the global batch see the same perturbed weights.

    Where gradients are wanted the perturbed weight is made once and kept for backward, which would make its noise again
    (0.78 to 0.97 of the time on a CPU, for as much memory as the weights take); elsewhere it is never stored.
    """

    step_seed: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias, intensity=0.0)
        # A buffer, not an int: a new step must compile nothing. Not of the state: the step and the path give it.
        self.register_buffer("step_seed", torch.zeros((), dtype=torch.int64), persistent=False)

    def set_noise(self, key: int, step: int, row: int) -> None:
        """See Noisy."""
        self.step_seed.fill_(signed(key + step))

    @property
    def seed(self) -> Tensor:
        """Of the step."""
        return self.step_seed

    @seed.setter
    def seed(self, value: Any) -> None:
        if "step_seed" in self._buffers:  # not yet where PerturbedLinear's constructor sets its own
            self.step_seed.fill_(signed(int(value)))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_features] -> [.., out_features]."""
        if self._silent:
            return F.linear(x, self.weight, self.bias)
        sigma, bias_sigma = self._sigmas()
        bias = self.bias
        if bias is not None and bias_sigma is not None:
            bias = perturb(bias, bias_sigma, self.step_seed, stream=_BIAS_STREAM)  # type: ignore[assignment]
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return F.linear(x, perturb(self.weight, sigma, self.step_seed), bias)
        return perturbed_linear(x, self.weight, bias, sigma=sigma, seed=self.step_seed)


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


class NoiseKeys:
    """The keys of a model's noisy modules: seed_for(run seed, module path), before anything wraps the model."""

    def __init__(self, model: nn.Module, run_seed: int) -> None:
        self.modules = [
            (module, seed_for(run_seed, f"{path}.{type(module).__name__.lower()}"))
            for path, module in model.named_modules()
            if isinstance(module, Noisy)
        ]

    def set(self, step: int, row: int) -> None:
        """Give every module the noise of a step, for rows from `row` on of its global batch."""
        for module, key in self.modules:
            module.set_noise(key, step, row)


def run_block(block: Callable[..., Any], *arguments: Any, recompute: bool) -> Any:
    """block(*arguments); with `recompute` its activations are not kept for backward but made again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
    return block(*arguments)


def initialize(model: nn.Module, run_seed: int, std: Callable[[str, nn.Parameter], float | None]) -> None:
    """Fill parameters with normals, each from a generator of its own: seed_for(run seed, "<path>.init").

    Args:
        std: of a parameter, from its path and itself; None leaves it as it is.
    """
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            deviation = std(path, parameter)
            if deviation is not None:
                generator = torch.Generator().manual_seed(seed_for(run_seed, f"{path}.init") % 2**63)
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(deviation))


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """Parameters of some modules, those that are shared counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
