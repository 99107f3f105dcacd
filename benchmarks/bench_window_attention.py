"""The speed table of window attention: pytest benchmarks/bench_window_attention.py --benchmark-enable"""

import pytest
from rows import time_variant, variants

from quaver.kernels._cases import Row


@pytest.mark.parametrize("row, variant, threads", variants("window_attention"))
def bench(row: Row, variant: str, threads: int, benchmark: object) -> None:
    time_variant(row, variant, threads, benchmark)
