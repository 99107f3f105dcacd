"""Loss, perplexity and accuracy of a model on a split, by one process or several."""

import contextlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..systems import as_it_is
from .module import all_sum, scored


def evaluate(
    model: nn.Module,
    data: Any,
    split: str,
    batch_size: int,
    *,
    batches: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    context: AbstractContextManager[Any] | None = None,
    evaluating: Callable[[nn.Module], AbstractContextManager[Any]] = as_it_is,
) -> dict[str, float]:
    """Score a split: each token once, from the tokens before it in its row.

    Args:
        model, data: of a system.
        split: its name.
        batch_size: rows at once.
        batches: only so many of them; 0 for all. Perplexity per word needs all.
        rank, world: this process and the number of them: each scores its share, and all get the result.
        device: of the model.
        context: such as autocast.
        evaluating: of the system.

    Returns:
        loss (nats a token, plain cross-entropy), perplexity, accuracy, tokens, tokens_per_second; and of a whole split
        of text word_perplexity = exp(nats / (words + one <eos> a line)) and bits_per_character.
    """
    rows = data.evaluation(split, batch_size)
    count = min(len(rows), batches) if batches else len(rows)
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad(), context or contextlib.nullcontext(), evaluating(model):
        for first in range(0, count, world):
            # The processes of fsdp2 must all call the model as often: one without a batch scores nothing.
            batch = rows[first + rank] if first + rank < count else rows.nothing()
            sums += scored(model, batch.to(torch.device(device)))
    model.train(was_training)
    total, right, tokens = all_sum(sums).tolist()
    loss = total / tokens
    seconds = time.perf_counter() - start
    result = {"loss": loss, "perplexity": _exp(loss), "accuracy": right / tokens, "tokens": tokens}
    text = getattr(data, "splits", {}).get(split)
    if text is not None and count == len(rows):
        result["word_perplexity"] = _exp(total / (text.words + text.lines))
        result["bits_per_character"] = total / math.log(2) / text.characters
    return {**result, "tokens_per_second": tokens / seconds}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
