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
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

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
    handles: dict[str, Any] = {}
    for axes, ((row_name, threads), rows) in zip(grid.flat, panels.items(), strict=False):
        for at, name in enumerate(names):
            points = [
                (row["seconds"][name] / row["seconds"]["quaver"], -place)
                for place, row in enumerate(rows)
                if name in row["seconds"]
            ]
            if points:
                style = {"marker": "osv^Dd<>Ph"[at % 10], "color": f"C{at % 10}", "alpha": 0.8, "linestyle": "none"}
                (handles[name],) = axes.plot(*zip(*points, strict=True), **style)
        axes.set_yticks([-place for place in range(len(rows))], [row["size"] for row in rows])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axvline(1, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set_title(f"{row_name}, {threads} thread{'s' if threads > 1 else ''}")
        axes.set_xlabel("times as fast as")
    title = f"quaver on {content['cpu']}, {content['device']}, torch {content['torch']}"
    figure.legend(handles.values(), handles.keys(), title=title, loc="upper center", ncols=3, fontsize="small")
    # Room for the legend, whose height is in inches.
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.5 + 0.25 * -(-len(handles) // 3)) / figure.get_figheight()))
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=80)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
