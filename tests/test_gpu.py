"""On a GPU: every case on CUDA C++ and on Triton, gradients, no synchronization, capture in a graph."""

import op_checks
import pytest
import torch
from op_checks import DTYPES

import quaver
from quaver.kernels import use_backend
from quaver.kernels._cases import Case, values
from quaver.kernels.dropout.cases import CASES as DROPOUT
from quaver.kernels.perturb.cases import CASES as PERTURB
from quaver.kernels.philox.cases import CASES as PHILOX

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
backends = pytest.mark.parametrize("backend", ["cuda", "triton"])


@backends
@pytest.mark.parametrize(
    "case", [*PHILOX, *DROPOUT, *PERTURB], ids=lambda case: f"{case.function.__name__}-{case.name}"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(case: Case, dtype: torch.dtype, backend: str) -> None:
    op_checks.assert_equals_reference(case, dtype, backend, GPU)
    if case.exact:
        on_cpu = op_checks.run(case, dtype, "reference")
        assert torch.equal(op_checks.run(case, dtype, backend, GPU).cpu(), on_cpu)


@backends
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_many_blocks(backend: str, distribution: str) -> None:
    weight = values((1000, 4099), torch.float32, GPU)
    expected = quaver.perturb(weight.cpu(), 0.3, 5, distribution=distribution)
    with use_backend(backend):
        assert torch.equal(quaver.perturb(weight, 0.3, 5, distribution=distribution).cpu(), expected)


@backends
@pytest.mark.parametrize("shape", [(), (37, 1), (37, 53), (3, 37, 1)], ids=str)
def test_gradients(backend: str, shape: tuple[int, ...]) -> None:
    weight = values((37, 53), torch.float64, GPU).requires_grad_()
    sigma = values(shape, torch.float64, GPU, seed=1).requires_grad_()
    seed = torch.arange(3, device=GPU) if len(shape) == 3 else 4

    def function(w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return quaver.perturb(w, s, seed)

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, (weight, sigma), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (weight, sigma), fast_mode=True)
        assert torch.autograd.gradcheck(quaver.weight_scale, (weight,), fast_mode=True)


@backends
def test_neither_synchronizes_nor_reads_the_device(backend: str) -> None:
    weight, sigma = values((64, 64), torch.float32, GPU), torch.tensor(0.1, device=GPU)
    seed = torch.tensor(3, device=GPU)
    with use_backend(backend):
        quaver.perturb(weight, sigma, seed)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            quaver.perturb(weight, sigma, seed)
            quaver.dropout(weight, 0.1, seed)
            quaver.weight_scale(weight)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@backends
def test_a_graph_with_a_counter_on_the_device(backend: str) -> None:
    weight, seed = values((64, 65), torch.float32, GPU), torch.tensor(100, device=GPU)
    with use_backend(backend):
        quaver.perturb(weight, 0.1, seed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = quaver.perturb(weight, 0.1, seed)
            seed.add_(1)
        for step in range(3):
            graph.replay()
            assert torch.equal(out, quaver.perturb(weight, 0.1, 100 + step))
