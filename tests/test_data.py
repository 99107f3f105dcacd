"""Text, tokenizers, token files and the order of batches."""

import gzip
import json
import lzma
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from quaver.pymodels import data, tokenizers
from quaver.pymodels.config import DataConfig
from quaver.pymodels.data import IGNORED, TextData, TrainingBatches, prepare, shuffled
from quaver.pymodels.errors import InputError
from quaver.pymodels.texts import _cut, splits_of

LINES = "".join(f"line {number} of the text, with é and 日本 {number * 7919 % 1000}\n" for number in range(3000))
UNICODE = "aé日本🎉 \t\r\n\u0301\ufeffZ" + chr(0x10FFFF)


def config(source: Path | str, **arguments: object) -> DataConfig:
    return DataConfig(**{"source": str(source), "tokenizer": "bytes", **arguments})  # type: ignore[arg-type]


def text_of(source: Path, **arguments: object) -> dict[str, str]:
    splits = splits_of(config(source, **arguments))
    return {split: "".join(piece.text for piece in pieces()) for split, pieces in splits.items()}


def ready(tmp_path: Path, text: str | bytes, context: int = 16, vocab_size: int = 512, **arguments: object) -> TextData:
    file = tmp_path / "text.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return prepare(config(file, **arguments), vocab_size, context, 0, tmp_path / "run")


# ---- text -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pack", [".txt", ".txt.gz", ".txt.xz"])
def test_splits_of_a_file_are_its_text_cut_at_lines(tmp_path: Path, pack: str) -> None:
    file = tmp_path / f"text{pack}"
    opened = {".txt": open, ".txt.gz": gzip.open, ".txt.xz": lzma.open}[pack](file, "wb")
    with opened as out:
        out.write(LINES.encode())
    found = text_of(file)
    assert "".join(found.values()) == LINES
    assert list(found) == ["train", "validation", "test"]
    assert all(part.endswith("\n") for part in found.values())
    assert 0.04 < len(found["test"]) / len(LINES) < 0.06


@pytest.mark.parametrize("text", ["x" * 2**20, "é" * 2**19, "日" * 2**18, "🎉" * 2**17, "ab " * 2**18 + "日" * 2**17])
def test_long_lines_lose_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text)
    assert "".join(text_of(file).values()) == text


def test_a_cut_is_never_inside_a_character() -> None:
    for text in ("x", "é", "日", "🎉"):
        data = (text * 9).encode()
        for end in range(1, len(data)):
            data[: _cut(data[:end])].decode()


def test_a_folder_has_its_splits_by_name(tmp_path: Path) -> None:
    for name, text in (("wiki.train.tokens", "a b\n"), ("wiki.valid.tokens", "c\n"), ("wiki.test.tokens", "d\n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("none")
    assert text_of(tmp_path) == {"train": "a b\n", "validation": "c\n", "test": "d\n"}


def test_records_are_documents(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(100)]
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    import pyarrow
    from pyarrow import parquet

    table = tmp_path / "text.parquet"
    parquet.write_table(pyarrow.table({"body": texts}), table)
    for file in (lines, table):
        splits = splits_of(config(file, text_field="body"))
        found = [piece for pieces in splits.values() for piece in pieces()]
        assert [piece.text for piece in found] == texts
        assert all(piece.last for piece in found)


@pytest.mark.slow
def test_a_dataset_by_name(tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "named" / f"{split}.jsonl").write_text(json.dumps({"text": f"{split} text"}) + "\n")
    splits = splits_of(config(f"hf:{tmp_path / 'named'}"))
    assert {split: [piece.text for piece in pieces()] for split, pieces in splits.items()} == {
        "train": ["train text"],
        "validation": ["validation text"],
    }


# ---- tokenizers -----------------------------------------------------------------------------------------------------
def made(kind: str) -> tokenizers.Tokenizer:
    if kind == "bytes":
        return tokenizers.Bytes()
    if kind == "characters":
        return tokenizers.train_characters([LINES, UNICODE])
    return tokenizers.train_bpe([LINES], 400)


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_any_text_survives_a_round_trip_and_a_save(kind: str, tmp_path: Path) -> None:
    tokenizer = made(kind)
    tokenizers.save(tokenizer, tmp_path / "tokenizer.json")
    again = tokenizers.load(tmp_path / "tokenizer.json")
    for text in (UNICODE, LINES[:1000], ""):
        ids = tokenizer.encode(text, strict=True)
        assert tokenizer.decode(ids.tolist()) == text
        assert again.encode(text).tolist() == ids.tolist()
        assert ids.max(initial=0) < tokenizer.vocab_size


def test_bpe_is_trained_to_size_and_the_same_each_time() -> None:
    one, two = (tokenizers.train_bpe([LINES], 400) for _ in range(2))
    assert one.vocab_size == 400
    assert one.to_dict() == two.to_dict()
    assert len(one.encode(LINES)) < len(LINES.encode()) / 2


@pytest.mark.slow
def test_gpt2_files(tmp_path: Path) -> None:
    """GPT-2's two files, made of a BPE trained here, against the library that GPT-2 is usually run with."""
    transformers = pytest.importorskip("transformers")
    model = json.loads(tokenizers.train_bpe([LINES], 400).to_dict()["model"])["model"]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    with lzma.open(tmp_path / "encoder.json.xz", "wb") as file:
        file.write(json.dumps(model["vocab"]).encode())
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    tokenizer = tokenizers.read_gpt2(tmp_path)
    other = transformers.GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "vocab.bpe"))
    for text in (LINES[:2000], "it's  3 spaces, #hash\n\n" + UNICODE):
        assert tokenizer.encode(text).tolist() == other.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- token files and batches ----------------------------------------------------------------------------------------
