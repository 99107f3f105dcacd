"""metrics.csv: one row a number, in a form that a resumed run continues."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from ..files import write_atomically

HEADER = ["step", "name", "value"]


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """name -> [(step, value)] of a metrics.csv; a last row that a kill cut short is left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]
    for row in csv.reader(lines[1:]):
        found.setdefault(row[1], []).append((int(row[0]), float(row[2])))
    return found


class CSVMetrics(Logger):
    """A Lightning logger that appends rows of step, name and value.

    Args:
        path: of the file.
        first: the step that the run goes on from: later rows are of steps that will be done again, and are removed.
    """

    def __init__(self, path: Path, first: int) -> None:
        super().__init__()
        self.path = path
        rows: list[tuple[int, str, float]] = []
        if first and path.exists():
            found = read_metrics(path)
            rows = [(step, name, value) for name, points in found.items() for step, value in points if step <= first]
            rows.sort(key=lambda row: row[0])
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows((step, name, repr(value)) for step, name, value in rows)
        write_atomically(path, text.getvalue().encode())

    @property
    def name(self) -> str:
        """Of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Of the run: it has one folder."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run's folder has them in config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row for each."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(
                (step, name, repr(value)) for name, value in metrics.items()
            )
