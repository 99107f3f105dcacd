"""How varied and how new a text is."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Of the grams that are looked up in the training text.
NOVELTY = 4


@dataclass(frozen=True)
class Creativity:
    """Measures of samples.

    entropy: bits a character of the distribution of characters. diversity: different characters over all. distinct_1,
    _2, _3: different character n-grams over all, each counted within a sample (Li et al. 2016). novelty: share of
    4-grams that the training text lacks. average_length: characters a sample.
    """

    entropy: float
    diversity: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    novelty: float
    average_length: float


def grams(text: str, size: int) -> Iterable[str]:
    """The n-grams of a text, as often as they occur."""
    return (text[at : at + size] for at in range(len(text) - size + 1))


def known_grams(training_text: str) -> frozenset[str]:
    """What novelty is measured against."""
    return frozenset(grams(training_text, NOVELTY))


def evaluate_creativity(samples: Sequence[str], known: frozenset[str]) -> Creativity:
    """Measure samples against the 4-grams of the training text (`known_grams`). Without characters all is 0."""
    characters = Counter("".join(samples))
    total = sum(characters.values())
    entropy = -sum(count / total * math.log2(count / total) for count in characters.values())

    def distinct(size: int) -> float:
        every = [gram for sample in samples for gram in grams(sample, size)]
        return len(set(every)) / max(1, len(every))

    every = [gram for sample in samples for gram in grams(sample, NOVELTY)]
    return Creativity(
        entropy=max(0.0, entropy),
        diversity=len(characters) / max(1, total),
        distinct_1=distinct(1),
        distinct_2=distinct(2),
        distinct_3=distinct(3),
        novelty=sum(gram not in known for gram in every) / max(1, len(every)),
        average_length=total / max(1, len(samples)),
    )
