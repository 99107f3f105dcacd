"""Does noise in the weights help a language model? The experiments of docs/chaos.md.

benchmarks/chaos.py train TEXT FOLDER: six runs: three seeds, with the schedule and without noise
benchmarks/chaos.py measure TEXT FOLDER: robustness and creativity of their weights, FOLDER/chaos.json and chaos.png
benchmarks/chaos.py speed: a step at intensity 0.3 against one at 0, and against cloned weights
"""

import copy
import io
import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from quaver.pymodels import runs, systems
from quaver.pymodels.chaos import ChaosConfig, ChaosTransformer, evaluate_creativity, known_grams
from quaver.pymodels.config import nested, override
from quaver.pymodels.files import open_binary, write_atomically
from quaver.pymodels.generate import Sampling, generate
from quaver.pymodels.training import loop

SEEDS = (0, 1, 2)
KINDS = {"chaos": (), "off": ("model.peak=0", "model.final=0")}
INTENSITIES = (0.0, 0.1, 0.2, 0.3, 0.5)
TEMPERATURES = (0.7, 0.85, 1.0, 1.15, 1.3, 1.5)
CHARACTER_NOISE = (0.0, 0.05, 0.1, 0.2)
#: Batches of 16 rows of the validation split, draws of the noise, samples and their length.
BATCHES, DRAWS, SAMPLES, LENGTH = 24, 3, 24, 200
app = typer.Typer(add_completion=False, help=__doc__)
console = Console(markup=False, highlight=False)


@app.command()
def train(text: Path, folder: Path) -> None:
    """Train what is not there yet; --resume is implied."""
    for seed in SEEDS:
        for kind, changes in KINDS.items():
            config = systems.find("chaos").run_config("genesis-short")
            keys = (f"data.source={text}", f"data.cache={folder / 'cache'}", f"train.seed={seed}", "train.threads=1")
            rest = ("train.log_every=25", "train.eval_batches=20", "train.save_every=1000")
            config = override(config, nested([*keys, *rest, *changes]))
            loop.train(config, folder / f"{kind}-{seed}", resume=True, console=console)


def _bits(model: ChaosTransformer, data: Any, character_noise: float = 0.0, seed: int = 0) -> float:
    """Bits a character on the validation split; with noise, of the second half of rows whose first half has some
    characters replaced by others."""
    rows = data.evaluation("validation", 16)
    generator = torch.Generator().manual_seed(seed)
    total, count = 0.0, 0
    with torch.no_grad():
        for number in range(min(BATCHES, len(rows) - 1)):
            batch = rows[number]
            tokens, half = batch.tokens.clone(), batch.tokens.shape[1] // 2
            hit = torch.rand(tokens.shape, generator=generator) < character_noise
            hit[:, half:] = False
            other = torch.randint(1, data.tokenizer.vocab_size, tokens.shape, generator=generator)
            logits = model(torch.where(hit, other, tokens))[:, half:]
            total += F.cross_entropy(logits.flatten(0, 1), batch.targets[:, half:].flatten(), reduction="sum").item()
            count += batch.targets[:, half:].numel()
    return total / count / math.log(2)


def _at(model: ChaosTransformer, intensity: float, measured: Callable[[], float]) -> float:
    """The mean over draws of the noise."""
    with model.at(intensity):
        found = []
        for draw in range(DRAWS if intensity else 1):
            model.noise.set(1_000_000 + draw, 0)
            found.append(measured())
    return statistics.mean(found)


