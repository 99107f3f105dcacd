"""Plots of what `quaver bench` measured; needs matplotlib."""

import os
from pathlib import Path
from typing import Any


def plot_ratios(content: dict[str, Any], path: Path) -> None:
    """Write a PNG of how many times as fast as each alternative quaver is: a panel a table and number of threads.

    Args:
        content: what `quaver bench --json` writes.
        path: of the PNG, which is written whole or not at all.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        panels.setdefault((row["row"], row["threads"]), []).append(row)
    names = list(dict.fromkeys(name for row in content["rows"] for name in row["seconds"] if name != "quaver"))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    longest = max(len(rows) for rows in panels.values())
    figure = Figure(figsize=(7.5 * across, (0.27 * longest + 1.4) * down))
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((row_name, threads), rows) in zip(grid.flat, panels.items(), strict=False):
        for at, name in enumerate(names):
            points = [
                (row["seconds"][name] / row["seconds"]["quaver"], -place)
                for place, row in enumerate(rows)
                if name in row["seconds"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), "osv^Dd<>Ph"[at % 10], label=name, color=f"C{at}", alpha=0.8)
        axes.set_yticks([-place for place in range(len(rows))], [row["size"] for row in rows])
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set_title(f"{row_name}, {threads} thread{'s' if threads > 1 else ''}")
        axes.set_xlabel("times as fast as")
        axes.legend(fontsize="x-small")
    figure.suptitle(f"quaver on {content['cpu']}, {content['device']}, torch {content['torch']}", fontsize="medium")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=110)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
