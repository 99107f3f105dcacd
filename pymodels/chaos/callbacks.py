"""What changes a chaos transformer between steps: the schedule of its intensity, the oscillations, evolution."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from quaver.kernels import seed_for

from ..errors import InputError
from .config import ChaosConfig
from .model import ChaosTransformer, OscillatingAttention


@dataclass(frozen=True)
class ChaosSchedule:
    """Intensity by step: 0 before `start`, linear to `peak` at `end`, then `final`."""

    start: int = 2000
    end: int = 5000
    peak: float = 0.3
    final: float = 0.3

    def __call__(self, step: int) -> float:
        """At the update number `step`, from 0."""
        if step < self.start:
            return 0.0
        if step < self.end:
            return self.peak * (step - self.start) / (self.end - self.start)
        return self.final

    def ramps(self, step: int) -> bool:
        """Whether the intensity is on its way to the peak."""
        return self.start <= step < self.end


def schedule_of(config: ChaosConfig) -> ChaosSchedule:
    """The schedule that a configuration names."""
    return ChaosSchedule(config.start, config.end, config.peak, config.final)


class Chaos(pl.Callback):
    """Sets the intensity before each step and moves the oscillations on after it."""

    def __init__(self, schedule: ChaosSchedule) -> None:
        self.schedule = schedule

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, number: int) -> None:
        """The step's intensity."""
        level = self.schedule(module.step)
        if level != module.model.intensity:
            module.model.intensity = level

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, number: int) -> None:
        """After the last micro-batch of a step."""
        if (number + 1) % module.config.train.accumulate == 0:
            module.model.advance()


class Evolution(pl.Callback):
    """Makes the weakest head of each layer anew where a window of steps has hardly improved on the one before.

    A head's score is the mean of |o_h W_O,h| over the window: what it adds to the residual stream. The head with the
    lowest score gets fresh rows in q, k and v and zero columns in o, so that the layer's output is what it was without
    it, and zeros in the optimizer's state. Skipped while the intensity ramps, when losses rise for another reason.

    Args:
        config: window, threshold, cooldown and the most refactors.
        run_seed: of the run, from which the fresh rows are drawn.
    """

    def __init__(self, config: ChaosConfig, run_seed: int) -> None:
        self.config, self.run_seed, self.schedule = config, run_seed, schedule_of(config)
        #: How many refactors there have been; mean losses of the windows.
        self.evolution_step = 0
        self.performance_history: list[float] = []
        self._resting = 0
        self._loss = 0.0
        self._steps = 0
        self._scores: list[Tensor] = []
        self._hooks: list[Any] = []

    # ---- state --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "evolution_step": self.evolution_step,
            "performance_history": list(self.performance_history),
            "resting": self._resting,
            "loss": self._loss,
            "steps": self._steps,
            "scores": [score.clone() for score in self._scores],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.evolution_step, self.performance_history = state["evolution_step"], list(state["performance_history"])
        self._resting, self._loss, self._steps = state["resting"], state["loss"], state["steps"]
        self._scores = list(state["scores"])

    # ---- the hooks of Lightning ---------------------------------------------------------------------------------
    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Watch what each head gives to o."""
        attentions = self._attentions(module.model)
        if any(isinstance(attention.o.weight, DTensor) for attention in attentions):
            raise InputError("model.evolution: heads cannot be made anew in sharded weights: strategy single or ddp")
        if not self._scores:
            self._scores = [torch.zeros(a.heads, dtype=torch.float64) for a in attentions]
        for layer, attention in enumerate(attentions):
            self._hooks.append(attention.o.register_forward_pre_hook(self._watch(layer, attention)))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, number: int) -> None:
        """Count the step; at the end of a window, decide."""
        if (number + 1) % module.config.train.accumulate:
            return
        self._loss += module.mean_losses()["loss"]
        self._steps += 1
        if self._steps < self.config.evolution_window:
            return
        self.performance_history.append(self._loss / self._steps)
        self._loss, self._steps = 0.0, 0
        if self._should_refactor(module.step):
            self.refactor(module.model, trainer.optimizers[0], self._total_scores(trainer))
            self._resting = self.config.evolution_cooldown
        elif self._resting:
            self._resting -= 1
        for score in self._scores:
            score.zero_()

    # ---- parts ----------------------------------------------------------------------------------------------------
    @staticmethod
    def _attentions(model: ChaosTransformer) -> list[OscillatingAttention]:
        return [module for module in model.modules() if isinstance(module, OscillatingAttention)]

    def _watch(self, layer: int, attention: OscillatingAttention) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not module.training:
                return
            with torch.no_grad():
                parts = inputs[0].detach().float().unflatten(-1, (attention.heads, -1)).flatten(0, 1)
                weight = attention.o.weight.detach().unflatten(-1, (attention.heads, -1))
                given = torch.einsum("nhd,ohd->nho", parts, weight)
                self._scores[layer] += given.abs().mean((0, 2)).double().cpu()

        return hook

    def _total_scores(self, trainer: pl.Trainer) -> list[Tensor]:
        """The scores of all processes together: all must choose the same head."""
        if trainer.world_size == 1:
            return self._scores
        return [trainer.strategy.reduce(score.clone(), reduce_op="sum") for score in self._scores]

    def _should_refactor(self, step: int) -> bool:
        history = self.performance_history
        if len(history) < 2 or self._resting or self.evolution_step >= self.config.evolution_most:
            return False
        if self.schedule.ramps(step) or self.schedule.ramps(step - 2 * self.config.evolution_window):
            return False
        return (history[-2] - history[-1]) / abs(history[-2]) < self.config.evolution_threshold

    @torch.no_grad()
    def refactor(self, model: ChaosTransformer, optimizer: torch.optim.Optimizer, scores: list[Tensor]) -> list[int]:
        """Make the lowest head of each layer anew. Returns which."""
        self.evolution_step += 1
        chosen = []
        for layer, (attention, score) in enumerate(zip(self._attentions(model), scores, strict=True)):
            head = int(score.argmin())
            size = attention.o.weight.shape[1] // attention.heads
            rows = slice(head * size, (head + 1) * size)
            generator = torch.Generator().manual_seed(
                seed_for(self.run_seed, f"evolution.{self.evolution_step}.{layer}") % 2**63
            )
            for linear in (attention.q, attention.k, attention.v):
                shape = linear.weight[rows].shape
                linear.weight[rows] = torch.randn(shape, generator=generator).to(linear.weight) * model.config.init_std
                self._forget(optimizer, linear.weight, (rows,))
            attention.o.weight[:, rows] = 0
            self._forget(optimizer, attention.o.weight, (slice(None), rows))
            chosen.append(head)
        return chosen

    @staticmethod
    def _forget(optimizer: torch.optim.Optimizer, parameter: Tensor, part: tuple[slice, ...]) -> None:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[part] = 0
