"""The speed table of perturbed_linear under pytest-benchmark: pytest benchmarks/bench_perturbed_linear.py"""

import pytest
from rows import time_variant, variants

from quaver.kernels._cases import Row


@pytest.mark.parametrize("row, variant, threads", variants("perturbed_linear"))
def bench(row: Row, variant: str, threads: int, benchmark: object) -> None:
    time_variant(row, variant, threads, benchmark)
