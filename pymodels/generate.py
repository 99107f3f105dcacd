"""Text from a model: prompts of any length, sampled from the package's stream, as a whole or as it is made."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quaver.kernels import philox_uniform, seed_for

from .config import require
from .tokenizers import Tokenizer

#: UTF-8 takes at most so many bytes a character, and a token is a byte or more.
_LONGEST_CHARACTER = 4


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    #: The logits are divided by it; 0 takes the likeliest token.
    temperature: float = 1.0
    #: Only the k likeliest tokens; 0 for all.
    top_k: int = 0
    #: Only the likeliest tokens whose probabilities reach p together (Holtzman et al. 2020); 1 for all.
    top_p: float = 1.0
    max_tokens: int = 200
    #: The text ends before the first of these.
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.temperature < float("inf"), "temperature", self.temperature, "a number of 0 or more")
        require(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a share in (0, 1]")
        require(self.max_tokens >= 0, "max_tokens", self.max_tokens, "0 or more")
        require(all(self.stop), "stop", self.stop, "strings that are not empty")


@dataclass
class Generated:
    """What was made for one prompt."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    #: length: max_tokens were made; stop: a stop string came; end: the model ended the document.
    reason: Literal["length", "stop", "end"] = "length"


def kept_tokens(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] over the temperature, -inf where top-k or top-p leave a token out; the likeliest is always kept."""
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        # A token is left out when those before it have reached p.
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        dropped.scatter_(-1, order[:, :1], False)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def choose(logits: Tensor, sampling: Sampling, rows: Sequence[int], position: int) -> Tensor:
    """The next token of each row, int64 [B].

    The largest of logits + Gumbel noise is a sample of the softmax (Gumbel 1954). The noise of token v at a position of
    prompt r is element position V + v of the stream of (seed, r): what else is generated beside it changes nothing.

    Args:
        logits: [B, V].
        rows: the numbers of the prompts, B of them.
        position: tokens generated before.
    """
    logits = logits.double()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    size = logits.shape[-1]
    seeds = [seed_for(sampling.seed, f"generate.{row}") for row in rows]
    signed = torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in seeds], dtype=torch.int64)
    uniform = philox_uniform((size,), signed, offset=position * size).double().to(logits.device)
    gumbel = -torch.log(-torch.log(uniform).clamp(max=-(2.0**-53)))
    return (kept_tokens(logits, sampling) + gumbel).argmax(-1)


class _Text:
    """Tokens to text as they come: whole characters only, and nothing that may be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._pending: list[int] = []
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith("\ufffd") and len(self._pending) < _LONGEST_CHARACTER:
            return ""
        self._pending.clear()
        return self._release(text, last=False)

    def finish(self) -> str:
        text = self._tokenizer.decode(self._pending) if self._pending and not self.stopped else ""
        return self._release(text, last=True)

    def _release(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = 0
        if not last:
            for stop in self._stop:
                sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
                keep = max(keep, next((size for size in sizes if self._held.endswith(stop[:size])), 0))
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


class _Group:
    """Prompts of equal length, which go through the model together; those that have ended leave it."""

    def __init__(self, model: nn.Module, rows: list[int], prompts: Tensor) -> None:
        self.model, self.rows = model, rows
        self.tokens = prompts  # [B, T]: all of them so far
        self._cache: Any = None

    def next_logits(self) -> Tensor:
        """[B, V]: of the token after the last."""
        context: int = self.model.config.context  # type: ignore[union-attr, assignment]
        make_cache = getattr(self.model, "make_cache", None)
        if make_cache is None:
            return self.model(self.tokens[:, -context:])[:, -1]  # type: ignore[no-any-return]
        if self._cache is None or self._cache[0].length == context:
            # A full cache begins anew with the last half of the window: at each position would cost a whole pass.
            size = self.tokens.shape[1] if self._cache is None else context // 2
            recent = self.tokens[:, -min(max(size, 1), context) :]
            self._cache = make_cache(len(self.rows))
        else:
            recent = self.tokens[:, -1:]
        return self.model(recent, cache=self._cache)[:, -1]  # type: ignore[no-any-return]

    def append(self, tokens: Tensor) -> None:
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)

    def keep(self, alive: list[int]) -> None:
        """Go on with some of the rows."""
        self.rows = [self.rows[i] for i in alive]
        self.tokens = self.tokens[alive]
        for layer in self._cache or ():
            layer.select(alive)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling = Sampling(),
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generated]:
    """Go on with prompts.

    Args:
        model: of a system. Where it has a cache it is used. What is longer than the context is continued from its end:
            with a cache from between half a context and a whole one, without from exactly one.
        tokenizer: of the model.
        prompts: any text; an empty one begins a document. Characters that the tokenizer lacks are its unknown token.
        sampling: how tokens are chosen. Equal seeds give equal texts, whatever prompts are beside one.
        on_text: called with a prompt's number and each further piece of its text.

    Returns:
        One for each prompt, in order.
    """
    results = [Generated(prompt) for prompt in prompts]
    texts = [_Text(tokenizer, sampling.stop) for _ in prompts]

    def emit(row: int, text: str) -> None:
        results[row].text += text
        if text and on_text is not None:
            on_text(row, text)

    device = next(model.parameters()).device
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt).tolist() or [tokenizer.start]
        by_length[len(ids)].append((row, ids))
    was_training = model.training
    model.eval()
    try:
        for _, members in sorted(by_length.items()):
            rows, ids = zip(*members, strict=True)
            group = _Group(model, list(rows), torch.tensor(ids, device=device))
            for position in range(sampling.max_tokens):
                # A model may have more tokens than its tokenizer: they were never trained and mean nothing.
                chosen = choose(group.next_logits()[:, : tokenizer.vocab_size], sampling, group.rows, position)
                alive = []
                for i, (row, token) in enumerate(zip(group.rows, chosen.tolist(), strict=True)):
                    if token == tokenizer.end:
                        results[row].reason = "end"
                        continue
                    results[row].tokens.append(token)
                    emit(row, texts[row].add(token))
                    if texts[row].stopped:
                        results[row].reason = "stop"
                    else:
                        alive.append(i)
                group.append(chosen)
                if len(alive) < len(group.rows):
                    group.keep(alive)
                if not alive:
                    break
            for row in rows:
                emit(row, texts[row].finish())
                if texts[row].stopped:
                    results[row].reason = "stop"
    finally:
        model.train(was_training)
    return results
