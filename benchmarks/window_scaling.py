"""Time of njx_attention in the number of tokens T, its stages apart, against the predicted parts in T and in T^2.

python benchmarks/window_scaling.py [--plot FILE.png] [--window 16] [--width 64] [--heads 2] [--threads 1]

The prediction has two constants, each measured once: seconds a token of the windows' pass (at T = 4,096) and seconds a
pair of windows of the exchange (at 1,024 windows). They foretell the whole: T * a + (T / window)^2 * b. Medians of
rounds in which the calls take turns.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quaver import njx_attention, timing, window_attention, window_exchange
from quaver.pymodels.files import write_atomically

LENGTHS = tuple(2**power for power in range(10, 17))
_TOKENS, _WINDOWS = 4096, 1024  # where the two constants are measured


class Point(NamedTuple):
    """Seconds at one T: the whole op, its windows with their summaries, its exchange."""

    whole: float
    windows: float
    exchange: float


def _leaves(length: int, window: int, width: int, heads: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = (normal(1, length, heads, width).transpose(1, 2) for _ in range(3))
    return {
        "q": q,
        "k": k,
        "v": v,
        "select": normal(1, heads, length),
        "gate": normal(heads),
        "z": normal(1, heads, length // window, width) * width**-0.5,
    }


def _calls(length: int, window: int, width: int, heads: int, training: bool) -> tuple[Callable[[], object], ...]:
    """The three calls of a Point."""
    x = _leaves(length, window, width, heads)

    def whole(of: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (njx_attention(of["q"], of["k"], of["v"], of["select"], window, gate=of["gate"]),)

    def windows(of: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(window_attention(of["q"], of["k"], of["v"], window, select=of["select"]))

    def exchange(of: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (window_exchange(of["z"]),)

    def call(function: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], *names: str) -> Callable[[], object]:
        grads = [torch.ones_like(out) for out in function(x)]

        def run() -> object:
            if not training:
                with torch.no_grad():
                    return function(x)
            leaves = x | {name: x[name].detach().requires_grad_() for name in names}
            return torch.autograd.grad(function(leaves), [leaves[name] for name in names], grads)

        return run

    return (
        call(whole, "q", "k", "v", "select", "gate"),
        call(windows, "q", "k", "v", "select"),
        call(exchange, "z"),
    )


def measure(length: int, window: int, width: int, heads: int, training: bool) -> Point:
    """Medians of the three calls at one T."""
    calls = dict(zip(Point._fields, _calls(length, window, width, heads, training), strict=True))
    return Point(**timing.medians(calls))


def predict(points: dict[int, Point], window: int) -> dict[int, tuple[float, float]]:
    """The parts in T and in T^2 for each T, from one point each."""
    token = points[_TOKENS].windows / _TOKENS
    pair = points[_WINDOWS * window].exchange / _WINDOWS**2
    return {length: (length * token, (length / window) ** 2 * pair) for length in points}


def plot(results: dict[str, dict[int, Point]], window: int, title: str, path: Path) -> None:
    """A panel a pass: measured points, predicted lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, points) in zip(figure.subplots(1, 2, sharey=True), results.items(), strict=True):
        lengths = list(points)
        parts = predict(points, window)
        for field, marker in zip(Point._fields, "os^", strict=True):
            milliseconds = [getattr(points[length], field) * 1e3 for length in lengths]
            axes.plot(lengths, milliseconds, marker, label=f"{field}, measured")
        axes.plot(lengths, [sum(parts[length]) * 1e3 for length in lengths], "C0-", label="predicted")
        axes.plot(lengths, [parts[length][0] * 1e3 for length in lengths], "C1--", label="its part in T")
        axes.plot(lengths, [parts[length][1] * 1e3 for length in lengths], "C2--", label="its part in T²")
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=name)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def main(
    plot_file: Annotated[Path | None, typer.Option("--plot", help="write a plot here")] = None,
    window: int = 16,
    width: int = 64,
    heads: int = 2,
    threads: int = 1,
) -> None:
    """Measure, print and plot."""
    results = {}
    with timing.pinned_threads(threads):
        for name, training in {"forward": False, "forward and backward": True}.items():
            points = results[name] = {length: measure(length, window, width, heads, training) for length in LENGTHS}
            made = Table("T", "ms", "windows", "exchange", "rest", "predicted", "measured / predicted", title=name)
            for length, parts in predict(points, window).items():
                whole, windows, exchange = points[length]
                made.add_row(
                    f"{length:,}",
                    f"{whole * 1e3:.2f}",
                    f"{windows / whole:.0%}",
                    f"{exchange / whole:.0%}",
                    f"{(whole - windows - exchange) / whole:.0%}",
                    f"{sum(parts) * 1e3:.2f}",
                    f"{whole / sum(parts):.2f}",
                )
            Console().print(made)
    if plot_file is not None:
        plot(results, window, f"njx_attention, {heads} heads, w {window}, d {width}, {threads} thread(s)", plot_file)


if __name__ == "__main__":
    typer.run(main)
