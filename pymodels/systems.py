"""Where the engine finds a system: by its name, which is that of its module here."""

import contextlib
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .config import RunConfig, nearest, override
from .data import IGNORED, Batch
from .errors import InputError

#: Every system: a module of this name beside this file has a SYSTEM.
NAMES = ("baseline", "chaos")


def next_token_loss(model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
    """Mean cross-entropy of the scored targets, in nats."""
    logits = model(batch.tokens, attention_mask=batch.attention_mask)
    return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED)}


def no_callbacks(config: RunConfig) -> list[Any]:
    """Of a system that needs none."""
    return []


def as_it_is(model: nn.Module) -> AbstractContextManager[Any]:
    """Of a system whose models are evaluated as they stand."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class System:
    """What a system brings to the engine.

    Its model is an nn.Module `build(model config, seed)` with
    - forward(tokens [B, T], attention_mask=None) -> logits [B, T, V];
    - `config.vocab_size` and `config.context`;
    - `recompute`, a flag: activations are made again in backward (`layers.run_block`);
    - `make_cache(batch)` and forward(.., cache=) where it has a cache for generation;
    - `blocks`, an nn.ModuleList: the units that FSDP2 shards;
    - modules with noise that follow `layers.Noisy`.
    """

    name: str
    summary: str
    #: The dataclass of the section `model`.
    config: type[Any]
    #: Name -> sections -> keys, over the defaults of the dataclasses.
    presets: Mapping[str, Mapping[str, Mapping[str, Any]]]
    build: Callable[[Any, int], nn.Module]
    #: (model, batch, step) -> losses; "loss" is minimized, the others are logged. Means over scored targets.
    loss: Callable[[nn.Module, Batch, int], dict[str, Tensor]] = next_token_loss
    #: Lightning callbacks of a run: schedules, what changes the model between steps. Their state_dict is saved.
    callbacks: Callable[[RunConfig], list[Any]] = no_callbacks
    #: What a model must be in while it is evaluated, during training too.
    evaluating: Callable[[nn.Module], AbstractContextManager[Any]] = as_it_is
    #: A logged metric that plots draw beside the loss, on an axis of its own, such as a schedule.
    beside_loss: str = ""
    #: Data of the system's own instead of text: (config, folder of the run) -> what data.TextData does.
    data: Callable[[RunConfig, Any], Any] | None = None
    #: Further checks of `quaver verify`: name -> (model, seed) -> what was found; raises where it is wrong.
    checks: Mapping[str, Callable[[nn.Module, int], str]] = field(default_factory=dict)

    def run_config(self, preset: str) -> RunConfig:
        """The configuration of a preset.

        Raises:
            InputError: for a preset that the system lacks, naming the nearest one.
        """
        if preset not in self.presets:
            raise InputError(f"preset {preset!r} of {self.name}: {nearest(preset, self.presets)}")
        return override(RunConfig(self.name, preset, self.config()), self.presets[preset])


def find(name: str) -> System:
    """The system of a name.

    Raises:
        InputError: for one that there is not, naming the nearest.
    """
    if name not in NAMES:
        raise InputError(f"system {name!r}: {nearest(name, NAMES)}")
    system = importlib.import_module(f"{__package__}.{name}").SYSTEM
    if not isinstance(system, System):
        raise TypeError(f"{name}.SYSTEM: expected a System, got {type(system).__name__}")
    return system
