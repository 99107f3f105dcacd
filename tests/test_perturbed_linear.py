"""perturbed_linear: the table of checks, on C++."""

from typing import Any

import op_checks
import pytest
import torch
import torch._dynamo.testing
from op_checks import CPU, DTYPES, LEVELS
from torch import Tensor
from torch.library import opcheck

import quaver
from quaver.kernels import _library, use_backend
from quaver.kernels._cases import Case, values
from quaver.kernels.perturbed_linear.arguments import checked
from quaver.kernels.perturbed_linear.cases import CASES

BY_NAME = {case.name: case for case in CASES}
# A numerical derivative needs values and results near 1.
DIFFERENTIABLE = [case for case in CASES if case.name not in ("large", "population-of-none")]
cases = pytest.mark.parametrize("case", CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@cases
@dtypes
def test_is_as_accurate_as_eager_at_every_simd_level(case: Case, dtype: torch.dtype) -> None:
    for level in LEVELS:
        with _library.capped_simd(level):
            op_checks.assert_result_as_accurate_as_eager(case, dtype)


@cases
@dtypes
def test_gradients_are_as_accurate_as_eager(case: Case, dtype: torch.dtype) -> None:
    op_checks.assert_gradients_as_accurate_as_eager(case, dtype)


@pytest.mark.slow
@cases
@dtypes
def test_gradients_at_every_simd_level(case: Case, dtype: torch.dtype) -> None:
    for level in LEVELS[:-1]:
        with _library.capped_simd(level):
            op_checks.assert_gradients_as_accurate_as_eager(case, dtype)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    op_checks.assert_gradients(case, "cpp")


@cases
def test_everything_is_written(case: Case) -> None:
    expected = op_checks.run(case, torch.float32), *op_checks.gradients(case, torch.float32, "cpp")
    with op_checks.poisoned_memory():
        found = op_checks.run(case, torch.float32), *op_checks.gradients(case, torch.float32, "cpp")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [16, 48, 640])
@dtypes
def test_the_weights_are_those_of_perturb_to_the_bit(dtype: torch.dtype, rows: int, level: str) -> None:
    """Products with a unit matrix show the weights themselves: in dot products, packed by threads, packed by all."""
    columns = rows
    unit = torch.eye(rows, dtype=dtype)
    for shape, place in (
        ((37, columns), {}),
        ((65, columns), {"row_offset": 3, "column_offset": 7, "row_length": 900}),
    ):
        weight = values(shape, dtype, CPU)
        for sigma in (0.3, values((shape[0], 1), torch.float32, CPU), values(shape, torch.float32, CPU)):
            for distribution in ("normal", "rademacher"):
                noise: dict[str, Any] = {"sigma": sigma, "seed": 5, "distribution": distribution, **place}
                expected = quaver.perturb(weight, **noise)
                with _library.capped_simd(level):
                    assert torch.equal(quaver.perturbed_linear(unit, weight, **noise).t(), expected)
                    # And as the right operand of grad W'.
                    x = torch.zeros(shape[0], columns, dtype=dtype, requires_grad=True)
                    quaver.perturbed_linear(x, weight, **noise).backward(torch.eye(shape[0], dtype=dtype))
                    assert torch.equal(x.grad, expected)


@dtypes
def test_the_bias_is_that_of_the_bias_domain_to_the_bit(dtype: torch.dtype) -> None:
    bias, none = values((300,), dtype, CPU), torch.zeros(300, 0, dtype=dtype)
    x = torch.zeros(2, 0, dtype=dtype)
    got = quaver.perturbed_linear(x, none, bias, sigma=0.1, bias_sigma=0.5, seed=9, stream=4, row_offset=1000)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    epsilon = torch.empty(1300, dtype=torch.float32)
    torch.ops.quaver.philox_fill_(epsilon, torch.tensor(9), 4, 256, 0)
    expected = (bias.to(wide) + 0.5 * epsilon[1000:].to(wide)).to(dtype)
    assert torch.equal(got, expected.expand(2, 300))


