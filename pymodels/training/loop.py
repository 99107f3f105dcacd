"""Training a run from its configuration, from the beginning or from where it stopped."""

import contextlib
import dataclasses
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch._dynamo
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rich.console import Console

from .. import tokenizers
from ..config import RunConfig
from ..data import TrainingBatches, prepare
from ..errors import CheckpointError, InputError
from ..runs import CONFIG, TOKENIZER, load_config
from ..systems import System, find
from . import checkpoint
from .callbacks import Engine
from .logs import CSVMetrics
from .module import TrainingModule

#: What a resumed run may change: how far and where it trains, not what it is. Where its text lies may change, since
#: a digest of the text is in the state.
MAY_CHANGE: dict[str, set[str]] = {
    "model": set(),
    "data": {"source", "cache"},
    "train": {
        *("steps", "device", "threads", "strategy", "processes", "accumulate", "activation_checkpointing", "compile"),
        *("log_every", "eval_every", "eval_batches", "save_every", "wandb"),
    },
}


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a training has come to."""

    step: int
    #: Of the last evaluation of this process: loss, perplexity ..; empty where there was none.
    validation: dict[str, float]
    #: Whether it was interrupted and can be resumed.
    stopped: bool


def is_first_process() -> bool:
    """Whether this is the process that the user started, or torchrun's first."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def device_of(config: RunConfig) -> str:
    """cpu or cuda.

    Raises:
        InputError: for a device that is not there, or a precision that it lacks.
    """
    wanted = config.train.device
    device = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device: expected cpu, got cuda: torch sees no GPU")
    if device == "cpu" and config.train.precision == "16-mixed":
        raise InputError("train.precision: 16-mixed needs a CUDA device; on a CPU expected 32 or bf16-mixed")
    return device


def prepared(system: System, config: RunConfig, folder: Path, tokenizer: Any = None) -> Any:
    """The data of a run."""
    if system.data is not None:
        return system.data(config, folder)
    model = config.model
    return prepare(config.data, model.vocab_size, model.context, config.train.seed, folder, tokenizer)


def check_resumable(old: RunConfig, new: RunConfig) -> None:
    """Raise InputError where a resumed run would be another one."""
    for section, free in MAY_CHANGE.items():
        before, after = (dataclasses.asdict(getattr(config, section)) for config in (old, new))
        for key, value in before.items():
            if value != after[key] and key not in free:
                raise InputError(
                    f"{section}.{key}: the run was begun with {value!r}, it cannot go on with {after[key]!r}"
                )


@contextlib.contextmanager
def _signals() -> Iterator[Any]:
    """A function that says whether CTRL-C or SIGTERM has come; a second one ends the program at once."""
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        if is_first_process():
            # Not by print: a signal can come in the middle of one, and a buffered file refuses the second.
            with contextlib.suppress(OSError):
                os.write(1, b"\nstopping after this step and its checkpoint; once more stops at once\n")

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _strategy(config: RunConfig) -> Any:
    backend = "nccl" if device_of(config) == "cuda" else "gloo"
    if config.train.strategy == "ddp":
        return DDPStrategy(process_group_backend=backend)
    if config.train.strategy == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=config.train.processes, tensor_parallel_size=1, process_group_backend=backend
        )
    return "auto"


def _loggers(config: RunConfig, folder: Path, step: int) -> list[Any]:
    if not is_first_process():
        return []
    loggers: list[Any] = [
        CSVMetrics(folder / "metrics.csv", step),
        # Entries of steps that are done again are hidden.
        TensorBoardLogger(folder, name="tensorboard", version="", purge_step=step + 1),
    ]
    if config.train.wandb:
        try:
            loggers.append(WandbLogger(save_dir=folder, project="quaver", name=folder.name, config=config.to_dict()))
        except ModuleNotFoundError:
            raise InputError("train.wandb: wandb is not installed: pip install wandb") from None
    return loggers


def _quiet() -> None:
    """Lightning's remarks on its own defaults, which are chosen here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")


def train(config: RunConfig, folder: Path, *, resume: bool = False, console: Console | None = None) -> Finished:
    """Train a run.

    Args:
        config: of the run.
        folder: where everything of it is kept: config.yaml, tokenizer.json, data/, last.pt, last.safetensors,
            best.safetensors, metrics.csv, tensorboard/.
        resume: go on from the last checkpoint, or from the beginning where there is none.
        console: for what is shown; stdout when None.

    Raises:
        InputError, CheckpointError: for wrong settings, data or files.
    """
    _quiet()
    console = console or Console(markup=False, highlight=False)
    system = find(config.system)
    device = device_of(config)
    first = is_first_process()
    if first:
        if (folder / CONFIG).exists() and not resume:
            raise InputError(f"{folder}: there is a run in this folder: --resume goes on with it, --out names another")
        folder.mkdir(parents=True, exist_ok=True)
        if resume and (folder / CONFIG).exists():
            check_resumable(load_config(folder), config)
        checkpoint.clean(folder)
    tokenizer = tokenizers.load(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    data = prepared(system, config, folder, tokenizer)
    data.training(0, 0, 1, config.train.batch_size)
    if first:
        if tokenizer is None and hasattr(data, "tokenizer"):
            tokenizers.save(data.tokenizer, folder / TOKENIZER)
        config.save(folder / CONFIG)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    model = system.build(config.model, config.train.seed)
    state = None
    if (folder / checkpoint.STATE).exists():
        weights, state = checkpoint.read(folder)
        checkpoint.load_weights(model, weights, folder / state["weights"])
        if state["data"] != data.digest():
            raise CheckpointError(f"{folder}: the run was begun on other text than {config.data.source} now holds")
    step = state["step"] if state else 0
    if step >= config.train.steps:
        return Finished(step, {}, stopped=False)
    model.recompute = config.train.activation_checkpointing  # type: ignore[assignment]
    if config.train.compile:
        # The row of a micro-batch is an int that changes: without this each would compile anew.
        torch._dynamo.config.allow_unspec_int_on_nn_module = True
        model.compile(dynamic=False)
    module = TrainingModule(system, config, model, step)
    batches = TrainingBatches(data, config.train.batch_size, config.train.accumulate, step, config.train.steps)
    with _signals() as interrupted:
        engine = Engine(folder, data, state, console, interrupted)
        trainer = pl.Trainer(
            accelerator=device,
            devices=config.train.processes,
            strategy=_strategy(config),
            precision=config.train.precision,
            accumulate_grad_batches=config.train.accumulate,
            max_epochs=1,
            limit_val_batches=0,
            callbacks=[*system.callbacks(config), engine],
            logger=_loggers(config, folder, step),
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        batches.attach(trainer)
        trainer.fit(module, loader)
    for logger in trainer.loggers:
        logger.finalize("success")
    return Finished(module.step, engine.validation, engine.stopped)
