"""The LightningModule that trains every system."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..config import RunConfig, TrainConfig
from ..data import IGNORED, Batch
from ..layers import NoiseKeys
from ..systems import System


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the update number `step`: a linear warm-up, then half a cosine down to final_lr_share of the rate."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    low = config.final_lr_share
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def all_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


class TrainingModule(pl.LightningModule):
    """Steps of a system's model: losses, optimizer, clipping, noise.

    `step` counts updates over all sessions of a run; Lightning's own counters begin anew when a run is resumed. System
    callbacks read it, and `run_seed`.
    """

    def __init__(self, system: System, config: RunConfig, model: nn.Module, step: int) -> None:
        super().__init__()
        self.system, self.config, self.model, self.step = system, config, model, step
        self.run_seed = config.train.seed
        self.noise = NoiseKeys(model, config.train.seed)
        #: Sums of the losses of a step over its micro-batches, in this process; and the gradient's norm.
        self.losses: dict[str, Tensor] = {}
        self.gradient_norm: Tensor | None = None

    def configure_model(self) -> None:
        """Shard the model for fsdp2; each block is a unit."""
        if self.config.train.strategy == "fsdp2" and not isinstance(next(self.model.parameters()), DTensor):
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            for block in self.model.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Batch, number: int) -> Tensor:
        """The loss of a micro-batch, weighted so that the mean over all of them is the mean over the global batch."""
        self.noise.set(self.step, batch.row)
        losses = self.system.loss(self.model, batch, self.step)
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, 0) + loss.detach().float() * batch.weight
        return losses["loss"] * batch.weight

    def mean_losses(self) -> dict[str, float]:
        """The losses of the step over all processes and micro-batches; every process must ask."""
        names = sorted(self.losses)
        values = all_sum(torch.stack([self.losses[name] for name in names]))
        parts = self.config.train.accumulate * self.trainer.world_size
        return {name: value / parts for name, value in zip(names, values.tolist(), strict=True)}

    def configure_optimizers(self) -> Optimizer:
        """AdamW, or Adam; vectors (norms, biases) do not decay."""
        config = self.config.train
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        kinds: dict[str, type[torch.optim.Adam]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
        return kinds[config.optimizer]([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Scale the gradient down to norm `clip`: over all parameters, sharded or not."""
        limit = self.config.train.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def set_learning_rate(self, optimizer: Optimizer) -> float:
        """Give the optimizer the rate of this step."""
        rate = learning_rate(self.config.train, self.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate


def scored(model: nn.Module, batch: Batch) -> Tensor:
    """float64 [3]: the sum of the negative log-likelihoods in nats, right guesses, scored targets of a batch."""
    logits = model(batch.tokens, attention_mask=batch.attention_mask).flatten(0, 1).float()
    targets = batch.targets.flatten()
    nll = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    kept = targets != IGNORED
    right = (logits.argmax(-1) == targets) & kept
    return torch.stack([nll.double().sum(), right.double().sum(), kept.double().sum()])