def test_float32_weights_are_rounded_once_to_16_bits() -> None:
    weight = values((40, 40), torch.float32, CPU)
    for dtype in (torch.bfloat16, torch.float16):
        expected = quaver.perturb(weight, 0.1, 3).to(dtype)
        assert torch.equal(quaver.perturbed_linear(torch.eye(40, dtype=dtype), weight, sigma=0.1, seed=3).t(), expected)


@pytest.mark.parametrize("name", ["few-rows-aligned", "some-rows", "many-rows", "deep", "population", "master"])
def test_results_do_not_depend_on_threads(name: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            case = BY_NAME[name]
            dtype = torch.bfloat16 if name == "master" else torch.float32
            results.append([op_checks.run(case, dtype), *op_checks.gradients(case, dtype, "cpp")])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_products_do_not_depend_on_threads_and_are_right() -> None:
    """Several super-blocks in every direction, and more tiles than threads."""
    x, weight = values((1100, 1500), torch.float32, CPU), values((1200, 1500), torch.float32, CPU, 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            y = quaver.perturbed_linear(*leaves, sigma=0.1, seed=1)
            y.backward(y.detach())
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    wide = quaver.perturb(weight, 0.1, 1).double()
    y, of_x, of_weight = results[0]
    for got, expected in (
        (y, x.double() @ wide.t()),
        (of_x, y.double() @ wide),
        (of_weight, y.double().t() @ x.double()),
    ):
        assert (got.double() - expected).abs().max() < 2e-6 * expected.abs().max()


def test_members_are_the_single_calls_to_the_bit() -> None:
    x, weight, bias = (values(shape, torch.float32, CPU) for shape in ((3, 20, 53), (37, 53), (37,)))
    seeds = torch.tensor([4, -5, 2**62])
    got = quaver.perturbed_linear(x, weight, bias, sigma=0.1, bias_sigma=0.2, seed=seeds)
    shared = quaver.perturbed_linear(x[0], weight, bias, sigma=0.1, bias_sigma=0.2, seed=seeds)
    for p, seed in enumerate(seeds.tolist()):
        one = {"sigma": 0.1, "bias_sigma": 0.2, "seed": seed}
        assert torch.equal(got[p], quaver.perturbed_linear(x[p], weight, bias, **one))
        assert torch.equal(shared[p], quaver.perturbed_linear(x[0], weight, bias, **one))


def test_antithetic_pairs() -> None:
    x, none = values((5, 40), torch.float32, CPU), torch.zeros(30, 40)
    one, other = (quaver.perturbed_linear(x, none, sigma=sigma, seed=3) for sigma in (0.5, -0.5))
    assert torch.equal(one, -other)


@pytest.mark.parametrize("rows", [3, 20, 60])
def test_shards_have_the_noise_of_the_whole(rows: int) -> None:
    weight, bias, x = (values(shape, torch.float64, CPU) for shape in ((40, 90), (40,), (rows, 90)))
    sigma, bias_sigma = values((40, 1), torch.float64, CPU, 1), values((40,), torch.float64, CPU, 2)
    whole = quaver.perturbed_linear(x, weight, bias, sigma=sigma, bias_sigma=bias_sigma, seed=8)
    top, below = (
        quaver.perturbed_linear(
            x, weight[part], bias[part], sigma=sigma[part], bias_sigma=bias_sigma[part], seed=8, row_offset=part.start
        )
        for part in (slice(0, 13), slice(13, 40))
    )
    torch.testing.assert_close(torch.cat([top, below], 1), whole, rtol=1e-12, atol=1e-12)
    left, right = (
        quaver.perturbed_linear(
            x[:, part], weight[:, part], sigma=sigma, seed=8, column_offset=part.start, row_length=90
        )
        for part in (slice(0, 33), slice(33, 90))
    )
    alone = quaver.perturbed_linear(x, weight, sigma=sigma, seed=8)
    torch.testing.assert_close(left + right, alone, rtol=1e-12, atol=1e-12)


def test_a_sigma_of_nan_gives_nan_where_it_is_used() -> None:
    x, weight = values((20, 30), torch.float32, CPU), values((10, 30), torch.float32, CPU)
    assert quaver.perturbed_linear(x, weight, sigma=float("nan"), seed=1).isnan().all()
    sigma = torch.full((10, 1), 0.1)
    sigma[4] = float("nan")
    for batch in (x, x[:3], x.repeat(5, 1)):
        found = quaver.perturbed_linear(batch, weight, sigma=sigma, seed=1).isnan()
        assert found[:, 4].all()
        assert found.sum() == batch.shape[0]


def test_nan_and_infinity_reach_only_what_depends_on_them() -> None:
    weight, x = values((37, 53), torch.float32, CPU), values((70, 53), torch.float32, CPU)
    for bad in (float("nan"), float("inf")):
        for rows in (5, 30, 70):
            spoilt_x, spoilt_weight = x[:rows].clone(), weight.clone()
            spoilt_x[rows - 1, 52], spoilt_weight[36, 52] = bad, bad
            found = quaver.perturbed_linear(spoilt_x, spoilt_weight, sigma=0.1, seed=1).isfinite()
            assert found[:-1, :-1].all()
            assert not found[-1].any()
            assert not found[:, -1].any()


# ---- which kernels run ----------------------------------------------------------------------------------------------
def test_only_the_chosen_kernels_run() -> None:
    x, weight, bias = (values(shape, torch.float32, CPU).requires_grad_() for shape in ((20, 30), (10, 30), (10,)))
    sigma = torch.tensor(0.5, requires_grad=True)
    leaves = (x, weight, bias, sigma)

    def call() -> None:
        y = quaver.perturbed_linear(x, weight, bias, sigma=sigma, bias_sigma=sigma, seed=1)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=True)
        torch.autograd.grad(grads[0], (weight, sigma), torch.ones_like(x))

    names = op_checks.dispatched(call)
    # The sums are autograd's, of gradients that reach one tensor twice; ones are this test's own.
    op_checks.assert_only(names, "cpp", "aten::ones_like", "aten::add", "aten::add_", "aten::new_empty_strided")
    ours = [name for name in names if name.startswith("quaver::")]
    assert ours == [
        "quaver::perturbed_linear",
        "quaver::perturbed_linear_input_gradient",
        "quaver::perturbed_linear_parameter_gradient",
        "quaver::perturbed_linear_parameter_gradient",
    ]
    for rows in (3, 70):
        one = values((rows, 30), torch.bfloat16, CPU)
        names = op_checks.dispatched(lambda one=one: quaver.perturbed_linear(one, weight.detach(), sigma=0.1, seed=1))
        op_checks.assert_only(names, "cpp")


def test_gradients_that_nobody_wants_are_not_made() -> None:
    x, weight = values((20, 30), torch.float32, CPU), values((10, 30), torch.float32, CPU)
    y = quaver.perturbed_linear(x.requires_grad_(), weight, sigma=0.1, seed=1)
    names = op_checks.dispatched(lambda: torch.autograd.grad(y.sum(), x))
    assert "quaver::perturbed_linear_parameter_gradient" not in names


def test_nothing_of_the_size_of_the_noise_is_saved() -> None:
    x, weight = values((20, 30), torch.float32, CPU), values((10, 30), torch.float32, CPU).requires_grad_()
    sigma, saved = torch.tensor(0.1, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        quaver.perturbed_linear(x, weight, sigma=sigma, seed=1)
    assert {tensor.data_ptr() for tensor in saved if tensor.numel() > 1} == {x.data_ptr(), weight.data_ptr()}


# ---- registration ---------------------------------------------------------------------------------------------------
def internal_calls() -> dict[str, tuple[object, ...]]:
    def made(*shape: int, seed: int = 0) -> Tensor:
        return values(shape, torch.float64, CPU, seed).requires_grad_()

    place = (1, "normal", 2, 3, 50)
    population = checked(
        made(2, 3, 5), made(4, 5), made(4), made(2, 4, 1), made(4), torch.tensor([3, 4]), place, shared=None
    )
    shared = checked(made(3, 5), made(4, 5), None, made(4, 5), None, 7, place, shared=None)
    calls: dict[str, tuple[object, ...]] = {}
    for name, (x, weight, bias, sigma, bias_sigma, seed, *rest) in {"population": population, "one": shared}.items():
        leaves = [
            tensor.detach().requires_grad_() if isinstance(tensor, Tensor) else None for tensor in (sigma, bias_sigma)
        ]
        sigma, bias_sigma = leaves
        grad = made(*seed.shape, 3, 4, seed=9)
        calls[f"perturbed_linear-{name}"] = (x, weight, bias, sigma, bias_sigma, seed, *rest)
        calls[f"perturbed_linear_input_gradient-{name}"] = (grad, weight, sigma, seed, *rest)
        needed = (True, True, bias is not None, bias is not None)
        calls[f"perturbed_linear_parameter_gradient-{name}"] = (
            *(grad, x, weight, bias, sigma, bias_sigma, seed),
            *needed,
            *rest,
        )
    return calls


@pytest.mark.parametrize("name", internal_calls())
def test_opcheck(name: str) -> None:
    opcheck(getattr(torch.ops.quaver, name.split("-")[0]).default, internal_calls()[name])


@pytest.mark.parametrize("name", ["few-rows", "some-rows", "transposed", "population-few", "population-shared-square"])
def test_compiles(name: str) -> None:
    op_checks.assert_compiles(BY_NAME[name], torch.float32, "aot_eager")


def test_compiles_with_inductor() -> None:
    op_checks.assert_compiles(BY_NAME["some-rows"], torch.float32, "inductor")


def test_compiles_with_dynamic_shapes() -> None:
    weight = values((6, 5), torch.float32, CPU)

    def function(x: Tensor) -> Tensor:
        return quaver.perturbed_linear(x, weight, sigma=0.1, seed=3) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 8, 17):
        x = values((rows, 5), torch.float32, CPU)
        assert torch.equal(compiled(x), function(x))


def test_a_seed_tensor_is_one_graph() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    x, weight = values((3, 6), torch.float32, CPU), values((4, 6), torch.float32, CPU)

    def function(seed: int | Tensor) -> Tensor:
        return quaver.perturbed_linear(x, weight, sigma=0.1, seed=seed)

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for seed in (torch.tensor(1), torch.tensor(2**50), torch.tensor(-3)):
        assert torch.equal(compiled(seed), function(seed))
    assert counter.frame_count == 1
    counter.frame_count = 0
    for number in (5, 6, 2**40, -7):
        assert torch.equal(compiled(number), function(number))
    assert counter.frame_count <= 2


def test_transforms_take_the_reference() -> None:
    x, weight = values((4, 6), torch.float64, CPU), values((3, 6), torch.float64, CPU)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return quaver.perturbed_linear(x, weight, sigma=0.1, seed=2)

    with use_backend("reference"):
        expected = function(x, weight)
    names = op_checks.dispatched(lambda: torch.func.vmap(function, (0, None))(x, weight))
    assert not [name for name in names if name.startswith("quaver::")]
    torch.testing.assert_close(torch.func.vmap(function, (0, None))(x, weight), expected)
    _, tangent = torch.func.jvp(lambda w: function(x, w), (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(tangent, x.sum(1, keepdim=True).expand(4, 3))
    gradient = torch.func.grad(lambda w: function(x, w).sum())(weight)
    torch.testing.assert_close(gradient, x.sum(0).expand(3, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x, weight, bias = (values(shape, torch.float32, CPU).requires_grad_() for shape in ((20, 30), (10, 30), (10,)))
    sigma = torch.tensor(0.2, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return quaver.perturbed_linear(x, weight, bias, sigma=sigma, bias_sigma=sigma, seed=1)

    expected = function(x.to(dtype))
    with torch.autocast("cpu", dtype):
        got = function(x)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    assert torch.equal(compiled, expected)
    grads = torch.autograd.grad(got.float().sum(), (x, weight, bias, sigma))
    assert {grad.dtype for grad in grads} == {torch.float32}
    wide = x.double()
    with torch.autocast("cpu", dtype):
        assert quaver.perturbed_linear(wide, weight.double(), sigma=0.1, seed=1).dtype == torch.float64