def test_counts_of_a_text(tmp_path: Path) -> None:
    text = "one two\n\n three\nlast line open"
    data = ready(tmp_path, text, context=4, validation_share=0.0, test_share=0.0)
    split = data.splits["train"]
    assert (split.words, split.lines, split.characters, len(split.ids)) == (6, 4, len(text), len(text))
    assert bytes(split.ids) == text.encode()
    assert isinstance(split.ids, np.memmap)


def test_documents_are_parted_by_an_end_token(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three four")))
    data = prepare(config(file, tokenizer="bpe", validation_share=0.0, test_share=0.0), 300, 4, 0, tmp_path)
    split = data.splits["train"]
    end = data.tokenizer.end
    assert [data.tokenizer.decode(part) for part in np.split(split.ids, np.nonzero(split.ids == end)[0])] == [
        "one",
        "two",
        "three four",
    ]
    assert (split.words, split.lines) == (4, 3)


def test_an_epoch_has_each_window_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    data = ready(tmp_path, LINES, validation_share=0.0, test_share=0.0)
    ids = data.splits["train"].ids
    count = (len(ids) - 1) // 16
    orders = []
    for epoch in range(2):
        batch = data.training(epoch, 0, count, count)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        orders.append([bytes(row.tolist()) for row in batch.tokens])
        windows = [bytes(ids[at * 16 : at * 16 + 16]) for at in range(count)]
        assert Counter(orders[-1]) == Counter(windows)
    assert orders[0] != orders[1] != windows
    assert not torch.equal(TextData(data.tokenizer, data.splits, 16, 1).training(0, 0, 8, 8).tokens, batch.tokens[:8])


@pytest.mark.parametrize("accumulate, world", [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_the_global_batch_does_not_depend_on_its_parts(tmp_path: Path, accumulate: int, world: int) -> None:
    data = ready(tmp_path, LINES)
    expected = {step: data.training(step, 0, 12, 12).tokens for step in (5, 6)}
    rows: dict[int, dict[int, list[int]]] = {5: {}, 6: {}}
    for rank in range(world):
        batches = TrainingBatches(data, 12, accumulate, 5, 7)
        batches.rank, batches.world = rank, world
        assert len(list(batches)) == len(batches)
        for number, batch in enumerate(batches):
            for place, row in enumerate(batch.tokens):
                rows[5 + number // accumulate][batch.row + place] = row.tolist()
    for step, tokens in expected.items():
        assert [rows[step][row] for row in range(12)] == tokens.tolist()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 200])
def test_evaluation_scores_each_token_once(tmp_path: Path, length: int) -> None:
    data = ready(tmp_path, "abcdefghij" * 20, validation_share=0.0, test_share=0.0)
    ids = data.splits["train"].ids[:length]
    split = {"validation": data.splits["train"].__class__(ids, 1, 1, length, "")}
    evaluation = TextData(data.tokenizer, split, 16, 0).evaluation("validation", 3)
    targets = torch.cat([evaluation[i].targets.flatten() for i in range(len(evaluation))])
    tokens = torch.cat([evaluation[i].tokens.flatten() for i in range(len(evaluation))])
    assert targets[targets != IGNORED].tolist() == ids.tolist()
    assert tokens[targets != IGNORED].tolist() == [data.tokenizer.start, *ids[:-1].tolist()]


def test_tokens_are_made_once_and_again_when_the_text_changes(tmp_path: Path) -> None:
    first = ready(tmp_path, LINES, tokenizer="bpe")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "run/data").iterdir()}
    again = prepare(config(tmp_path / "text.txt", tokenizer="bpe"), 512, 16, 0, tmp_path / "run")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run/data").iterdir()} == files
    assert again.digest() == first.digest()
    assert ready(tmp_path, "more\n" + LINES, tokenizer="bpe").digest() != first.digest()


