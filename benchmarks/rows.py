"""The rows of the ops' speed tables as pytest-benchmark parameters; the device is a GPU where there is one."""

import os
from typing import Any

import pytest
import torch

from quaver import timing
from quaver.kernels._cases import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_THREADS = (1,) if DEVICE.type == "cuda" else tuple(sorted({1, os.cpu_count() or 1}))


def variants(op: str) -> list[Any]:
    """One parameter a row, variant and number of threads, grouped so that the variants of a row stand together."""
    return [
        pytest.param(row, name, threads, id=f"{row}-{name}-{threads}t")
        for row in timing.rows(op)
        for threads in _THREADS
        for name in row.names
    ]


def time_variant(row: Row, variant: str, threads: int, benchmark: Any) -> None:
    """Time one variant, after quaver's result was checked against the reference."""
    benchmark.group = f"{row}, {threads} threads, {DEVICE.type}"
    benchmark.extra_info.update(row=row.name, size=row.size, variant=variant, threads=threads, elements=row.elements)
    with timing.pinned_threads(threads), torch.no_grad():
        if variant == "quaver":
            row.check(DEVICE)
        call = row.variants(DEVICE)[variant]

        def synchronized() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        synchronized()
        benchmark.pedantic(synchronized, rounds=20, iterations=1, warmup_rounds=2)