def _samples(model: ChaosTransformer, tokenizer: Any, temperature: float, intensity: float) -> list[str]:
    """Samples, each three from one draw of the noise."""
    texts = []
    with model.at(intensity):
        for draw in range(SAMPLES // 3):
            model.noise.set(2_000_000 + draw, 0)
            sampling = Sampling(temperature, max_tokens=LENGTH, seed=draw)
            texts += [made.text for made in generate(model, tokenizer, ["\n"] * 3, sampling)]
    return texts


@app.command()
def measure(text: Path, folder: Path) -> None:
    """Write FOLDER/chaos.json and its plot, and print the tables."""
    with open_binary(text) as file:
        whole = file.read().decode()
    known = known_grams(whole[: int(0.9 * len(whole))])
    results: dict[str, Any] = {}
    for kind in KINDS:
        for seed in SEEDS:
            run = runs.load(folder / f"{kind}-{seed}", "chaos", "last")
            model: Any = run.model
            data = loop.prepared(run.system, run.config, run.folder, run.tokenizer)
            found: dict[str, Any] = {
                "weights": {i: _at(model, i, partial(_bits, model, data)) for i in INTENSITIES},
                "characters": {c: _bits(model, data, c, seed=5) for c in CHARACTER_NOISE},
                "intensity": {
                    i: asdict(evaluate_creativity(_samples(model, run.tokenizer, 1.0, i), known)) for i in INTENSITIES
                },
                "temperature": {
                    t: asdict(evaluate_creativity(_samples(model, run.tokenizer, t, 0.0), known)) for t in TEMPERATURES
                },
                "sample": {i: _samples(model, run.tokenizer, 1.0, i)[0] for i in (0.0, 0.1, 0.5)},
            }
            results[f"{kind}-{seed}"] = found
            console.print(f"{kind}-{seed}: {found['weights']}", soft_wrap=True)
    write_atomically(folder / "chaos.json", json.dumps(results, indent=1).encode())
    for line in tables(results):
        console.print(line, soft_wrap=True)
    _plot(results, folder / "chaos.png")


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values):.3f}"


def matched(results: dict[str, Any], kind: str, measure: str, intensity: float) -> list[float]:
    """Of each seed: the measure at an intensity minus that at the temperature with the same entropy, which is read off
    between the temperatures on its two sides; nan beyond them."""
    differences = []
    for seed in SEEDS:
        found = results[f"{kind}-{seed}"]
        noisy = found["intensity"][intensity]
        curve = sorted((row["entropy"], row[measure]) for row in found["temperature"].values())
        between = [(a, b) for a, b in pairwise(curve) if a[0] <= noisy["entropy"] <= b[0]]
        if not between:
            differences.append(math.nan)
            continue
        (low, first), (high, second) = between[0]
        share = (noisy["entropy"] - low) / max(high - low, 1e-12)
        differences.append(noisy[measure] - (first + share * (second - first)))
    return differences


def tables(results: dict[str, Any]) -> Iterator[str]:
    """The tables of docs/chaos.md: mean and standard deviation over the seeds, and paired differences."""
    for what, levels in (("weights", INTENSITIES), ("characters", CHARACTER_NOISE)):
        yield f"\n| noise in {what} | with chaos | without | difference | sign in all seeds |\n|---|---|---|---|---|"
        for level in levels:
            a, b = ([results[f"{kind}-{seed}"][what][level] for seed in SEEDS] for kind in KINDS)
            difference = [x - y for x, y in zip(a, b, strict=True)]
            agree = "yes" if len({d > 0 for d in difference}) == 1 else "no"
            yield f"| {level} | {_spread(a)} | {_spread(b)} | {_spread(difference)} | {agree} |"
    measures = ("entropy", "distinct_1", "distinct_2", "distinct_3", "novelty")
    for kind in KINDS:
        for knob, levels in (("intensity", INTENSITIES), ("temperature", TEMPERATURES)):
            yield f"\n| {kind}: {knob} | " + " | ".join(measures) + " |\n" + "|---" * 6 + "|"
            for level in levels:
                rows = [results[f"{kind}-{seed}"][knob][level] for seed in SEEDS]
                yield f"| {level} | " + " | ".join(_spread([row[m] for row in rows]) for m in measures) + " |"
        yield f"\n| {kind}: intensity minus temperature at equal entropy | distinct_2 | distinct_3 | novelty |"
        yield "|---|---|---|---|"
        for level in INTENSITIES[1:]:
            cells = [matched(results, kind, name, level) for name in ("distinct_2", "distinct_3", "novelty")]
            yield f"| {level} | " + " | ".join(", ".join(f"{d:+.3f}" for d in cell) for cell in cells) + " |"


