"""The speed of the GEMM against MKL and oneDNN under pytest-benchmark: pytest benchmarks/bench_gemm.py"""

import pytest
from rows import time_variant, variants

from quaver.kernels._cases import Row


@pytest.mark.parametrize("row, variant, threads", variants("gemm"))
def bench(row: Row, variant: str, threads: int, benchmark: object) -> None:
    time_variant(row, variant, threads, benchmark)
