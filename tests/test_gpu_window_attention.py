"""window_attention, window_exchange and njx_attention on a GPU against their references on the CPU: `pytest -m gpu`."""

import op_checks
import pytest
import torch
from op_checks import DTYPES

from quaver.kernels import njx_attention, use_backend
from quaver.kernels._cases import Case, values
from quaver.kernels.window_attention import op as op_module
from quaver.kernels.window_attention.cases import CASES
from quaver.kernels.window_attention.tuning import cuda_width

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
backends = pytest.mark.parametrize("backend", sorted(set(op_module._families) - {"cpp"}))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
cases = pytest.mark.parametrize("case", CASES, ids=str)


def _skip_what_is_too_wide(case: Case, dtype: torch.dtype, backend: str) -> None:
    inputs = case.inputs(dtype, op_checks.CPU)
    width = inputs.get("q", inputs.get("summary")).shape[-1]
    if backend == "cuda" and width > cuda_width(dtype):
        pytest.skip(f"heads of {width} in {dtype} are the reference's")


@backends
@dtypes
@cases
def test_result_is_as_accurate_as_eager(case: Case, dtype: torch.dtype, backend: str) -> None:
    _skip_what_is_too_wide(case, dtype, backend)
    packed = Case(case.name, lambda **inputs: case.function(**inputs).contiguous(), case.inputs, exact=False)
    op_checks.assert_result_as_accurate_as_eager(packed, dtype, backend, GPU)


@backends
@dtypes
@cases
def test_gradients_are_as_accurate_as_eager(case: Case, dtype: torch.dtype, backend: str) -> None:
    _skip_what_is_too_wide(case, dtype, backend)
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