def _plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4))
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for kind, color in zip(KINDS, ("C0", "C1"), strict=True):
        for seed in SEEDS:
            found = results[f"{kind}-{seed}"]
            label = f"trained {'with' if kind == 'chaos' else 'without'} chaos" if seed == SEEDS[0] else None
            levels = found["weights"]
            left.plot(list(levels), list(levels.values()), "o-", color=color, label=label, alpha=0.7)
            for knob, style in (("intensity", "o-"), ("temperature", "x--")):
                rows = sorted(found[knob].values(), key=lambda row: row["entropy"])
                name = f"{kind}, {knob}" if seed == SEEDS[0] else None
                entropy = [row["entropy"] for row in rows]
                for axes, measured in ((middle, "novelty"), (right, "distinct_3")):
                    axes.plot(entropy, [row[measured] for row in rows], style, color=color, label=name)
    for axes, x, y in (
        (left, "intensity of the noise in the weights", "bits a character, validation"),
        (middle, "entropy of the samples, bits a character", "novelty: share of new 4-grams"),
        (right, "entropy of the samples, bits a character", "distinct-3"),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    write_atomically(path, content.getvalue())


# ---- speed ----------------------------------------------------------------------------------------------------------
def cloned_step(model: ChaosTransformer, intensity: float) -> Callable[[Tensor], Tensor]:
    """The source's algorithm around the same layers: clone each weight, add noise, use, restore."""
    from quaver.pymodels.layers import NoisyLinear

    def forward(layer: Any) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            saved = {}
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    saved[name] = parameter.data.clone()
                    parameter.data.add_(torch.randn_like(parameter) * (intensity * parameter.std().item()))
            try:
                return F.linear(x, layer.weight, layer.bias)
            finally:
                with torch.no_grad():
                    for name, parameter in layer.named_parameters():
                        parameter.data.copy_(saved[name])

        return call

    for module in model.modules():
        if isinstance(module, NoisyLinear):
            module.forward = forward(module)  # type: ignore[method-assign, assignment]
    return model


def stepper(model: ChaosTransformer, call: Callable[[Tensor], Tensor], batch: int) -> Callable[[], float]:
    """A training step of `call`, which computes the model's logits; it returns the loss."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    tokens = torch.randint(config.vocab_size, (batch, config.context + 1), generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    steps = iter(range(10**9))

    def step() -> float:
        model.noise.set(next(steps), 0)
        loss = F.cross_entropy(call(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


@app.command()
def speed(
    threads: Annotated[int, typer.Option(help="of the CPU")] = 1,
    batch: Annotated[int, typer.Option(help="rows of 128 tokens")] = 16,
    rounds: Annotated[int, typer.Option(help="interleaved steps of each")] = 15,
) -> None:
    """Medians of interleaved steps: forward, backward, Adam."""
    torch.set_num_threads(threads)
    console.print(f"{threads} threads, {batch} x 128 tokens")
    console.print("| width | form | step at 0, ms | at 0.3 over at 0 |\n|---|---|---|---|")
    for width in (128, 448):
        config = ChaosConfig(context=128, width=width, hidden=2 * width)
        models = {level: ChaosTransformer(config) for level in (0.0, 0.3)}
        for level, model in models.items():
            model.intensity = level
        cloned = ChaosTransformer(config)
        forms: dict[str, Callable[[], float]] = {f"eager {level}": stepper(m, m, batch) for level, m in models.items()}
        forms["cloned 0.3"] = stepper(cloned, cloned_step(cloned, 0.3), batch)
        for level, model in copy.deepcopy(models).items():
            forms[f"compiled {level}"] = stepper(model, torch.compile(model), batch)
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        for step in forms.values():
            for _ in range(3):
                step()
        for _ in range(rounds):
            for name, step in forms.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, base in (("eager", "eager"), ("compiled", "compiled"), ("cloned", "eager")):
            ratio = medians[f"{name} 0.3"] / medians[f"{base} 0.0"]
            console.print(f"| {width} | {name} | {medians[f'{base} 0.0'] * 1e3:.1f} | {ratio:.2f} |")


@app.command()
def memory(intensity: float, width: int = 448) -> None:
    """Peak memory of five steps beyond the model, MiB; a process for each figure."""
    config = ChaosConfig(context=128, width=width, hidden=2 * width, layers=4)
    model = ChaosTransformer(config)
    model.intensity = intensity
    step = stepper(model, model, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        step()
    console.print(f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.1f} MiB")


if __name__ == "__main__":
    app()
