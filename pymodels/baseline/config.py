"""The configuration of the baseline and its presets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import require


@dataclass(frozen=True)
class BaselineConfig:
    """A decoder-only transformer, as of Llama (Touvron et al. 2023)."""

    vocab_size: int = 8192
    #: The longest sequence, and the length of a training row.
    context: int = 256
    width: int = 256
    layers: int = 5
    heads: int = 8
    #: Heads of keys and values: a divisor of `heads`; fewer share a key and value head among query heads.
    kv_heads: int = 8
    hidden: int = 448
    dropout: float = 0.0
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    #: Whether the head is the embedding.
    tied: bool = True
    #: Standard deviation of the initial weights; those that write to the residual stream have it over sqrt(2 layers).
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for key in ("vocab_size", "context", "width", "layers", "heads", "kv_heads", "hidden"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "1 or more")
        require(
            self.width % (2 * self.heads) == 0, "model.width", self.width, f"a multiple of 2 heads = {2 * self.heads}"
        )
        require(self.heads % self.kv_heads == 0, "model.kv_heads", self.kv_heads, f"a divisor of heads = {self.heads}")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a probability in [0, 1)")
        for key in ("rope_base", "norm_eps", "init_std"):
            require(getattr(self, key) > 0, f"model.{key}", getattr(self, key), "a number above 0")


PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "5m": {"model": {"width": 256, "layers": 5, "hidden": 448}, "train": {"lr": 2e-3}},
    "10m": {"model": {"width": 384, "layers": 6, "hidden": 464}, "train": {"lr": 1.5e-3}},
    # For trying things out and for tests: seconds on one core.
    "tiny": {
        "model": {"vocab_size": 512, "context": 64, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 128},
        "train": {"batch_size": 8, "steps": 200, "lr": 3e-3, "warmup": 20, "eval_every": 50, "save_every": 50},
    },
}
