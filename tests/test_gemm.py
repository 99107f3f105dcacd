"""The GEMM of the CPU kernels by itself: every form, layout, dtype and instruction set."""

import op_checks
import pytest
import torch
from op_checks import CPU, DTYPES, LEVELS

from quaver.kernels import _library
from quaver.kernels._cases import values
from quaver.kernels._gemm import gemm

# Rows, columns, depth: few rows and many, ragged in every direction, one and several blocks of depth, several
# super-blocks, sizes whose rows are a multiple of 4 KiB apart.
SIZES = [
    (1, 1, 1),
    (0, 3, 4),
    (3, 0, 4),
    (3, 4, 0),
    (5, 7, 2),
    (6, 16, 16),
    (7, 17, 33),
    (17, 33, 34),
    (33, 31, 65),
    (48, 50, 129),
    (49, 100, 257),
    (100, 130, 600),
    (30, 2100, 40),
    (60, 200, 1024),
    (97, 193, 1500),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, depth = size
    a, b = values((rows, depth), dtype, CPU, 1), values((depth, columns), dtype, CPU, 2)
    exact = a.double() @ b.double()
    unit = torch.finfo(dtype).eps if dtype in (torch.float64, torch.float32) else torch.finfo(torch.float32).eps
    # Sums of float32 in blocks: far below sqrt(depth) roundings of the sum of magnitudes; then one of the dtype.
    magnitude = a.double().abs() @ b.double().abs()
    allowed = 4 * unit * magnitude + torch.finfo(dtype).eps * exact.abs()
    for level in LEVELS:
        with _library.capped_simd(level):
            for left in (
                a,
                a.t().contiguous().t(),
                a.repeat(1, 2)[:, :depth],
                a.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
            ):
                for right in (b, b.t().contiguous().t(), b.repeat(1, 2)[:, :columns]):
                    with op_checks.poisoned_memory():
                        got = gemm(left, right)
                    assert got.dtype == dtype
                    assert got.is_contiguous()
                    assert ((got.double() - exact).abs() <= allowed).all(), level


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_on_the_rows_beside_them(dtype: torch.dtype) -> None:
    a, b = values((210, 700), dtype, CPU, 1), values((700, 260), dtype, CPU, 2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(gemm(a, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    for rows in (1, 6, 13, 48, 60, 100):
        assert torch.equal(gemm(a[:rows], b), results[0][:rows])


def test_a_deep_product_of_16_bits_is_refused() -> None:
    with pytest.raises(RuntimeError, match="quaver: a narrowed result of depth 4097"):
        gemm(torch.zeros(2, 4097, dtype=torch.bfloat16), torch.zeros(4097, 2, dtype=torch.bfloat16))


def test_shapes_are_checked() -> None:
    with pytest.raises(RuntimeError, match=r"quaver: expected \[M, K\] and \[K, N\]"):
        gemm(torch.zeros(2, 3), torch.zeros(4, 2))
    with pytest.raises(RuntimeError, match="quaver: expected one dtype"):
        gemm(torch.zeros(2, 3), torch.zeros(3, 2).double())
