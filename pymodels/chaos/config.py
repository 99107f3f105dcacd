"""The configuration of chaos and its presets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import require


@dataclass(frozen=True)
class ChaosConfig:
    """A post-norm transformer whose weights are perturbed at every call."""

    vocab_size: int = 256
    #: The longest sequence, and the length of a training row.
    context: int = 256
    width: int = 128
    layers: int = 2
    heads: int = 4
    #: Of the feed-forward.
    hidden: int = 256
    #: Whether the head is the embedding.
    tied: bool = False
    init_std: float = 0.02
    #: Share of the temperature that oscillates: scores are multiplied by 1 + amplitude sin(phase + frequency).
    amplitude: float = 0.1
    #: Noise over the standard deviation of each weight, in evaluation and generation. Training has the schedule's.
    intensity: float = 0.0
    #: The schedule: 0 before step `start`, then a ramp to `peak` at step `end`, then `final`.
    start: int = 2000
    end: int = 5000
    peak: float = 0.3
    final: float = 0.3
    #: Whether the weakest heads are made anew where training stagnates.
    evolution: bool = False
    #: Steps of a window, and the relative improvement of its mean loss on the window before below which it stagnates.
    evolution_window: int = 500
    evolution_threshold: float = 0.1
    #: Windows without a refactor after one, and the most refactors of a run.
    evolution_cooldown: int = 4
    evolution_most: int = 8

    def __post_init__(self) -> None:
        for key in ("vocab_size", "context", "width", "layers", "heads", "hidden", "evolution_window"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "1 or more")
        require(self.width % self.heads == 0, "model.width", self.width, f"a multiple of heads = {self.heads}")
        require(self.init_std > 0, "model.init_std", self.init_std, "a number above 0")
        require(0 <= self.amplitude < 1, "model.amplitude", self.amplitude, "a share in [0, 1)")
        for key in ("intensity", "start", "peak", "final", "evolution_cooldown", "evolution_most"):
            require(0 <= getattr(self, key) < float("inf"), f"model.{key}", getattr(self, key), "0 or more")
        require(self.end >= self.start, "model.end", self.end, f"a step from start = {self.start} on")


#: Adam at 1e-3, without warm-up, decay or clipping, as the source has it.
_ADAM = {
    "optimizer": "adam",
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "warmup": 0,
    "final_lr_share": 1.0,
    "clip": 0.0,
    "batch_size": 16,
    "steps": 8000,
}
#: The source's schedule in 3,000 steps instead of 8,000.
_SHORT = {"start": 750, "end": 1875}

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "genesis": {
        "model": {"vocab_size": 128, "context": 128, "width": 96, "hidden": 192},
        "data": {"tokenizer": "characters"},
        "train": _ADAM,
    },
    "genesis-short": {
        "model": {"vocab_size": 128, "context": 128, "width": 96, "hidden": 192, **_SHORT},
        "data": {"tokenizer": "characters"},
        "train": {**_ADAM, "steps": 3000},
    },
    "genesis-256": {"data": {"tokenizer": "bytes"}, "train": _ADAM},
    "8k": {
        "model": {"context": 128, "width": 12, "hidden": 44, "tied": True},
        "data": {"tokenizer": "bytes"},
        "train": {**_ADAM, "lr": 3e-3},
    },
    "tiny": {
        "model": {"context": 32, "width": 16, "hidden": 32, "start": 20, "end": 60},
        "data": {"tokenizer": "bytes"},
        "train": {**_ADAM, "batch_size": 8, "steps": 200, "eval_every": 50, "save_every": 50},
    },
}


def preset(name: str) -> ChaosConfig:
    """The model's configuration of a preset.

    Raises:
        InputError: for a name that there is not, naming the nearest one.
    """
    from . import SYSTEM

    config: ChaosConfig = SYSTEM.run_config(name).model
    return config
