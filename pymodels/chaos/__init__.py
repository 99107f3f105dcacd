"""Run-time weight perturbation: a transformer that computes with noise in its weights."""

from typing import Any

import torch
from torch import Tensor

from ..config import RunConfig
from ..data import Batch
from ..systems import System, next_token_loss
from .config import PRESETS, ChaosConfig, preset
from .creativity import Creativity, evaluate_creativity, known_grams
from .model import ChaosTransformer
from .perturbed_call import perturbed_call

__all__ = [
    "SYSTEM",
    "ChaosConfig",
    "ChaosTransformer",
    "Creativity",
    "evaluate_creativity",
    "known_grams",
    "perturbed_call",
    "preset",
]


def _loss(model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
    losses = next_token_loss(model, batch, step)
    return {**losses, "intensity": torch.full_like(losses["loss"], model.intensity)}


def _callbacks(config: RunConfig) -> list[Any]:
    from .callbacks import Chaos, Evolution, schedule_of

    callbacks: list[Any] = [Chaos(schedule_of(config.model))]
    if config.model.evolution:
        callbacks.append(Evolution(config.model, config.train.seed))
    return callbacks


SYSTEM = System(
    name="chaos",
    summary="a post-norm transformer with noise in its weights, and attention whose temperature oscillates",
    config=ChaosConfig,
    presets=PRESETS,
    build=ChaosTransformer,
    loss=_loss,
    callbacks=_callbacks,
    beside_loss="train/intensity",
    evaluating=lambda model: model.at(model.config.intensity),  # type: ignore[operator, union-attr]
)
