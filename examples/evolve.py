"""Trains a small character model on any text without autograd and without storing noise: evolution strategies.

    python examples/evolve.py FILE

A member of the population is the weights plus noise, weight + sigma * epsilon_p, and its antithetic twin is
weight - sigma * epsilon_p. The sum of all epsilon_p, each times its member's loss minus its twin's, points along the
gradient (Salimans et al. 2017, "Evolution strategies as a scalable alternative to reinforcement learning"). The usual
program keeps every epsilon_p until that sum. Here a member is one 64-bit seed, and its noise is made again where it is
used. The lines that matter, for one weight and the population's `seeds` [P]:

    difference = losses(perturb(weight, sigma, seeds)) - losses(perturb(weight, -sigma, seeds))
    gradient = perturbation_gradient(normalize(difference, dim=0), seeds, weight.shape)
    weight -= learning_rate * gradient
"""

import math
import multiprocessing
import resource
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding_bag, normalize, relu

from quaver.cli import UsageError, run
from quaver.kernels import perturb, perturbation_gradient, philox_normal, philox_words, seed_for

Parameters = dict[str, Tensor]
MOMENTUM = 0.9
# How much less each earlier character counts at first, and how much the output bias does.
RECENCY, BIAS_SCALE = 0.3, 0.2
# Windows that the losses before and after are the mean of, evenly spaced.
MEASURED_WINDOWS = 8192
TIMED_STEPS = 7


@dataclass(frozen=True)
class Settings:
    context: int
    width: int
    batch: int
    population: int
    chunk: int
    sigma: float
    learning_rate: float
    steps: int
    seed: int
    threads: int

    def shapes(self, vocabulary: int) -> dict[str, tuple[int, ...]]:
        rows = self.context * vocabulary
        return {"input": (rows, self.width), "output": (vocabulary, self.width), "bias": (vocabulary,)}


def losses(parameters: Parameters, windows: Tensor) -> Tensor:
    """Cross entropy in nats of every member [P], from parameters [P, ..] and windows [B, context + 1] of characters.

    A window's last character is predicted from the others: each of them picks a row of its position's table, and their
    sum goes through a relu to the output layer. The scales make weights of order 1 right everywhere, and so one sigma.
    """
    members, rows, width = parameters["input"].shape
    batch, context = windows.shape[0], windows.shape[1] - 1
    vocabulary = rows // context
    picked = windows[:, :-1] + vocabulary * torch.arange(context) + rows * torch.arange(members).view(-1, 1, 1)
    recency = 2 * normalize(RECENCY ** torch.arange(context - 1, -1, -1.0), dim=0)
    hidden = embedding_bag(
        picked.view(-1, context),
        parameters["input"].view(-1, width),
        mode="sum",
        per_sample_weights=recency.repeat(members * batch, 1),
    )
    logits = torch.baddbmm(
        parameters["bias"].unsqueeze(1),
        relu(hidden).view(members, batch, width),
        parameters["output"].mT,
        beta=BIAS_SCALE,
        alpha=width**-0.5,
    )
    each = cross_entropy(logits.view(-1, vocabulary), windows[:, -1].repeat(members), reduction="none")
    return each.view(members, batch).mean(1)


class SeededNoise:
    """A population's noise as seeds: every use makes it again."""

    def __init__(self, settings: Settings, shapes: dict[str, tuple[int, ...]]) -> None:
        self.members = torch.arange(settings.population)
        self.bases = {name: torch.tensor(seed_for(settings.seed, name)) for name in shapes}

    def begin(self, step: int) -> None:
        # Seed base + step * P + p: no two members or steps of one tensor share one. Each tensor counts up from its own
        # hashed 64-bit base; two such runs of steps * P seeds overlap with probability 2 * steps * P / 2^64, 6e-15 for
        # 200 steps of 256.
        first = step * len(self.members)
        self.seeds = {name: base + first + self.members for name, base in self.bases.items()}

    def perturbed(self, parameters: Parameters, sigma: float, members: slice) -> Parameters:
        return {name: perturb(weight, sigma, self.seeds[name][members]) for name, weight in parameters.items()}

    def gradient(self, name: str, coefficients: Tensor, weight: Tensor) -> Tensor:
        return perturbation_gradient(coefficients, self.seeds[name], weight.shape)


