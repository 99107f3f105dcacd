"""Tokenizers: bytes, characters, BPE trained here, GPT-2's. Each is saved beside the checkpoint as tokenizer.json."""

import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .files import open_binary, write_atomically

END = "<|endoftext|>"
UNKNOWN = "\ufffd"
Item = TypeVar("Item")
Ids = npt.NDArray[np.uint32]


class Tokenizer(Protocol):
    """What every tokenizer does."""

    kind: str
    vocab_size: int
    #: The token after each document, or None.
    end: int | None
    #: The token that stands before a text, where a model needs one to begin with.
    start: int

    def encode(self, text: str, *, strict: bool = False) -> Ids:
        """Ids of a text. Characters that are not in the vocabulary: InputError if strict, else the unknown token."""

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, strictly."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; an unfinished UTF-8 character at an end becomes U+FFFD."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `load` makes the tokenizer of again."""


class Bytes:
    """The 256 bytes of UTF-8."""

    kind = "bytes"
    vocab_size = 256
    end: int | None = None
    start = ord("\n")

    def encode(self, text: str, *, strict: bool = False) -> Ids:
        # Lone surrogates, which some terminals give, become question marks.
        return np.frombuffer(text.encode("utf-8", "strict" if strict else "replace"), dtype=np.uint8).astype(np.uint32)

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text, strict=True) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}


class Characters:
    """Each different character of a text; id 0 stands for any other."""

    kind = "characters"
    end: int | None = None

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab_size = len(characters) + 1
        self.start = characters.find("\n") + 1
        self._ids = {character: number for number, character in enumerate(characters, 1)}

    def encode(self, text: str, *, strict: bool = False) -> Ids:
        if strict and (unknown := set(text) - self._ids.keys()):
            at = min(text.index(character) for character in unknown)
            raise InputError(
                f"the character {text[at]!r} (U+{ord(text[at]):04X}) of the text is not among the "
                f"{len(self.characters)} of the tokenizer: the model was trained on another text"
            )
        return np.array([self._ids.get(character, 0) for character in text], dtype=np.uint32)

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text, strict=True) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[number - 1] if number else UNKNOWN for number in ids)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}


class Subwords:
    """Byte-level BPE, run by the `tokenizers` library: any text has ids, and back."""

    def __init__(self, kind: str, model: str) -> None:
        from tokenizers import Tokenizer

        self.kind = kind
        try:
            self._tokenizer = Tokenizer.from_str(model)
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"tokenizer: not a tokenizer.json: {error}") from None
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.end = self._tokenizer.token_to_id(END)
        if self.end is None:
            raise InputError(f"tokenizer: expected one with the token {END}")
        self.start = self.end

    def encode(self, text: str, *, strict: bool = False) -> Ids:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        # Lone surrogates, which some terminals give, have no UTF-8.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        encoded = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": self._tokenizer.to_str()}


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_characters(texts: Iterable[str]) -> Characters:
    """The characters of a text, in the order of their code points."""
    found: set[str] = set()
    for text in texts:
        found.update(text)
    return Characters("".join(sorted(found)))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Subwords:
    """Byte-level BPE of at most `vocab_size` tokens (256 bytes, the end of a document, merges), deterministic."""
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise InputError(f"model.vocab_size: expected 257 or more for a bpe tokenizer, got {vocab_size}")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def lines() -> Iterator[str]:
        for text in texts:
            yield from text.splitlines(keepends=True)

    tokenizer.train_from_iterator(lines(), trainer)
    return Subwords("bpe", tokenizer.to_str())


def read_gpt2(folder: Path) -> Subwords:
    """GPT-2's tokenizer from encoder.json (or vocab.json) and vocab.bpe (or merges.txt), each also as .xz.

    Raises:
        InputError: naming the file, for one that is missing or is not GPT-2's.
    """
    from tokenizers import AddedToken, models

    def content(*names: str) -> str:
        for name in names:
            for path in (folder / name, folder / f"{name}.xz"):
                if path.is_file():
                    try:
                        with open_binary(path) as file:
                            return str(file.read().decode("utf-8"))
                    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
                        raise InputError(f"{path}: {error}") from None
        raise InputError(f"data.tokenizer_path: {folder} has no {' or '.join(names)}, as GPT-2's folder has")

    try:
        vocabulary = json.loads(content("encoder.json", "vocab.json"))
        # "#" also begins merges: only the line of the version is none.
        first, *lines = content("vocab.bpe", "merges.txt").splitlines()
        rules = [
            (line.split(" ")[0], line.split(" ")[1])
            for line in ([] if first.startswith("#version") else [first]) + lines
            if line
        ]
        tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=rules))
    except InputError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"data.tokenizer_path: {folder}: not GPT-2's files: {error}") from None
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return Subwords("gpt2", tokenizer.to_str())


def from_dict(plain: Any) -> Tokenizer:
    """The tokenizer of what `to_dict` gave.

    Raises:
        InputError: for anything else.
    """
    kind = plain.get("kind") if isinstance(plain, dict) else None
    if kind == "bytes":
        return Bytes()
    if kind == "characters" and isinstance(plain.get("characters"), str):
        return Characters(plain["characters"])
    if kind in ("bpe", "gpt2") and isinstance(plain.get("model"), str):
        return Subwords(kind, plain["model"])
    raise InputError(f"tokenizer: expected kind bytes, characters, bpe or gpt2, got {kind!r}")


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json, whole or not at all."""
    write_atomically(path, json.dumps(tokenizer.to_dict(), ensure_ascii=False, indent=1).encode())


def load(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json that `save` wrote, or that the `tokenizers` library did (BPE).

    Raises:
        InputError: naming the file, for one that cannot be read or is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        plain = json.loads(text)
        if isinstance(plain, dict) and "kind" not in plain and "model" in plain:
            return Subwords("bpe", text)
        return from_dict(plain)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
