"""spectral_linear and the ops beside it on a GPU against their references on the CPU: `pytest -m gpu`."""

import op_checks
import pytest
import torch
from op_checks import DTYPES

from quaver.kernels import delta_linear, spectral_coefficients, spectral_delta, spectral_linear, use_backend
from quaver.kernels._cases import Case, values
from quaver.kernels.spectral_linear import op
from quaver.kernels.spectral_linear.cases import CASES

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
backends = pytest.mark.parametrize("backend", sorted(set(op._families) - {"cpp"}))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
cases = pytest.mark.parametrize("case", CASES, ids=str)


@backends
@dtypes
@cases
def test_result_is_as_accurate_as_eager(case: Case, dtype: torch.dtype, backend: str) -> None:
    op_checks.assert_result_as_accurate_as_eager(case, dtype, backend, GPU)


@backends
@dtypes
@cases
def test_gradients_are_as_accurate_as_eager(case: Case, dtype: torch.dtype, backend: str) -> None:
    op_checks.assert_gradients_as_accurate_as_eager(case, dtype, backend, device=GPU)


@backends
@pytest.mark.parametrize("order", ["token", "delta"])
def test_a_graph_replays_the_same_bits(order: str, backend: str) -> None:
    """No call synchronizes, and sums are in a fixed order: a layer of the geometric Llama, one that shares Delta."""
    x, weight = values((4, 64, 448), torch.bfloat16, GPU, 1), values((448, 448), torch.bfloat16, GPU, 2) * 448**-0.5
    down, up = (values(shape, torch.bfloat16, GPU, 3) for shape in ((128, 12, 448), (128, 448, 12)))
    theta, directions = values((4, 1024), torch.float32, GPU, 4), values((64, 1024), torch.float32, GPU, 5)

    def call() -> torch.Tensor:
        coefficients = spectral_coefficients(theta, directions)
        first = spectral_linear(x, weight, None, down, up * 0.01, coefficients, order=order)
        delta = spectral_delta(down, up * 0.01, coefficients)
        return first + delta_linear(x, weight, None, delta)

    with use_backend(backend):
        expected = call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        for _ in range(2):
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, expected)
