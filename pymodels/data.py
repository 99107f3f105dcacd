"""Tokens in memory-mapped files, and batches of them in an order that only the seed decides."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from quaver.kernels import philox_permutation, philox_words, seed_for

from . import tokenizers
from .config import DataConfig
from .errors import InputError
from .files import write_atomically
from .texts import SPLITS, Pieces, splits_of
from .tokenizers import Tokenizer

#: A target that is not scored: cross_entropy's ignore_index.
IGNORED = -100
#: Pieces of documents that the tokenizer gets at once: it works on them in parallel.
_TOGETHER = 8


@dataclass(frozen=True)
class Batch:
    """Rows of a step's batch.

    tokens: int64 [B, T]. targets: int64 [B, T], the token after each, IGNORED where it is not scored.
    attention_mask: [B, T], 0 for padding, or None. row: the number of the first row in the step's global batch.
    weight: the mean over the rows here counts this much in the mean over all; 1 where every part has as many targets.
    """

    tokens: Tensor
    targets: Tensor
    attention_mask: Tensor | None = None
    row: int = 0
    weight: float = 1.0

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same on a device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=non_blocking)
        tokens, targets = (part.to(device, non_blocking=non_blocking) for part in (self.tokens, self.targets))
        return replace(self, tokens=tokens, targets=targets, attention_mask=mask)


@dataclass(frozen=True)
class Split:
    """The tokens of a split, memory-mapped, and counts of its text."""

    ids: npt.NDArray[Any]
    #: Whitespace-separated words, and lines: word perplexity counts an <eos> a line.
    words: int
    lines: int
    characters: int
    digest: str


@dataclass(frozen=True)
class TextData:
    """Tokenized splits. What a system with data of its own gives instead has the same two methods."""

    tokenizer: Tokenizer
    splits: Mapping[str, Split]
    context: int
    seed: int

    def training(self, step: int, begin: int, end: int, batch_size: int) -> Batch:
        """Rows begin .. end of the global batch of a step: windows of the training split, each once an epoch."""
        ids = self.splits["train"].ids
        count = (len(ids) - 1) // self.context
        if count < 1:
            raise InputError(
                f"model.context: {self.context} tokens and their successors need {self.context + 1} tokens of training "
                f"text, got {len(ids)}"
            )
        key = seed_for(self.seed, "data.order")
        windows = []
        for position in range(step * batch_size + begin, step * batch_size + end):
            epoch, place = divmod(position, count)
            at = shuffled(place, count, key + epoch) * self.context
            windows.append(ids[at : at + self.context + 1])
        rows = torch.from_numpy(np.stack(windows).astype(np.int64))
        return Batch(rows[:, :-1], rows[:, 1:], row=begin)

    def evaluation(self, split: str, batch_size: int) -> "Evaluation":
        """Batches that score every token of a split exactly once."""
        if split not in self.splits:
            raise InputError(f"split {split!r}: the data has {', '.join(self.splits)}")
        return Evaluation(self.splits[split].ids, self.context, batch_size, self.tokenizer.start)

    def digest(self) -> str:
        """What tells this training text and tokenizer from others."""
        return self.splits["train"].digest


#: From so many windows on their order is computed place by place: a table would be as large as the text.
_TABLE = 2**20
_ROUNDS = 8


@lru_cache(maxsize=2)
def _order(count: int, seed: int) -> npt.NDArray[Any]:
    return philox_permutation(count, seed, device="cpu").to(torch.int32).numpy()


@lru_cache(maxsize=2)
def _round_keys(seed: int) -> list[int]:
    words: list[int] = philox_words(2 * _ROUNDS, seed, device="cpu").tolist()
    return [low | high << 32 for low, high in zip(words[::2], words[1::2], strict=True)]


def _mixed(value: int, key: int) -> int:
    """64 bits that depend on all bits of a value and a key: MurmurHash3's finalizer (Appleby)."""
    value = (value ^ key) & (2**64 - 1)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ value >> 33) * factor & (2**64 - 1)
    return value ^ value >> 33


