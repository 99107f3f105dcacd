"""What happens around each step: rates, logs, the progress bar, evaluations, checkpoints, interruptions."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ..errors import InputError
from . import checkpoint
from .evaluate import evaluate
from .module import TrainingModule

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _scaler(trainer: pl.Trainer) -> Any:
    """What scales the loss of 16-mixed, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


class Engine(pl.Callback):
    """Counts steps, and logs, evaluates and saves at those that the configuration names.

    Args:
        folder: of the run.
        data: of the system.
        state: of the checkpoint that the run goes on from, or None.
        console: for the progress bar; lines instead where it is no terminal.
        interrupted: asked after each step: whether to save and stop.
    """

    def __init__(
        self, folder: Path, data: Any, state: dict[str, Any] | None, console: Console, interrupted: Callable[[], bool]
    ) -> None:
        self.folder, self.data, self.state, self.console, self.interrupted = folder, data, state, console, interrupted
        self.best = float(state["best"]) if state else math.inf
        self.stopped = False
        self.validation: dict[str, float] = {}
        self._bar: Progress | None = None
        self._tokens = 0
        self._rate = 0.0

    # ---- the hooks of Lightning ---------------------------------------------------------------------------------
    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:  # type: ignore[override]
        """Give the optimizer and the callbacks the state of the checkpoint."""
        if self.state is not None:
            (optimizer,) = trainer.optimizers
            set_optimizer_state_dict(
                module.model, optimizer, self.state["optimizer"], options=StateDictOptions(full_state_dict=True)
            )
            for callback in self._others(trainer):
                saved = self.state["callbacks"].get(type(callback).__qualname__)
                if saved is not None:
                    callback.load_state_dict(saved)
            scaler = _scaler(trainer)
            if scaler is not None and self.state["scaler"] is not None:
                scaler.load_state_dict(self.state["scaler"])
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar = Progress(
                *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
                console=self.console,
            )
            self._bar.add_task("training", total=module.config.train.steps, completed=module.step)
            self._bar.start()
        self._clock = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, module: TrainingModule, batch: Any, number: int) -> None:  # type: ignore[override]
        """Set the learning rate of the step."""
        self._rate = module.set_learning_rate(trainer.optimizers[0])

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: TrainingModule, outputs: Any, batch: Any, number: int
    ) -> None:
        """After the last micro-batch of a step, whatever is due."""
        config = module.config.train
        self._tokens += batch.tokens.numel() * trainer.world_size
        if (number + 1) % config.accumulate:
            return
        module.step += 1
        step = module.step
        finished = step >= config.steps
        stop = bool(trainer.strategy.reduce_boolean_decision(self.interrupted(), all=False)) and not finished
        log = step % config.log_every == 0 or step == 1 or finished or stop
        evaluation = finished or (config.eval_every > 0 and step % config.eval_every == 0)
        save = step % config.save_every == 0 or finished or stop
        if log or evaluation or save:
            losses = module.mean_losses()
            self._check_finite(trainer, module, losses["loss"])
            if log:
                self._log(trainer, module, losses)
        module.losses.clear()
        is_best = evaluation and "validation" in self._splits() and self._evaluate(trainer, module)
        if save or is_best:
            self.save(trainer, module, is_best)
        if stop:
            self.stopped = trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """As at the end."""
        self.on_train_end(trainer, module)

    # ---- parts ---------------------------------------------------------------------------------------------------
    def _splits(self) -> Any:
        return getattr(self.data, "splits", ("train", "validation"))

    def _others(self, trainer: pl.Trainer) -> list[Any]:
        return [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]

    def _check_finite(self, trainer: pl.Trainer, module: TrainingModule, loss: float) -> None:
        """Before anything is saved. The loss tells of the weights before the step, its gradient of those after it."""
        norm = 0.0
        if module.gradient_norm is not None and _scaler(trainer) is None:
            norm = float(module.gradient_norm)  # a scaler leaves out the steps where it is not finite
        for what, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                raise InputError(
                    f"step {module.step}: the {what} is {value}; train.lr = {module.config.train.lr} may be too high. "
                    "The last checkpoint is from before it"
                )

    def _log(self, trainer: pl.Trainer, module: TrainingModule, losses: dict[str, float]) -> None:
        now = time.perf_counter()
        speed = self._tokens / max(now - self._clock, 1e-9)
        self._tokens, self._clock = 0, now
        metrics = {f"train/{name}": value for name, value in losses.items()}
        metrics |= {"train/lr": self._rate, "train/tokens_per_second": speed}
        if module.gradient_norm is not None:
            metrics["train/gradient_norm"] = float(module.gradient_norm)
        self._write(trainer, metrics, module.step)
        self._show(trainer, module, f"loss {losses['loss']:.4f}  {speed:,.0f} tokens/s")

    def _show(self, trainer: pl.Trainer, module: TrainingModule, text: str) -> None:
        if not trainer.is_global_zero:
            return
        if self.validation:
            text += f"  validation {self.validation['loss']:.4f}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=module.step, description=text)
        else:
            self.console.print(f"step {module.step}/{module.config.train.steps}  {text}", soft_wrap=True)

    def _write(self, trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step)

    def _evaluate(self, trainer: pl.Trainer, module: TrainingModule) -> bool:
        config = module.config.train
        self.validation = evaluate(
            module.model,
            self.data,
            "validation",
            max(1, config.batch_size // (config.accumulate * trainer.world_size)),
            batches=config.eval_batches,
            rank=trainer.global_rank,
            world=trainer.world_size,
            device=module.device,
            context=trainer.precision_plugin.forward_context(),
            evaluating=module.system.evaluating,
        )
        metrics = {f"validation/{name}": value for name, value in self.validation.items() if name != "tokens"}
        self._write(trainer, metrics, module.step)
        self._tokens, self._clock = 0, time.perf_counter()
        is_best = self.validation["loss"] < self.best
        self.best = min(self.best, self.validation["loss"])
        return is_best

    def save(self, trainer: pl.Trainer, module: TrainingModule, best: bool) -> None:
        """Gather the state of all processes and write it in the first."""
        weights = get_model_state_dict(module.model, options=_WHOLE)
        (optimizer,) = trainer.optimizers
        scaler = _scaler(trainer)
        states = {type(callback).__qualname__: callback.state_dict() for callback in self._others(trainer)}
        state = {
            "step": module.step,
            "best": self.best,
            "data": self.data.digest(),
            "optimizer": get_optimizer_state_dict(module.model, optimizer, options=_WHOLE),
            "callbacks": {name: state for name, state in states.items() if state},
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        if trainer.is_global_zero:
            facts = {"system": module.config.system, "validation_loss": str(self.validation.get("loss", ""))}
            checkpoint.write(self.folder, cast(dict[str, Tensor], weights), state, facts, best=best)
        trainer.strategy.barrier()
