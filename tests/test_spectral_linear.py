"""spectral_linear, spectral_delta, delta_linear and spectral_coefficients on the CPU against their references."""

import random
from typing import Any

import pytest
import torch
from op_checks import (
    DTYPES,
    LEVELS,
    assert_compiles,
    assert_gradients,
    assert_gradients_as_accurate_as_eager,
    assert_only,
    assert_result_as_accurate_as_eager,
    dispatched,
    gradients,
    poisoned_memory,
    run,
)
from torch import Tensor

from quaver import timing
from quaver.kernels import (
    _library,
    delta_linear,
    spectral_coefficients,
    spectral_delta,
    spectral_linear,
    use_backend,
)
from quaver.kernels._cases import Case, values
from quaver.kernels.spectral_linear import reference
from quaver.kernels.spectral_linear.cases import CASES, linear_case
from quaver.kernels.spectral_linear.tuning import backward_by_delta, forward_by_delta

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}
SOME = [
    BY_NAME[name]
    for name in (
        *("token", "delta-panels", "delta-deep", "by-tokens", "swapped", "decode-some", "decode-adjacent"),
        *("master-delta", "Delta", "delta_linear", "coefficients-by-tokens"),
    )
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
some = pytest.mark.parametrize("case", SOME, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@cases
@dtypes
def test_result_is_as_accurate_as_eager_at_every_simd_level(case: Case, dtype: torch.dtype) -> None:
    for level in LEVELS:
        with _library.capped_simd(level):
            assert_result_as_accurate_as_eager(case, dtype)


@cases
@dtypes
def test_gradients_are_as_accurate_as_eager(case: Case, dtype: torch.dtype) -> None:
    assert_gradients_as_accurate_as_eager(case, dtype)


@pytest.mark.parametrize("level", LEVELS[:-1])
@some
@dtypes
def test_gradients_at_every_simd_level(case: Case, dtype: torch.dtype, level: str) -> None:
    with _library.capped_simd(level):
        assert_gradients_as_accurate_as_eager(case, dtype)


@cases
def test_everything_is_written(case: Case) -> None:
    expected = run(case, torch.float32), *gradients(case, torch.float32, "cpp")
    with poisoned_memory():
        found = run(case, torch.float32), *gradients(case, torch.float32, "cpp")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in ("large", "delta-very-deep", "token-deep")], ids=str
)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    assert_gradients(case, "cpp")
