"""A run's folder, for use: its configuration, its tokenizer and a model with its weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import tokenizers
from .config import RunConfig, fill, override, read_yaml
from .errors import CheckpointError, InputError
from .systems import System, find
from .training import checkpoint

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Run:
    """What a run has come to: `model` is in evaluation mode, on the CPU; `tokenizer` is None for data without text."""

    folder: Path
    config: RunConfig
    system: System
    model: nn.Module
    tokenizer: Any
    step: int


def load_config(folder: Path) -> RunConfig:
    """The configuration that a run's folder keeps.

    Raises:
        InputError: where there is none.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: there is no run in this folder: quaver train SYSTEM --out {folder} begins one")
    plain = read_yaml(folder / CONFIG)
    system = find(str(plain.get("system")))
    config = RunConfig(system.name, str(plain.get("preset")), system.config())
    sections = {
        name: fill(getattr(config, name), plain.get(name, {}), f"{name}.") for name in ("model", "data", "train")
    }
    return dataclasses.replace(config, **sections)


def load(
    folder: Path, system: str, which: str = "best", overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> Run:
    """A model as a run has saved it.

    Args:
        folder: of the run.
        system: the name that is expected.
        which: "best" (by validation; the last where there was no validation), "last", or the path of a safetensors
            file of the same model.
        overrides: settings to use instead of the run's, by section: how text is read, what a model does beside its
            weights.

    Raises:
        InputError, CheckpointError: for another system, and for files that are missing or not what they must be.
    """
    config = override(load_config(folder), overrides or {})
    if config.system != system:
        raise InputError(f"{folder}: a run of {config.system}, expected one of {system}")
    paths = [folder / f"{name}.safetensors" for name in ("best", "last")]
    if which == "last":
        paths = paths[1:]
    elif which != "best":
        paths = [Path(which)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise CheckpointError(f"{paths[-1]}: there is no such file; nothing has been saved yet?")
    weights, facts = checkpoint.read_weights(path)
    if facts.get("system") != system:
        raise CheckpointError(f"{path}: weights of {facts.get('system')}, expected those of {system}")
    built = find(system).build(config.model, config.train.seed)
    checkpoint.load_weights(built, weights, path)
    tokenizer = None
    if (folder / TOKENIZER).exists():
        tokenizer = tokenizers.load(folder / TOKENIZER)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise CheckpointError(
                f"{folder / TOKENIZER}: {tokenizer.vocab_size} tokens, the model has {config.model.vocab_size}"
            )
    return Run(folder, config, find(system), built.eval(), tokenizer, int(facts["step"]))
