"""The speed table of spectral_linear: pytest benchmarks/bench_spectral_linear.py --benchmark-enable"""

import pytest
from rows import time_variant, variants

from quaver.kernels._cases import Row


@pytest.mark.parametrize("row, variant, threads", variants("spectral_linear"))
def bench(row: Row, variant: str, threads: int, benchmark: object) -> None:
    time_variant(row, variant, threads, benchmark)
