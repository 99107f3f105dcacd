"""A table and a plot from the JSON that `quaver bench --json FILE` writes.

python benchmarks/report.py FILE [--plot FILE.png]
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from quaver.plot import plot_ratios


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


def main(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    plot_file: Annotated[Path | None, typer.Option("--plot", help="write a plot here")] = None,
) -> None:
    """Show the medians of a run of `quaver bench`."""
    content = json.loads(file.read_text())
    Console().print(table(content))
    if plot_file is not None:
        plot_ratios(content, plot_file)


if __name__ == "__main__":
    typer.run(main)