def shuffled(place: int, count: int, seed: int) -> int:
    """Element `place` of a permutation of 0 .. count - 1 that the seed chooses, for any count in constant memory.

    Up to 2^20 elements it is philox_permutation's. Beyond that, a Feistel network whose keys are the stream's permutes
    the next even power of two, and is applied again until it falls among the first `count` (Black and Rogaway 2002).
    """
    if count <= _TABLE:
        return int(_order(count, seed)[place])
    bits = ((count - 1).bit_length() + 1) // 2
    mask = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & mask
        for key in _round_keys(seed):
            left, right = right, left ^ (_mixed(right, key) & mask)
        place = left << bits | right
        if place < count:
            return place


@dataclass(frozen=True)
class Evaluation:
    """Windows side by side; the first begins with the tokenizer's start token, the last is padded with IGNORED."""

    ids: npt.NDArray[Any]
    context: int
    batch_size: int
    start: int

    def __len__(self) -> int:
        return -(-len(self.ids) // (self.context * self.batch_size))

    def __getitem__(self, number: int) -> Batch:
        size = self.batch_size * self.context
        begin = number * size
        # The token before each: a start token, then the text.
        before = self.ids[begin - 1 : begin] if begin else np.array([self.start])
        row = np.concatenate([before, self.ids[begin : begin + size]]).astype(np.int64)
        rows = -(-(len(row) - 1) // self.context)
        tokens = np.zeros(rows * self.context, dtype=np.int64)
        targets = np.full(rows * self.context, IGNORED, dtype=np.int64)
        tokens[: len(row) - 1], targets[: len(row) - 1] = row[:-1], row[1:]
        shape = (rows, self.context)
        return Batch(torch.from_numpy(tokens.reshape(shape)), torch.from_numpy(targets.reshape(shape)))

    def nothing(self) -> Batch:
        """A batch without targets, for a process that has no other left while the rest go on."""
        first = self[0]
        return replace(first, targets=torch.full_like(first.targets, IGNORED))


class TrainingBatches(torch.utils.data.IterableDataset[Batch]):
    """The micro-batches of one process, from a step on.

    Process r of W and micro-batch i of A get the rows (i W + r) m .. + m of each batch of W A m rows.
    """

    def __init__(self, data: Any, batch_size: int, accumulate: int, first: int, last: int) -> None:
        self.data, self.batch_size, self.accumulate = data, batch_size, accumulate
        self.first, self.last = first, last
        self.rank, self.world = 0, 1
        self._trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Take rank and world from a Lightning trainer, which knows them once its processes run."""
        self._trainer = trainer

    def __len__(self) -> int:
        return (self.last - self.first) * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        if self._trainer is not None:
            self.rank, self.world = self._trainer.global_rank, self._trainer.world_size
        rows = self.batch_size // (self.accumulate * self.world)
        for step in range(self.first, self.last):
            for micro in range(self.accumulate):
                begin = (micro * self.world + self.rank) * rows
                yield self.data.training(step, begin, begin + rows, self.batch_size)


def _identity(source: str) -> list[Any]:
    """What tells a source from another, or from what it was before."""
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [source if not files else str(path.absolute()), [[name, s.st_size, s.st_mtime_ns] for name, s in stats]]


def _make_tokenizer(config: DataConfig, vocab_size: int, pieces: Mapping[str, Pieces]) -> Tokenizer:
    if config.tokenizer == "bytes":
        return tokenizers.Bytes()
    if config.tokenizer == "gpt2":
        if not config.tokenizer_path:
            raise InputError(
                "data.tokenizer_path: expected the folder of encoder.json and vocab.bpe for tokenizer=gpt2"
            )
        return tokenizers.read_gpt2(Path(config.tokenizer_path))
    if config.tokenizer == "characters":
        return tokenizers.train_characters(piece.text for split in pieces.values() for piece in split())
    if config.tokenizer_path:
        return tokenizers.load(Path(config.tokenizer_path))
    return tokenizers.train_bpe((piece.text for piece in pieces["train"]()), vocab_size)


def _dtype(vocab_size: int) -> Any:
    return np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32


def _write_tokens(pieces: Pieces, tokenizer: Tokenizer, path: Path, split: str) -> None:
    """Write <path>.tokens, then <path>.json, which says that the first is whole."""
    dtype = _dtype(tokenizer.vocab_size)
    counts = {"tokens": 0, "words": 0, "lines": 0, "characters": 0}
    digest = hashlib.sha256(json.dumps(tokenizer.to_dict()).encode())

    def write(file: BinaryIO) -> None:
        ended = open_line = False  # whether the document before has ended, and a line that has not
        for batch in tokenizers.batches(pieces(), _TOGETHER):
            for (text, last), ids in zip(batch, tokenizer.encode_many([text for text, _ in batch]), strict=True):
                if ended and tokenizer.end is not None:
                    ids = np.concatenate([np.array([tokenizer.end], dtype=np.uint32), ids])
                content = ids.astype(dtype).tobytes()
                digest.update(content)
                file.write(content)
                open_line = not text.endswith("\n") if text else open_line
                counts["tokens"] += len(ids)
                counts["words"] += len(text.split())
                counts["lines"] += text.count("\n") + (last and open_line)
                counts["characters"] += len(text)
                ended, open_line = last, open_line and not last

    try:
        write_atomically(path.with_suffix(".tokens"), write)
    except InputError as error:
        raise InputError(f"{split} split: {error}") from None
    meta = {**counts, "dtype": np.dtype(dtype).name, "digest": digest.hexdigest()}
    write_atomically(path.with_suffix(".json"), json.dumps(meta).encode())


def _read_tokens(path: Path) -> Split:
    meta = json.loads(path.with_suffix(".json").read_text())
    count = meta["tokens"]
    file = path.with_suffix(".tokens")
    if file.stat().st_size != count * np.dtype(meta["dtype"]).itemsize:
        raise InputError(f"{file}: expected {count} tokens of {meta['dtype']}, the file has another size: delete it")
    ids: npt.NDArray[Any] = np.zeros(0, dtype=np.int64)
    if count:
        ids = np.memmap(file, dtype=meta["dtype"], mode="r", shape=(count,))
    return Split(ids, meta["words"], meta["lines"], meta["characters"], meta["digest"])


def _key(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _made_by(tokenizer: Tokenizer, done: Path) -> bool:
    """Whether token files are there that this tokenizer has made: those of a run that goes on."""
    return done.exists() and json.loads(done.read_text())["tokenizer"] == tokenizer.to_dict()


def prepare(
    config: DataConfig, vocab_size: int, context: int, seed: int, folder: Path, tokenizer: Tokenizer | None = None
) -> TextData:
    """Tokenize a source, or find that it has been, and map its tokens into memory.

    Args:
        config: the source and the kind of tokenizer.
        vocab_size: of the model: a tokenizer that is trained gets at most as many tokens.
        context: tokens of a row.
        seed: of the run; decides the order of rows.
        folder: of the run; token files go to its folder data/, or to config.cache.
        tokenizer: to use instead of the one that config asks for, such as that of a checkpoint.

    Raises:
        InputError: for text that cannot be read, is empty or too short, or does not fit the vocabulary.
    """
    cache = Path(config.cache) if config.cache else folder / "data"
    cache.mkdir(parents=True, exist_ok=True)
    facts = [_identity(config.source), config.text_field, config.validation_share, config.test_share]
    key = _key([*facts, [config.tokenizer, config.tokenizer_path, vocab_size]])
    done = cache / f"{key}.json"
    if tokenizer is not None and not _made_by(tokenizer, done):
        key = _key([*facts, tokenizer.to_dict()])
        done = cache / f"{key}.json"
    # Processes that start together on one machine: one tokenizes, the others find the files.
    with FileLock(cache / f"{key}.lock"):
        if not done.exists():
            pieces = splits_of(config)
            if not pieces:
                raise InputError(f"data.source: {config.source} is empty")
            if tokenizer is None:
                tokenizer = _make_tokenizer(config, vocab_size, pieces)
            for split, read in pieces.items():
                _write_tokens(read, tokenizer, cache / f"{key}-{split}", split)
            content = {"tokenizer": tokenizer.to_dict(), "splits": list(pieces)}
            write_atomically(done, json.dumps(content).encode())
    content = json.loads(done.read_text())
    tokenizer = tokenizers.from_dict(content["tokenizer"])
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"model.vocab_size: the {tokenizer.kind} tokenizer of {config.source} has {tokenizer.vocab_size} tokens, "
            f"the model {vocab_size}"
        )
    splits = {split: _read_tokens(cache / f"{key}-{split}") for split in SPLITS if split in content["splits"]}
    splits = {name: split for name, split in splits.items() if len(split.ids)}
    if not splits:
        raise InputError(f"data.source: {config.source} is empty")
    if "train" not in splits:
        raise InputError(f"data.source: the train split of {config.source} is empty")
    return TextData(tokenizer, splits, context, seed)
