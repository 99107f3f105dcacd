"""The configuration of a run: frozen dataclasses, filled from presets, YAML files and key=value arguments."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .errors import InputError
from .files import write_atomically

Config = TypeVar("Config")

SECTIONS = ("model", "data", "train")


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise InputError, naming the key, unless a value is what it must be."""
    if not condition:
        raise InputError(f"{key}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class DataConfig:
    """Where the text is from and how it becomes tokens.

    `source` is a file (.txt, .tokens, .jsonl, .parquet, each also as .xz or .gz), a folder with a file for each split,
    `wikitext-2`, `wikitext-103`, or `hf:NAME` for a dataset of the Hugging Face hub.
    """

    source: str = "wikitext-2"
    #: The column or key of the text in records.
    text_field: str = "text"
    tokenizer: Literal["bytes", "characters", "bpe", "gpt2"] = "bpe"
    #: For gpt2: the folder of encoder.json and vocab.bpe. For bpe: a tokenizer.json to use instead of training one.
    tokenizer_path: str = ""
    #: Shares of validation and test where the source has no splits of its own.
    validation_share: float = 0.05
    test_share: float = 0.05
    #: Where token files are kept; the run's folder when empty. Runs on the same data and tokenizer can share one.
    cache: str = ""

    def __post_init__(self) -> None:
        for key in ("validation_share", "test_share"):
            value = getattr(self, key)
            require(0 <= value < 0.5, f"data.{key}", value, "a share in [0, 0.5)")
        require(bool(self.source), "data.source", self.source, "a file, a folder or a name")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Batches count sequences; a step is one update of the weights."""

    steps: int = 1000
    #: Sequences a step, over all processes and micro-batches.
    batch_size: int = 32
    #: Micro-batches a step.
    accumulate: int = 1
    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: float = 1e-3
    #: The rate falls on a cosine from lr to this share of it; 1 keeps it.
    final_lr_share: float = 0.1
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    #: Of matrices; vectors have none.
    weight_decay: float = 0.1
    #: Largest norm of the gradient; 0 for no limit.
    clip: float = 1.0
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    activation_checkpointing: bool = False
    compile: bool = False
    strategy: Literal["single", "ddp", "fsdp2"] = "single"
    #: Processes on this machine, for ddp and fsdp2.
    processes: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: CPU threads of a process; 0 for torch's default. Results are equal to the bit for equal numbers of threads.
    threads: int = 0
    seed: int = 0
    log_every: int = 10
    #: Steps between evaluations on the validation split; 0 for only the last step.
    eval_every: int = 250
    #: Batches of an evaluation during training; 0 for the whole split.
    eval_batches: int = 0
    #: Steps between saves; evaluations that are the best so far, the last step and an interruption save as well.
    save_every: int = 250
    wandb: bool = False

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate", "processes", "log_every", "save_every"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        for key in ("warmup", "eval_every", "eval_batches", "threads", "clip", "weight_decay"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "0 or more")
        require(0 < self.lr < float("inf"), "train.lr", self.lr, "a finite number above 0")
        require(0 <= self.final_lr_share <= 1, "train.final_lr_share", self.final_lr_share, "a share in [0, 1]")
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", self.betas, "two numbers in [0, 1)")
        parts = self.accumulate * self.processes
        expected = f"a multiple of accumulate x processes = {parts}"
        require(self.batch_size % parts == 0, "train.batch_size", self.batch_size, expected)
        if self.strategy == "single":
            require(self.processes == 1, "train.processes", self.processes, "1 with strategy=single (or ddp, fsdp2)")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run. `model` is the system's own dataclass."""

    system: str
    preset: str
    model: Any
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the YAML file of a run has them."""
        plain = dataclasses.asdict(self)
        plain["train"]["betas"] = list(self.train.betas)
        return plain

    def save(self, path: Path) -> None:
        """Write the resolved configuration as YAML, whole or not at all."""
        write_atomically(path, yaml.safe_dump(self.to_dict(), sort_keys=False).encode())


def nearest(word: str, valid: Iterable[str]) -> str:
    """ ", did you mean 'x'?" for the valid word most like a wrong one, or the list of them where none is."""
    words = sorted(valid)
    close = difflib.get_close_matches(word, words, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(words)}"


def _convert(value: Any, annotation: Any, key: str) -> Any:
    """A value from YAML or the command line as the type that a field has."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        text = str(value)
        if text not in arguments:
            raise InputError(f"{key}: {value!r} is not valid: {nearest(text, arguments)}")
        return text
    if origin in (types.UnionType, typing.Union):
        if value is None or value in ("null", "none", "None"):
            return None
        return _convert(value, next(kind for kind in arguments if kind is not type(None)), key)
    if origin is tuple:
        if isinstance(value, str):
            value = [part for part in value.strip("[]() ").split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{key}: expected a list, got {value!r}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(value) != len(kinds):
            raise InputError(f"{key}: expected {len(kinds)} values, got {value!r}")
        return tuple(_convert(part, kind, key) for part, kind in zip(value, kinds, strict=True))
    if annotation is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if isinstance(value, bool):
            return value
        if str(value).lower() not in words:
            raise InputError(f"{key}: expected true or false, got {value!r}")
        return words[str(value).lower()]
    if annotation is str:
        return "" if value is None else str(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InputError(f"{key}: expected {annotation.__name__}, got {value!r}")
    if annotation is int and isinstance(value, float) and value != int(value):
        raise InputError(f"{key}: expected int, got {value!r}")
    try:
        return annotation(value)
    except ValueError:
        raise InputError(f"{key}: expected {annotation.__name__}, got {value!r}") from None


def fill(config: Config, values: Mapping[str, Any], prefix: str = "") -> Config:
    """A copy of a config dataclass with some fields replaced.

    Raises:
        InputError: for a key that the dataclass lacks, naming the nearest one, and for a value of the wrong type.
    """
    kind: Any = type(config)
    hints = typing.get_type_hints(kind)
    names = [entry.name for entry in dataclasses.fields(kind)]
    changes = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in names:
            raise InputError(f"{key}: there is no such key: {nearest(name, names)}")
        changes[name] = _convert(value, hints[name], key)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def nested(arguments: Iterable[str]) -> dict[str, dict[str, str]]:
    """{"train": {"lr": "1e-3"}} of "train.lr=1e-3".

    Raises:
        InputError: for anything else than section.key=value.
    """
    result: dict[str, dict[str, str]] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise InputError(f"{argument!r}: expected section.key=value, such as train.lr=3e-4")
        if section not in SECTIONS:
            raise InputError(f"{key}: there is no section {section!r}: {nearest(section, SECTIONS)}")
        result.setdefault(section, {})[name] = value
    return result


def override(config: RunConfig, sections: Mapping[str, Any]) -> RunConfig:
    """A copy of a run's configuration with the fields of some sections replaced."""
    changes = {}
    for section, values in sections.items():
        if section not in SECTIONS:
            raise InputError(f"{section}: there is no such section: {nearest(section, SECTIONS)}")
        if not isinstance(values, Mapping):
            raise InputError(f"{section}: expected keys with values, got {values!r}")
        changes[section] = fill(getattr(config, section), values, f"{section}.")
    return dataclasses.replace(config, **changes)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; nothing in it is run.

    Raises:
        InputError: naming the file, for one that cannot be read or is not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping with {', '.join(SECTIONS)}, got {type(content).__name__}")
    return content