class StoredNoise:
    """The usual way, for comparison: torch.randn's noise of all members, in buffers that are made once."""

    def __init__(self, settings: Settings, shapes: dict[str, tuple[int, ...]]) -> None:
        self.noise = {name: torch.empty(settings.population, *shape) for name, shape in shapes.items()}

    def begin(self, step: int) -> None:
        for noise in self.noise.values():
            torch.randn(noise.shape, out=noise)

    def perturbed(self, parameters: Parameters, sigma: float, members: slice) -> Parameters:
        return {name: torch.add(w, self.noise[name][members], alpha=sigma) for name, w in parameters.items()}

    def gradient(self, name: str, coefficients: Tensor, weight: Tensor) -> Tensor:
        return (coefficients @ self.noise[name].flatten(1)).view_as(weight)


class Evolution:
    """The algorithm; either kind of noise fits."""

    def __init__(self, settings: Settings, vocabulary: int, kind: type[SeededNoise] | type[StoredNoise]) -> None:
        shapes = settings.shapes(vocabulary)
        self.settings, self.noise = settings, kind(settings, shapes)
        # The output starts at zero: every character is equally likely.
        self.parameters = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self.parameters["input"] = philox_normal(shapes["input"], seed_for(settings.seed, "initial input"))
        self.velocity = {name: torch.zeros(shape) for name, shape in shapes.items()}
        # Members need nothing from each other, so chunks run in parallel, each on one thread: on a busy machine 0.3 s a
        # step where threads inside every op took 1.5 s, and the same bits for any number of threads.
        self.pool = ThreadPoolExecutor(settings.threads, initializer=torch.set_num_threads, initargs=(1,))

    def loss(self, windows: Tensor) -> float:
        member = {name: weight.unsqueeze(0) for name, weight in self.parameters.items()}
        return self.pool.submit(losses, member, windows).result().item()

    def step(self, windows: Tensor, step: int) -> float:
        """One update from windows drawn at random; the mean loss of all members."""
        s = self.settings
        batch = windows[philox_words(s.batch, seed_for(s.seed, "batch") + step) % len(windows)]
        self.noise.begin(step)
        chunks = [slice(first, first + s.chunk) for first in range(0, s.population, s.chunk)]

        def members_losses(sigma: float) -> Tensor:
            result = torch.empty(s.population)

            def evaluate(chunk: slice) -> None:
                result[chunk] = losses(self.noise.perturbed(self.parameters, sigma, chunk), batch)

            list(self.pool.map(evaluate, chunks))  # a list, so that an exception of a thread is ours
            return result

        plus, minus = members_losses(s.sigma), members_losses(-s.sigma)
        # Of length 1 whatever the losses' scale, so that the learning rate alone sets the size of a step.
        coefficients = normalize(plus - minus, dim=0)
        rate = s.learning_rate * (1 - step / s.steps)
        for name, weight in self.parameters.items():
            self.velocity[name].mul_(MOMENTUM).add_(self.noise.gradient(name, coefficients, weight))
            weight.sub_(self.velocity[name], alpha=rate)
        return (plus.mean() + minus.mean()).item() / 2


def read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text:
        raise UsageError(f"{file}: the file is empty")
    return text


def encode(text: str, most: int) -> tuple[Tensor, int]:
    """Every character's number, and how many numbers there are; with too many characters the rarest share the last."""
    by_frequency = [character for character, _ in Counter(text).most_common()]
    size = min(len(by_frequency), most)
    numbers = {character: min(rank, size - 1) for rank, character in enumerate(by_frequency)}
    return torch.tensor([numbers[character] for character in text]), size


def peak_memory() -> int:
    """The most bytes that this process has had in memory. On Linux ru_maxrss would begin with what the parent had."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])


def measure(pipe: Connection, settings: Settings, vocabulary: int, tokens: Any, kind: type[Any]) -> None:
    """In a process of its own: answers a step's number with the seconds it took, and None with the memory of all."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(settings.threads)
    windows = torch.from_numpy(tokens).unfold(0, settings.context + 1, 1)
    before = peak_memory()
    evolution = Evolution(settings, vocabulary, kind)
    while (step := pipe.recv()) is not None:
        start = time.perf_counter()
        evolution.step(windows, step)
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_memory() - before)


def compare(settings: Settings, vocabulary: int, tokens: Tensor) -> list[tuple[float, int]]:
    """Median seconds a step and bytes, of seeded and of stored noise: each in a fresh process, steps taken in turn."""
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    for kind in (SeededNoise, StoredNoise):
        pipe, far = spawn.Pipe()
        spawn.Process(target=measure, args=(far, settings, vocabulary, tokens.numpy(), kind), daemon=True).start()
        far.close()  # or a process that dies would leave us waiting
        pipes.append(pipe)

    def ask(pipe: Any, step: int | None) -> Any:
        pipe.send(step)
        return pipe.recv()

    seconds = [[ask(pipe, step) for pipe in pipes] for step in range(1 + TIMED_STEPS)][1:]  # the first warms up
    medians = [statistics.median(each) for each in zip(*seconds, strict=True)]
    return list(zip(medians, [ask(pipe, None) for pipe in pipes], strict=True))


