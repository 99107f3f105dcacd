"""A table and a plot from the JSON that `quaver bench --json FILE` writes.

python benchmarks/report.py FILE [--plot FILE.png]
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def table(content: dict) -> Table:
    """One line a row and number of threads: quaver's time, and how many times as fast as each alternative it is."""
    made = Table(
        "op", "size", "threads", "ms", "times the speed of", title=f"{content['cpu']}, torch {content['torch']}"
    )
    for row in content["rows"]:
        seconds = dict(row["seconds"])
        ours = seconds.pop("quaver")
        ratios = ", ".join(f"{theirs / ours:.2f} {name}" for name, theirs in seconds.items())
        made.add_row(row["row"], row["size"], str(row["threads"]), f"{ours * 1e3:.3f}", ratios)
    return made


def plot(content: dict, path: Path) -> None:
    """Bars of the ratios, on a logarithmic axis; needs matplotlib."""
    import matplotlib.pyplot as plt

    bars = []
    for row in content["rows"]:
        ours = row["seconds"]["quaver"]
        label = f"{row['row']} {row['size']}, {row['threads']}t"
        bars += [
            (f"{label} / {name}", s / ours) for name, s in row["seconds"].items() if name not in ("quaver", "copy_")
        ]
    figure, axes = plt.subplots(figsize=(8, 0.25 * len(bars) + 1))
    axes.barh([name for name, _ in bars][::-1], [ratio for _, ratio in bars][::-1])
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as")
    figure.tight_layout()
    figure.savefig(path)


def main(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    plot_file: Annotated[Path | None, typer.Option("--plot", help="write a plot here")] = None,
) -> None:
    """Show the medians of a run of `quaver bench`."""
    content = json.loads(file.read_text())
    Console().print(table(content))
    if plot_file is not None:
        plot(content, plot_file)


if __name__ == "__main__":
    typer.run(main)
