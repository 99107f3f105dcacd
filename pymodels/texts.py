"""Text in pieces, from files, folders and datasets, in memory that does not grow with the text."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .config import DataConfig, nearest
from .errors import InputError
from .files import open_binary, plain_suffix

SPLITS = ("train", "validation", "test")
#: How files of a folder name the splits.
_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
RECORDS = (".jsonl", ".parquet")
#: Bytes: what the tokenizer keeps of 8 pieces is 50 times as much.
PIECE = 2**18
#: Named sources: the datasets of the Hugging Face hub that they are. Their texts hold <unk> for rare words.
NAMED = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-v1"),
}


class Piece(NamedTuple):
    """A part of a document. Parts end after a line where there are lines, and never inside a character."""

    text: str
    #: Whether the document ends here.
    last: bool


Pieces = Callable[[], Iterator[Piece]]


def _decoded(data: bytes, path: Path, position: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {position + error.start})") from None
    if "\0" in text:
        at = position + data.index(b"\0")
        raise InputError(f"{path}: byte {at} is 0: a binary file, expected text")
    return text


def _cut(data: bytes) -> int:
    """Where to end a piece: after the last line, else after the last blank, else before an unfinished character."""
    for mark in (b"\n", b" "):
        at = data.rfind(mark) + 1
        if at:
            return at
    at = len(data)
    while at > max(0, len(data) - 3) and data[at - 1] & 0xC0 == 0x80:
        at -= 1
    return at - 1 if at and data[at - 1] >= 0xC0 else len(data)


def _text_pieces(path: Path) -> Iterator[Piece]:
    with open_binary(path) as file:
        rest, position = b"", 0
        while block := file.read(PIECE):
            data = rest + block
            end = _cut(data) or len(data)
            if text := _decoded(data[:end], path, position):
                yield Piece(text, False)
            rest, position = data[end:], position + end
        yield Piece(_decoded(rest, path, position), True)


def _json_pieces(path: Path, field: str) -> Iterator[Piece]:
    with open_binary(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}: line {number} is not JSON: {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                keys = nearest(field, record) if isinstance(record, dict) and record else "expected an object"
                raise InputError(f"{path}: line {number} has no text under {field!r} (data.text_field): {keys}")
            yield Piece(record[field], True)


def _parquet_pieces(path: Path, field: str) -> Iterator[Piece]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file: {error}") from None
    if field not in file.schema_arrow.names:
        raise InputError(f"{path}: no column {field!r} (data.text_field): {nearest(field, file.schema_arrow.names)}")
    for batch in file.iter_batches(1024, columns=[field]):
        for text in batch.column(0).to_pylist():
            yield Piece(text or "", True)


def _file(path: Path, field: str) -> Pieces:
    if plain_suffix(path) == ".jsonl":
        return lambda: _json_pieces(path, field)
    if path.suffix == ".parquet":
        return lambda: _parquet_pieces(path, field)
    return lambda: _text_pieces(path)


def _between(pieces: Pieces, begin: int, end: int, whole_documents: bool) -> Iterator[Piece]:
    """Characters begin .. end of a source: whole documents that begin there, or text cut at the next ends of lines."""
    at = 0
    for text, last in pieces():
        cuts = [min(max(bound - at, 0), len(text)) for bound in (begin, end)]
        if whole_documents:
            cuts = [0, len(text) if begin <= at < end else 0]
        else:
            # The bound itself may be the end of a line.
            cuts = [text.find("\n", cut - 1) + 1 or cut if 0 < cut < len(text) else cut for cut in cuts]
        at += len(text)
        if part := text[cuts[0] : cuts[1]]:
            yield Piece(part, last or cuts[1] < len(text) or at >= end)
        if at >= end:
            return


def _shared_out(pieces: Pieces, config: DataConfig, records: bool) -> dict[str, Pieces]:
    """The splits of a source that has none: the first part for training, the last for the test."""
    total = sum(len(piece.text) for piece in pieces())
    validation = round(total * (1 - config.validation_share - config.test_share))
    test = round(total * (1 - config.test_share))
    spans = {"train": (0, validation), "validation": (validation, test), "test": (test, total)}

    def span(begin: int, end: int) -> Pieces:
        return lambda: _between(pieces, begin, end, records)

    return {split: span(*bounds) for split, bounds in spans.items() if bounds[0] < bounds[1]}


def _folder(path: Path, config: DataConfig) -> dict[str, Pieces]:
    """wiki.train.tokens, valid.txt, test.jsonl.xz ..: the part of a name that is a split decides."""
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        parts = file.name.replace("-", ".").replace("_", ".").split(".")
        for split in {_SPLIT_NAMES[part] for part in parts if part in _SPLIT_NAMES} if file.is_file() else ():
            if split in found:
                raise InputError(f"{path}: both {found[split].name} and {file.name} are named as the {split} split")
            found[split] = file
    if "train" not in found:
        raise InputError(f"{path}: no file is named as the train split, such as train.txt or wiki.train.tokens")
    return {split: _file(found[split], config.text_field) for split in SPLITS if split in found}


def _hub(name: str, configuration: str | None, config: DataConfig) -> dict[str, Pieces]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(
            f"data.source: {name} is loaded by the package datasets, which is not installed: pip install datasets; "
            "or give the path of a file or folder"
        ) from None
    try:
        splits: Any = datasets.load_dataset(name, configuration)
    except Exception as error:  # what it raises differs by what failed, and by version
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"data.source: the dataset {name} could not be loaded: {type(error).__name__}: {reason}"
        ) from None

    def rows(split: Any) -> Pieces:
        if config.text_field not in split.column_names:
            raise InputError(
                f"{name}: no column {config.text_field!r}: {nearest(config.text_field, split.column_names)}"
            )
        return lambda: (Piece(row[config.text_field] or "", True) for row in split)

    named = {_SPLIT_NAMES[key]: rows(split) for key, split in splits.items() if key in _SPLIT_NAMES}
    if "train" not in named:
        raise InputError(f"{name}: no split is called train, it has {', '.join(splits)}")
    return named if len(named) > 1 else _shared_out(named["train"], config, True)


def splits_of(config: DataConfig) -> dict[str, Pieces]:
    """For each split that the source has, a function that reads it from the beginning.

    Raises:
        InputError: naming the file and the place, for what cannot be read; most of it only when the pieces are read.
    """
    source = config.source
    if source.startswith("hf:"):
        name, _, configuration = source[3:].partition(":")
        return _hub(name, configuration or None, config)
    path = Path(source)
    if path.is_dir():
        return _folder(path, config)
    if path.is_file():
        pieces = _file(path, config.text_field)
        return _shared_out(pieces, config, plain_suffix(path) in RECORDS)
    if source in NAMED:
        return _lines_of(_hub(*NAMED[source], config))
    raise InputError(
        f"data.source: {source!r} is no file, folder or hf:NAME; or a named source: {nearest(source, NAMED)}"
    )


def _lines_of(splits: dict[str, Pieces]) -> dict[str, Pieces]:
    """A dataset whose records are the lines of one text, as that text."""

    def joined(pieces: Pieces) -> Iterator[Piece]:
        for text, _ in pieces():
            yield Piece(text if text.endswith("\n") else text + "\n", False)
        yield Piece("", True)

    return {split: partial(joined, pieces) for split, pieces in splits.items()}