app = typer.Typer(add_completion=False, rich_markup_mode=None)
Count = Annotated[int, typer.Option(min=1)]


@app.command(help=__doc__.split("\n")[0])
def main(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="any UTF-8 text; its last tenth is for validation")],
    steps: Count = 200,
    population: Annotated[int, typer.Option(min=1, help="pairs of antithetic members")] = 256,
    sigma: Annotated[float, typer.Option(help="size of the perturbation, of weights of order 1")] = 0.3,
    learning_rate: float = 0.01,
    seed: Annotated[int, typer.Option(help="of initial weights, batches and perturbations")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="any number gives the same bits; torch's choice when not given")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="characters that the next is predicted from")] = 4,
    width: Annotated[int, typer.Option(min=1, help="of the hidden layer")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="windows that all members of a step see")] = 128,
    chunk: Annotated[int, typer.Option(min=1, help="members of which a thread has the weights at once")] = 4,
    vocabulary: Annotated[int, typer.Option(min=2, help="at most; the rarest characters share one place")] = 256,
    baseline: Annotated[bool, typer.Option(help="measure the same with torch.randn and stored noise")] = True,
) -> None:
    for name, value in (("sigma", sigma), ("learning-rate", learning_rate)):
        if not 0 < value < math.inf:
            raise UsageError(f"--{name} {value}: expected a finite number above 0")
    text = read_text(file)
    if len(text) <= 10 * context:
        raise UsageError(f"{file}: {len(text)} characters; --context {context} needs {10 * context + 1} or more")
    torch.set_grad_enabled(False)
    torch.set_num_threads(threads or torch.get_num_threads())
    settings = Settings(
        context, width, batch, population, chunk, sigma, learning_rate, steps, seed, torch.get_num_threads()
    )
    tokens, size = encode(text, vocabulary)
    cut = len(tokens) * 9 // 10
    parts = {"training": tokens[:cut], "validation": tokens[cut:]}
    windows = {name: part.unfold(0, context + 1, 1) for name, part in parts.items()}
    measured = {name: all_[:: math.ceil(len(all_) / MEASURED_WINDOWS)] for name, all_ in windows.items()}
    unigram = [torch.special.entr(part.bincount() / len(part)).sum().item() for part in parts.values()]

    console = Console(width=None if Console().is_terminal else 132, highlight=False)
    evolution = Evolution(settings, size, SeededNoise)
    weights = sum(weight.numel() for weight in evolution.parameters.values())
    console.print(
        f"{len(text):,} characters, {len(set(text)):,} different, vocabulary {size}; {weights:,} weights, "
        f"{population} pairs of members, {settings.threads} threads"
    )
    before = [evolution.loss(part) for part in measured.values()]
    start = time.perf_counter()
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[loss]}"), console=console) as progress:
        task = progress.add_task("evolving", total=steps, loss="")
        for step in range(steps):
            loss = evolution.step(windows["training"], step)
            progress.update(task, advance=1, loss=f"members' loss {loss / math.log(2):.3f} bits")
    seconds = time.perf_counter() - start
    after = [evolution.loss(part) for part in measured.values()]
    if not math.isfinite(sum(after)):
        raise UsageError(
            f"the loss is no longer finite: --learning-rate {learning_rate} or --sigma {sigma} is too large"
        )

    table = Table("bits a character", *parts, box=None, pad_edge=False)
    rows = {"before": before, "unigram entropy, the least without context": unigram}
    rows[f"after {steps} steps, {seconds:.1f} s"] = after
    for name, nats in rows.items():
        table.add_row(name, *(f"{loss / math.log(2):.3f}" for loss in nats))
    console.print(table)
    console.print(f"Final validation loss, exact: {after[1].hex()} nats. Peak memory: {peak_memory() / 1e6:.0f} MB.")
    if not baseline:
        return
    with console.status("measuring both kinds of noise"):
        measurements = compare(settings, size, tokens[: min(cut, 100_000)])
    table = Table("the same steps with", "time a step", "memory they add", "of that noise", box=None, pad_edge=False)
    stored = 4 * weights * population
    for name, (median, added), noise in zip(
        ("noise from seeds (quaver)", "noise stored (torch.randn)"), measurements, (0, stored), strict=True
    ):
        table.add_row(name, f"{median * 1e3:.0f} ms", f"{added / 1e6:.1f} MB", f"{noise / 1e6:.1f} MB")
    console.print(table)


if __name__ == "__main__":
    run(app)
