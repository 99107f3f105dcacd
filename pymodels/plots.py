"""The curves of runs as a PNG; needs matplotlib."""

import io
from collections.abc import Sequence
from pathlib import Path

from .errors import InputError
from .files import write_atomically
from .runs import load_config
from .systems import find
from .training.logs import read_metrics

#: Panels that every run has: title, label of the y axis, logarithmic?, metrics with their line styles.
_PANELS = (
    ("loss", "nats a token", False, (("train/loss", "-"), ("validation/loss", "o-"))),
    ("validation perplexity", "a token", True, (("validation/perplexity", "o-"),)),
    ("next-token accuracy", "share", False, (("validation/accuracy", "o-"),)),
    ("gradient norm", "", True, (("train/gradient_norm", "-"),)),
    ("learning rate", "", False, (("train/lr", "-"),)),
    ("speed", "tokens/s", False, (("train/tokens_per_second", "-"),)),
)


def plot_runs(folders: Sequence[Path], path: Path) -> None:
    """Draw the metrics of runs, a colour each: losses, perplexity, accuracy, gradient, rate, speed, and whatever else
    they have logged.

    Args:
        folders: of runs.
        path: of the PNG, which is written whole or not at all.

    Raises:
        InputError: for a folder without metrics, or without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("plot: matplotlib is not installed: pip install matplotlib") from None
    runs, beside = {}, {}
    for folder in folders:
        if not (folder / "metrics.csv").is_file():
            raise InputError(f"{folder}: there is no metrics.csv in this folder: no run, or none that has begun")
        runs[str(folder)] = read_metrics(folder / "metrics.csv")
        beside[str(folder)] = find(load_config(folder).system).beside_loss
        if not runs[str(folder)]:
            raise InputError(f"{folder}: nothing has been logged yet")
    usual = {name for panel in _PANELS for name, _ in panel[3]}
    hidden = {"validation/tokens_per_second", "validation/word_perplexity", "validation/bits_per_character"}
    others = sorted({name for metrics in runs.values() for name in metrics} - usual - hidden - set(beside.values()))
    panels = [*_PANELS, *((name, "", False, ((name, "-"),)) for name in others)]
    panels = [panel for panel in panels if any(name in metrics for metrics in runs.values() for name, _ in panel[3])]
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5 * across, 3.4 * down + 0.5))
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, label, logarithmic, lines) in zip(grid.flat, panels, strict=False):
        for number, (run, metrics) in enumerate(runs.items()):
            for name, style in lines:
                if name in metrics:
                    what = f"{run} {name.split('/')[0]}" if len(lines) > 1 else run
                    faint = 0.5 if name == "train/loss" else 1.0
                    axes.plot(
                        *zip(*metrics[name], strict=True),
                        style,
                        color=f"C{number % 10}",
                        alpha=faint,
                        markersize=3,
                        linewidth=1,
                        label=what,
                    )
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if logarithmic:
            axes.set_yscale("log")
    grid.flat[0].legend(fontsize="x-small")
    drawn = [(run, name) for run, name in beside.items() if name in runs[run]]
    if drawn:
        axes = grid.flat[0].twinx()
        axes.set_ylabel(drawn[0][1].removeprefix("train/"))
        for run, name in drawn:
            color = f"C{list(runs).index(run) % 10}"
            axes.plot(*zip(*runs[run][name], strict=True), ":", color=color, linewidth=1.5)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    write_atomically(path, content.getvalue())
