"""Generation: greedy, sampled, batched, streamed, stopped, beyond the context."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quaver.pymodels import tokenizers
from quaver.pymodels.baseline.config import BaselineConfig
from quaver.pymodels.baseline.model import Baseline
from quaver.pymodels.errors import InputError
from quaver.pymodels.generate import Sampling, choose, generate, kept_tokens

CONFIG = BaselineConfig(vocab_size=300, context=24, width=32, layers=2, heads=2, kv_heads=1, hidden=48, init_std=0.3)
BYTES = tokenizers.Bytes()
GREEDY = Sampling(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def model() -> Baseline:
    return Baseline(CONFIG, 3)


class Scripted(nn.Module):
    """Says a text, whatever it is given: the token after position t is text[t]."""

    def __init__(self, ids: list[int], prompt: int, vocab_size: int = 300, context: int = 100) -> None:
        super().__init__()
        self.ids, self.prompt, self.config = ids, prompt, BaselineConfig(vocab_size=vocab_size, context=context)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = torch.zeros(*tokens.shape, self.config.vocab_size)
        logits[:, -1, self.ids[tokens.shape[1] - self.prompt]] = 50.0
        return logits


def said(text: str, prompt: str = "x", **arguments: Any) -> Any:
    ids = list(text.encode())
    pieces: list[str] = []
    sampling = Sampling(temperature=0, **{"max_tokens": len(ids), **arguments})
    (made,) = generate(
        Scripted([*ids, 0], len(prompt.encode())), BYTES, [prompt], sampling, lambda _, piece: pieces.append(piece)
    )
    assert "".join(pieces) == made.text
    return made, pieces


# ---- the model's part -----------------------------------------------------------------------------------------------
def test_greedy_takes_the_likeliest_token_at_each_place(model: Baseline) -> None:
    (made,) = generate(model, BYTES, ["abc"], GREEDY)
    ids = list(b"abc")
    with torch.no_grad():
        for token in made.tokens:
            assert int(model.eval()(torch.tensor([ids]))[0, -1, :256].argmax()) == token
            ids.append(token)
    assert len(made.tokens) == 12
    assert made.reason == "length"


def test_prompts_beside_each_other_change_nothing(model: Baseline) -> None:
    prompts = ["abc", "", "xyz", "a longer prompt", "abd", "ü", "abc"]
    sampling = Sampling(max_tokens=30, seed=5)
    together = generate(model, BYTES, prompts, sampling)
    for row, prompt in enumerate(prompts):
        # The row's number decides the noise: alone it is at the same place behind empty ones.
        alone = generate(model, BYTES, [""] * row + [prompt], sampling)[row]
        assert alone.tokens == together[row].tokens, prompt
    assert together[0].tokens != together[6].tokens  # equal prompts are different samples


def test_seeds(model: Baseline) -> None:
    def made(**arguments: Any) -> list[int]:
        return generate(model, BYTES, ["abc"], Sampling(max_tokens=20, **arguments))[0].tokens

    assert made(seed=1) == made(seed=1) != made(seed=2)
    assert made(temperature=1e-6) == made(temperature=0)


@pytest.mark.parametrize("prompt", ["", "a", "a" * 23, "a" * 24, "a" * 25, "ab" * 60])
def test_beyond_the_context(model: Baseline, prompt: str) -> None:
    """With a cache: exact while prompt and text fit; then from the last half of the window on, again and again."""
    (made,) = generate(model, BYTES, [prompt], Sampling(temperature=0, max_tokens=60))
    assert len(made.tokens) == 60
    ids = list(prompt.encode()) or [BYTES.start]
    begin = max(0, len(ids) - CONFIG.context)
    with torch.no_grad():
        for token in made.tokens:
            if len(ids) - begin > CONFIG.context:
                begin = len(ids) - CONFIG.context // 2
            assert int(model.eval()(torch.tensor([ids[begin:]]))[0, -1, :256].argmax()) == token
            ids.append(token)


def test_a_model_without_a_cache_slides(model: Baseline) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, CONFIG

        def forward(self, tokens: Tensor) -> Tensor:
            assert tokens.shape[1] <= CONFIG.context
            return model(tokens)

    (made,) = generate(Plain(), BYTES, ["abcdef"], Sampling(temperature=0, max_tokens=40))
    ids = list(b"abcdef")
    with torch.no_grad():
        for token in made.tokens:
            assert int(model.eval()(torch.tensor([ids[-24:]]))[0, -1, :256].argmax()) == token
            ids.append(token)


def test_the_mode_of_the_model_is_given_back(model: Baseline) -> None:
    for mode in (True, False):
        generate(model.train(mode), BYTES, ["a"], Sampling(max_tokens=1))
        assert model.training == mode
    model.eval()


# ---- choosing -------------------------------------------------------------------------------------------------------
def test_gumbel_noise_samples_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    for sampling in (Sampling(), Sampling(temperature=0.5), Sampling(top_k=2), Sampling(top_p=0.6)):
        count = 4000
        drawn = Counter(int(choose(logits, sampling, [0], position)) for position in range(count))
        expected = kept_tokens(logits.double(), sampling).softmax(-1)[0]
        for token, share in enumerate(expected.tolist()):
            spread = (share * (1 - share) / count) ** 0.5
            assert abs(drawn[token] / count - share) <= 4.5 * spread


def test_top_k_and_top_p_keep_what_they_say() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))

    def kept(**arguments: Any) -> list[list[int]]:
        return [row.isfinite().nonzero().flatten().tolist() for row in kept_tokens(logits, Sampling(**arguments))]

    assert kept() == [[0, 1, 2, 3]] * 2
    assert kept(top_k=1) == [[0], [3]]
    assert kept(top_k=3) == [[0, 1, 2], [1, 2, 3]]
    assert kept(top_k=99) == [[0, 1, 2, 3]] * 2
    assert kept(top_p=0.39) == [[0], [3]]
    assert kept(top_p=0.69) == [[0, 1], [2, 3]]
    assert kept(top_p=0.71) == [[0, 1, 2], [1, 2, 3]]
    assert kept(top_p=1e-9) == [[0], [3]]
    assert kept(top_k=3, top_p=0.5) == [[0, 1], [2, 3]]
    # Temperature comes first: a flat distribution needs more tokens.
    assert kept(temperature=100.0, top_p=0.69) == [[0, 1, 2], [1, 2, 3]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"temperature": -1.0}, "temperature: expected a number of 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected a number of 0 or more, got nan"),
        ({"top_k": -1}, "top_k: expected 0 or more, got -1"),
        ({"top_p": 0.0}, r"top_p: expected a share in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p: expected a share in \(0, 1\], got 1.5"),
        ({"max_tokens": -1}, "max_tokens: expected 0 or more, got -1"),
        ({"stop": ("",)}, "stop: expected strings that are not empty"),
    ],
)
def test_wrong_sampling(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**arguments)


# ---- text -----------------------------------------------------------------------------------------------------------
def test_pieces_are_whole_characters() -> None:
    text = "aé日🎉z"
    made, pieces = said(text)
    assert made.text == text
    assert pieces == list(text)


def test_bytes_that_are_no_text() -> None:
    ids = [0xFF, 0xC3, ord("a"), 0xF0, 0x9F]
    pieces: list[str] = []
    sampling = Sampling(temperature=0, max_tokens=5)
    (made,) = generate(Scripted([*ids, 0], 1), BYTES, ["x"], sampling, lambda _, piece: pieces.append(piece))
    assert made.text == bytes(ids).decode("utf-8", "replace")
    assert "".join(pieces) == made.text


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("one\ntwo\n\nthree", ("\n\n",), "one\ntwo"),
        ("ababac!", ("abac",), "ab"),
        ("hello", ("z", "llo", "l"), "he"),
        ("naïve ünd", ("ü",), "naïve "),
        ("nothing", ("else",), "nothing"),
        ("ends in ab", ("abc",), "ends in ab"),
        ("stop", ("stop",), ""),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str) -> None:
    made, pieces = said(text, stop=stop)
    assert made.text == expected
    assert made.reason == ("stop" if expected != text else "length")
    assert all(pieces)


def test_the_end_of_a_document_ends_the_text() -> None:
    class Ending(tokenizers.Bytes):
        end = 260
        vocab_size = 261

    model = Scripted([ord("a"), ord("b"), 260, ord("c")], 1)
    (made,) = generate(model, Ending(), ["x"], GREEDY)
    assert (made.text, made.reason, made.tokens) == ("ab", "end", [97, 98])


def test_rows_that_end_leave_the_others_as_they_were(model: Baseline) -> None:
    sampling = Sampling(max_tokens=40, seed=2)
    prompts = [f"p{number}" for number in range(8)]
    free = generate(model, BYTES, prompts, sampling)
    stop = tuple({chr(token) for token in free[3].tokens[:3] if 32 < token < 127} or {"e"})
    stopped = generate(model, BYTES, prompts, Sampling(max_tokens=40, seed=2, stop=stop))
    assert any(made.reason == "stop" for made in stopped)
    for before, after in zip(free, stopped, strict=True):
        assert before.tokens[: len(after.tokens)] == after.tokens
        assert before.text.startswith(after.text)


def test_no_tokens_and_no_prompts(model: Baseline) -> None:
    assert generate(model, BYTES, []) == []
    (made,) = generate(model, BYTES, ["a"], Sampling(max_tokens=0))
    assert (made.text, made.tokens, made.reason) == ("", [], "length")


@pytest.mark.parametrize("prompt", ["日本🎉", "\x00\ud800", "\u0301\r\n", chr(0x10FFFF)])
def test_any_unicode_is_a_prompt(model: Baseline, prompt: str) -> None:
    characters = tokenizers.Characters("abc")
    for tokenizer in (BYTES, characters):
        (made,) = generate(model, tokenizer, [prompt], Sampling(max_tokens=3, top_k=3, temperature=0))
        assert len(made.tokens) == 3
