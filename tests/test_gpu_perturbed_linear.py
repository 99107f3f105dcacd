"""perturbed_linear on a GPU: every case on CUDA C++ and on Triton, gradients, the same noise as the CPU's, graphs."""

import op_checks
import pytest
import torch
from op_checks import CPU, DTYPES

import quaver
from quaver.kernels import use_backend
from quaver.kernels._cases import Case, values
from quaver.kernels.perturbed_linear.cases import CASES

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
BY_NAME = {case.name: case for case in CASES}
backends = pytest.mark.parametrize("backend", ["cuda", "triton"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _products_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own products, where a form uses them, round float32 once: no TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@backends
@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_as_accurate_as_eager(case: Case, dtype: torch.dtype, backend: str) -> None:
    op_checks.assert_result_as_accurate_as_eager(case, dtype, backend, GPU)
    op_checks.assert_gradients_as_accurate_as_eager(case, dtype, backend, (3, 4), GPU)


@backends
@pytest.mark.parametrize("rows", [1, 7, 16, 40, 100, 300, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_layers_of_real_size(distribution: str, dtype: torch.dtype, rows: int, backend: str) -> None:
    """768 x 1024, forward and backward, against float64 on the GPU; each form of few and of many rows."""
    weight, bias = values((768, 1024), dtype, GPU), values((768,), dtype, GPU, 1)
    x, grad = values((rows, 1024), dtype, GPU, 2), values((rows, 768), dtype, GPU, 3)
    sigma = torch.tensor(0.3, device=GPU)

    def results(name: str, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(kind).requires_grad_() for tensor in (x, weight, bias)]
        wide = torch.float64 if kind == torch.float64 else torch.float32
        with use_backend(name):
            sigmas = sigma.to(wide)
            y = quaver.perturbed_linear(*leaves, sigma=sigmas, bias_sigma=sigmas, seed=9, distribution=distribution)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(kind))]

    exact = results("reference", torch.float64)
    for ours, theirs, wide in zip(results(backend, dtype), results("reference", dtype), exact, strict=True):
        error, theirs_error = ((part.double() - wide).abs().max() for part in (ours, theirs))
        assert error <= 2 * theirs_error + torch.finfo(dtype).eps * wide.abs().max()


@backends
@dtypes
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("columns", [136, 133])
def test_the_weights_are_those_of_the_cpu_to_the_bit(
    columns: int, distribution: str, dtype: torch.dtype, backend: str
) -> None:
    """Products with a unit matrix show the weights themselves."""
    weight = values((70, columns), dtype, CPU)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    place = {"seed": 5, "stream": 2, "distribution": distribution}
    expected = quaver.perturb(weight.to(wide), 0.3, **place).to(dtype)
    for part in (torch.eye(columns, dtype=dtype), torch.eye(columns, dtype=dtype)[:11]):
        with use_backend(backend):
            got = quaver.perturbed_linear(part.to(GPU), weight.to(GPU), sigma=0.3, **place)
        assert torch.equal(got.t().cpu(), expected[:, : part.shape[0]])


@backends
@pytest.mark.parametrize("name", ["few-rows", "shard", "population-shared", "population-few", "population-of-sigma"])
def test_gradcheck(name: str, backend: str) -> None:
    op_checks.assert_gradients(BY_NAME[name], backend, GPU)


@backends
@pytest.mark.parametrize("rows", [4, 300])
def test_same_bits_again_without_synchronizing(rows: int, backend: str) -> None:
    weight, bias = (values(shape, torch.bfloat16, GPU).requires_grad_() for shape in ((520, 776), (520,)))
    x, sigma = values((rows, 776), torch.bfloat16, GPU).requires_grad_(), torch.tensor(0.1, device=GPU)
    seed = torch.tensor(3, device=GPU)

    def step() -> list[torch.Tensor]:
        with use_backend(backend):
            y = quaver.perturbed_linear(x, weight, bias, sigma=sigma, bias_sigma=sigma, seed=seed)
        return [y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))]

    first = step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@backends
@pytest.mark.parametrize("rows", [4, 300])
def test_a_graph_with_a_counter_on_the_device(rows: int, backend: str) -> None:
    weight, x = values((136, 200), torch.float32, GPU), values((rows, 200), torch.float32, GPU)
    seed = torch.tensor(100, device=GPU)
    with use_backend(backend):
        quaver.perturbed_linear(x, weight, sigma=0.1, seed=seed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = quaver.perturbed_linear(x, weight, sigma=0.1, seed=seed)
            seed.add_(1)
        for step in range(3):
            graph.replay()
            assert torch.equal(out, quaver.perturbed_linear(x, weight, sigma=0.1, seed=100 + step))


@backends
def test_compiles_to_one_graph(backend: str) -> None:
    layer = quaver.kernels.PerturbedLinear(96, 64, intensity=0.2, device=GPU)
    x = values((40, 96), torch.float32, GPU)
    with use_backend(backend):
        compiled = torch.compile(layer, fullgraph=True)
        for step in range(2):
            layer.seed = torch.tensor(step, device=GPU)
            torch.testing.assert_close(compiled(x), layer(x))
