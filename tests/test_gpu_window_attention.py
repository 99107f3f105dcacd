"""window_attention, window_exchange and njx_attention on a GPU against their references on the CPU: `pytest -m gpu`."""

from itertools import product

import op_checks
import pytest
import torch
from op_checks import DTYPES
from test_cuda_window_attention import fits

from quaver.kernels import njx_attention, use_backend
from quaver.kernels._cases import Case, values
from quaver.kernels.window_attention import op as op_module
from quaver.kernels.window_attention.cases import CASES

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
BACKENDS = sorted(set(op_module._families) - {"cpp"})
backends = pytest.mark.parametrize("backend", BACKENDS)
#: Wider heads than CUDA C++ takes are another backend's.
calls = pytest.mark.parametrize(
    "case, dtype, backend",
    [
        pytest.param(case, dtype, backend, id=f"{case}-{dtype}-{backend}".replace("torch.", ""))
        for case, dtype, backend in product(CASES, DTYPES, BACKENDS)
        if backend != "cuda" or fits(case, dtype)
    ],
)


@calls
def test_result_is_as_accurate_as_eager(case: Case, dtype: torch.dtype, backend: str) -> None:
    packed = Case(case.name, lambda **inputs: case.function(**inputs).contiguous(), case.inputs, exact=False)
    op_checks.assert_result_as_accurate_as_eager(packed, dtype, backend, GPU)


@calls
def test_gradients_are_as_accurate_as_eager(case: Case, dtype: torch.dtype, backend: str) -> None:
    op_checks.assert_gradients_as_accurate_as_eager(case, dtype, backend, device=GPU)


@backends
def test_a_graph_replays_the_same_bits(backend: str) -> None:
    """No call synchronizes, and sums are in a fixed order."""
    q, k, v = (values((2, 512, 4, 64), torch.bfloat16, GPU, seed).transpose(1, 2) for seed in (1, 2, 3))
    select, gate = values((2, 4, 512), torch.float32, GPU, 4), values((4,), torch.float32, GPU, 5)

    def call() -> torch.Tensor:
        return njx_attention(q, k, v, select, 16, gate=gate, exchange_fraction=0.5, causal=True)

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
