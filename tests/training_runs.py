"""Small runs of the baseline for the tests of training: a second or two each."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console

from quaver.pymodels.config import RunConfig, nested, override
from quaver.pymodels.systems import find
from quaver.pymodels.training import checkpoint, loop

ROOT = Path(__file__).parents[1]
SETTINGS = (
    *("model.vocab_size=256", "model.context=16", "model.width=16", "model.layers=2", "model.heads=2"),
    *("model.kv_heads=1", "model.hidden=24", "model.dropout=0.1", "data.tokenizer=bytes", "data.validation_share=0.1"),
    *("train.steps=12", "train.batch_size=4", "train.warmup=3", "train.eval_every=5", "train.save_every=4"),
    *("train.log_every=1", "train.threads=1", "train.lr=0.01"),
)  # fmt: skip


def text(folder: Path) -> Path:
    """A file of sentences, the same each time."""
    file = folder / "text.txt"
    if not file.exists():
        words = ["the", "a", "cat", "dog", "tree", "runs", "sees", "under", "over", "green", "old", "and", "then"]
        choose = random.Random(0)
        file.write_text("".join(" ".join(choose.choices(words, k=8)) + ".\n" for _ in range(300)))
    return file


def settings(folder: Path, *more: str) -> RunConfig:
    config = find("baseline").run_config("tiny")
    return override(config, nested([*SETTINGS, f"data.source={text(folder)}", f"data.cache={folder / 'cache'}", *more]))


def train(folder: Path, name: str, *more: str, resume: bool = False) -> Path:
    """A run of the settings in folder/name."""
    out = folder / name
    with (folder / "console.txt").open("a") as file:
        loop.train(settings(folder, *more), out, resume=resume, console=Console(file=file))
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_weights(run / "last.safetensors")[0]


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


class StopAt(pl.Callback):
    """CTRL-C while a step is computed."""

    def __init__(self, step: int) -> None:
        self.at = step
        self.sent = False

    def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: torch.Tensor) -> None:
        if module.step == self.at and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGINT)


def quaver(*arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "quaver.cli", *arguments]


def environment() -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return env | {"PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