def test_a_given_tokenizer_never_takes_the_tokens_of_another(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = ready(tmp_path / "other", LINES[::-1], tokenizer="bpe").tokenizer
    first = ready(tmp_path, LINES, tokenizer="bpe")
    asked = config(tmp_path / "text.txt", tokenizer="bpe")
    found = prepare(asked, 512, 16, 0, tmp_path / "run", other)
    assert found.tokenizer.to_dict() == other.to_dict() != first.tokenizer.to_dict()
    assert found.digest() != first.digest()
    assert prepare(asked, 512, 16, 0, tmp_path / "run", first.tokenizer).digest() == first.digest()


def test_a_token_file_of_another_size_is_refused(tmp_path: Path) -> None:
    ready(tmp_path, LINES)
    file = next((tmp_path / "run/data").glob("*-train.tokens"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="the file has another size: delete it"):
        prepare(config(tmp_path / "text.txt"), 512, 16, 0, tmp_path / "run")


ACCENT = b"good\n" * 99 + b"caf\xe9 au lait\n"
BAD = {
    "empty": (b"", {}, "data.source: {file} is empty"),
    "not-utf8": (ACCENT, {}, "{file}: not UTF-8 text (invalid continuation byte at byte 498)"),
    "cut": ("日".encode()[:2], {}, "{file}: not UTF-8 text (unexpected end of data at byte 0)"),
    "far": (b"x" * 10 + b"y\n" * 2**18 + b"\xff", {}, "{file}: not UTF-8 text (invalid start byte at byte 524298)"),
    "binary": (b"text\n\0\1\2", {}, "{file}: byte 5 is 0: a binary file, expected text"),
    "vocabulary": (
        LINES.encode(),
        {"vocab_size": 100},
        "model.vocab_size: the bytes tokenizer of {file} has 256 tokens, the model 100",
    ),
    "bpe": (
        LINES.encode(),
        {"vocab_size": 100, "tokenizer": "bpe"},
        "model.vocab_size: expected 257 or more for a bpe tokenizer, got 100",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text(tmp_path: Path, name: str) -> None:
    content, arguments, message = BAD[name]
    with pytest.raises(InputError) as caught:
        ready(tmp_path, content, **arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message.format(file=tmp_path / "text.txt")


def test_a_context_longer_than_the_data(tmp_path: Path) -> None:
    data = ready(tmp_path, "short", context=64, validation_share=0.0, test_share=0.0)
    with pytest.raises(InputError, match=r"model.context: 64 tokens .* need 65 tokens of training text, got 5"):
        data.training(0, 0, 1, 1)


def test_a_character_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    tokenizer = tokenizers.train_characters(["abc\n"])
    (tmp_path / "text.txt").write_text("abcab\nzb")
    with pytest.raises(InputError, match=r"train split: the character 'z' \(U\+007A\) of the text is not among the 4"):
        prepare(config(tmp_path / "text.txt", validation_share=0.0, test_share=0.0), 16, 2, 0, tmp_path, tokenizer)
    assert tokenizer.decode(tokenizer.encode("abz")) == "ab\ufffd"


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{')
    (tmp_path / "bad.parquet").write_text("none")
    for source, message in {
        "wikitext2": "data.source: 'wikitext2' is no file, folder or hf:NAME; or a named source: did "
        "you mean 'wikitext-2'?",
        str(tmp_path / "empty"): "no file is named as the train split, such as train.txt or wiki.train.tokens",
        str(tmp_path / "lines.jsonl"): "line 2 has no text under 'text' (data.text_field): expected one of body",
        str(tmp_path / "bad.jsonl"): "line 2 is not JSON",
        str(tmp_path / "bad.parquet"): "not a parquet file",
    }.items():
        with pytest.raises(InputError) as caught:
            text_of(Path(source)) if "/" in source else splits_of(config(source))
        assert message in str(caught.value)


# ---- the order of windows -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 2, 3, 5, 1000, 4097])
def test_the_order_of_many_windows_has_each_once(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The order that needs no table, made to serve few."""
    monkeypatch.setattr(data, "_TABLE", 0)
    for seed in (0, 7):
        assert sorted(shuffled(place, count, seed) for place in range(count)) == list(range(count))


def test_the_order_of_many_windows_is_random() -> None:
    count, places = 2**20 + 12345, 20000
    first, second = ([shuffled(place, count, seed) for place in range(places)] for seed in (3, 4))
    assert all(0 <= at < count for at in first)
    assert len(set(first)) == places
    # Where neighbours go: evenly spread, unrelated to the place, to each other and to another seed.
    bins = Counter(at * 100 // count for at in first)
    assert sum((n - places / 100) ** 2 / (places / 100) for n in bins.values()) < 160  # chi-squared, 99 degrees
    values = np.array(first, dtype=np.float64)
    for other in (np.arange(places), np.array(second), np.roll(values, 1)):
        assert abs(np.corrcoef(values, other)[0, 1]) < 0.035  # 5 standard deviations
    assert sum(a == b for a, b in zip(first, second, strict=True)) <= 3
    assert all(shuffled(place, count, 3) == first[place] for place in range(50))


def test_a_dataset_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        InputError, match=r"Salesforce/wikitext is loaded by the package datasets, which is not installed"
    ):
        prepare(config("wikitext-2"), 256, 16, 0, tmp_path)
