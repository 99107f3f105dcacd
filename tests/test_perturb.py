"""perturb, perturb_, perturbation_gradient and weight_scale: the table of checks, on C++."""

import op_checks
import pytest
import torch
from op_checks import CPU, DTYPES, LEVELS
from torch.library import opcheck

import quaver
from quaver.kernels import _library, use_backend
from quaver.kernels._cases import Case, values
from quaver.kernels.perturb.arguments import noise_place, seeds_and_sigma
from quaver.kernels.perturb.cases import CASES

BY_NAME = {case.name: case for case in CASES}
DIFFERENTIABLE = [case for case in CASES if "large" not in case.name and case.name not in ("scale-one", "scale-empty")]
cases = pytest.mark.parametrize("case", CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@cases
@dtypes
def test_equals_the_reference_at_every_simd_level(case: Case, dtype: torch.dtype) -> None:
    for level in LEVELS:
        with _library.capped_simd(level):
            op_checks.assert_equals_reference(case, dtype)


@cases
def test_everything_is_written(case: Case) -> None:
    expected = op_checks.run(case, torch.float32)
    with op_checks.poisoned_memory():
        assert torch.equal(op_checks.run(case, torch.float32), expected)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    op_checks.assert_gradients(case, "cpp")


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
@dtypes
def test_gradients_to_rounding(case: Case, dtype: torch.dtype) -> None:
    op_checks.assert_gradients_equal_reference(case, dtype)


@pytest.mark.parametrize("name", ["sigma-element", "population-row", "gradient-normal", "scale-odd"])
def test_results_do_not_depend_on_threads(name: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            case = BY_NAME[name]
            results.append([op_checks.run(case, torch.float32), *op_checks.gradients(case, torch.float32, "cpp")])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_reductions_over_many_blocks_do_not_depend_on_threads() -> None:
    weight, grad = values((700, 401), torch.float32, CPU), values((700, 401), torch.float32, CPU, seed=1)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            sigma = torch.tensor(0.1, requires_grad=True)
            quaver.perturb(weight, sigma, 1).backward(grad)
            results.append((sigma.grad, quaver.weight_scale(weight)))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]
    torch.testing.assert_close(results[0][1].double(), weight.double().std(), rtol=1e-6, atol=0)
    exact = (grad.double() * quaver.perturb(torch.zeros_like(weight), 1.0, 1).double()).sum()
    torch.testing.assert_close(results[0][0].double(), exact, rtol=1e-5, atol=0)


def test_only_the_chosen_kernels_run() -> None:
    weight, sigma = values((20, 30), torch.float32, CPU).requires_grad_(), torch.tensor(0.5, requires_grad=True)
    grad = values((20, 30), torch.float32, CPU)
    names = op_checks.dispatched(lambda: torch.autograd.grad(quaver.perturb(weight, sigma, 1), (weight, sigma), grad))
    op_checks.assert_only(names, "cpp")
    ours = [name for name in names if name.startswith("quaver::")]
    assert ours == ["quaver::perturb", "quaver::perturb_sigma_gradient"]
    population = torch.arange(3)
    grads = values((3, 20, 30), torch.float32, CPU)
    names = op_checks.dispatched(lambda: torch.autograd.grad(quaver.perturb(weight, sigma, population), weight, grads))
    op_checks.assert_only(names, "cpp")
    coefficients = torch.ones(3)
    names = op_checks.dispatched(lambda: quaver.perturbation_gradient(coefficients, population, (20, 30)))
    op_checks.assert_only(names, "cpp")
    names = op_checks.dispatched(lambda: torch.autograd.grad(quaver.weight_scale(weight), weight))
    op_checks.assert_only(names, "cpp", "aten::ones_like")
    with use_backend("reference"):
        names = op_checks.dispatched(lambda: quaver.perturb(weight, sigma, 1))
    assert not [name for name in names if name.startswith("quaver::")]


def internal_calls() -> dict[str, tuple[object, ...]]:
    weight, grads = values((4, 5), torch.float64, CPU), values((2, 4, 5), torch.float64, CPU)
    sigma = values((2, 4, 1), torch.float64, CPU)
    seeds, sigmas = seeds_and_sigma(weight, sigma, torch.arange(2))
    place = noise_place((4, 5), 1, "normal", 2, 1, 9)
    one = (torch.tensor(0.3, dtype=torch.float64), torch.tensor(5))
    weight.requires_grad_()
    return {
        "perturb": (weight, sigmas.clone().requires_grad_(), seeds, *place),
        "perturb_": (weight.detach().clone(), *one, *place),
        "perturb_sigma_gradient": (grads.clone().requires_grad_(), sigmas, seeds, *place),
        "perturb_weight_gradient": (grads.clone().requires_grad_(),),
        "perturbation_gradient": (torch.ones(2, dtype=torch.float64, requires_grad=True), seeds, [4, 5], *place),
        "weight_scale": (weight,),
        "weight_scale_gradient": (one[0].clone().requires_grad_(), weight, one[0].clone().requires_grad_()),
    }


@pytest.mark.parametrize("suffix", ["", "_triton"])
@pytest.mark.parametrize("name", internal_calls())
def test_opcheck(name: str, suffix: str) -> None:
    opcheck(getattr(torch.ops.quaver, name + suffix).default, internal_calls()[name])


@pytest.mark.parametrize(
    "name",
    ["layout-odd", "layout-transposed", "sigma-row", "population-element", "shard", "gradient-normal", "scale-odd"],
)
def test_compiles(name: str) -> None:
    op_checks.assert_compiles(BY_NAME[name], torch.float32, "aot_eager")


def test_compiles_with_inductor() -> None:
    op_checks.assert_compiles(BY_NAME["sigma-row"], torch.float32, "inductor")


def test_compiles_with_dynamic_shapes() -> None:
    compiled = torch.compile(lambda w: quaver.perturb(w, 0.1, 3) * 2, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 8, 17):
        weight = values((rows, 6), torch.float32, CPU)
        assert torch.equal(compiled(weight), quaver.perturb(weight, 0.1, 3) * 2)


def test_a_new_seed_compiles_once_more_at_most() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda w, seed: quaver.perturb(w, 0.1, seed), backend=counter, fullgraph=True)
    weight = values((3, 6), torch.float32, CPU)
    for seed in (5, 6, 2**40, -7, 123456789):
        assert torch.equal(compiled(weight, seed), quaver.perturb(weight, 0.1, seed))
    assert counter.frame_count <= 2
    counter.frame_count = 0
    for seed in (torch.tensor(1), torch.tensor(2**50), torch.tensor(-3)):
        assert torch.equal(compiled(weight, seed), quaver.perturb(weight, 0.1, seed))
    assert counter.frame_count == 1


def test_compiles_in_place() -> None:
    def function(weight: torch.Tensor) -> torch.Tensor:
        quaver.perturb_(weight, 0.1, 3)
        return weight + 1

    weight = values((5, 7), torch.float32, CPU)
    expected = quaver.perturb(weight, 0.1, 3) + 1
    assert torch.equal(torch.compile(function, backend="aot_eager", fullgraph=True)(weight), expected)
    assert torch.equal(weight, expected - 1) or torch.allclose(weight, expected - 1)


def test_transforms_take_the_reference() -> None:
    weight = values((4, 5), torch.float64, CPU)
    direction = torch.ones_like(weight)
    _, tangent = torch.func.jvp(lambda w: quaver.perturb(w * w, 0.1, 3), (weight,), (direction,))
    torch.testing.assert_close(tangent, 2 * weight)
    batch = values((3, 4, 5), torch.float64, CPU)
    assert torch.equal(
        torch.vmap(lambda w: quaver.perturb(w, 0.1, 3))(batch), torch.stack([quaver.perturb(w, 0.1, 3) for w in batch])
    )
    grad = torch.vmap(torch.func.grad(lambda w: (quaver.perturb(w, 0.1, 3) ** 2).sum()))(batch)
    torch.testing.assert_close(grad, 2 * torch.stack([quaver.perturb(w, 0.1, 3) for w in batch]))


def test_autocast_leaves_weights_alone() -> None:
    weight = values((4, 5), torch.float32, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quaver.perturb(weight, 0.1, 3), quaver.perturb(weight, 0.1, 3))
        assert quaver.perturb(weight, 0.1, 3).dtype == torch.float32


@dtypes
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    weight = values((64, 65), dtype, CPU)
    exact = weight.double() + 0.1 * quaver.philox_normal((64, 65), 1).double()
    naive = weight + 0.1 * quaver.philox_normal((64, 65), 1, dtype=dtype)
    error = (quaver.perturb(weight, 0.1, 1).double() - exact).abs().max()
    assert error <= 2 * (naive.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_a_shard_has_the_bits_of_the_whole(distribution: str) -> None:
    whole = values((40, 90), torch.float32, CPU)
    expected = quaver.perturb(whole, 0.3, 8, distribution=distribution)
    for rows, columns in ((slice(0, 13), slice(0, 90)), (slice(13, 40), slice(33, 90)), (slice(39, 40), slice(0, 1))):
        shard = quaver.perturb(
            whole[rows, columns],
            0.3,
            8,
            distribution=distribution,
            row_offset=rows.start,
            column_offset=columns.start,
            row_length=90,
        )
        assert torch.equal(shard, expected[rows, columns])


def test_antithetic_pairs() -> None:
    weight = torch.zeros(1000)
    assert torch.equal(quaver.perturb(weight, 0.5, 3), -quaver.perturb(weight, -0.5, 3))


@dtypes
def test_in_place_equals_out_of_place(dtype: torch.dtype) -> None:
    for layout in (lambda x: x, lambda x: x.t(), lambda x: x[:, ::2]):
        weight = layout(values((30, 50), dtype, CPU))
        expected, version = quaver.perturb(weight, 0.2, 9), weight._version
        assert quaver.perturb_(weight, 0.2, 9) is weight
        assert torch.equal(weight, expected)
        assert weight._version > version


def test_in_place_refuses_what_needs_a_gradient() -> None:
    weight = torch.zeros(3, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"weight: perturb_ has no gradient; call it under torch.no_grad\(\), or use"
    ):
        quaver.perturb_(weight, 0.1, 1)
    with torch.no_grad():
        quaver.perturb_(weight, 0.1, 1)
    assert torch.equal(weight.detach(), quaver.perturb(torch.zeros(3), 0.1, 1))


def test_gradient_of_a_population_is_that_of_its_members() -> None:
    weight, seeds = values((6, 7), torch.float64, CPU), torch.tensor([4, 5, 6])
    population = quaver.perturb(weight, 0.1, seeds)
    assert torch.equal(population, torch.stack([quaver.perturb(weight, 0.1, int(seed)) for seed in seeds]))
    coefficients = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = sum(c * quaver.philox_normal((6, 7), int(s)).double() for c, s in zip(coefficients, seeds, strict=True))
    torch.testing.assert_close(quaver.perturbation_gradient(coefficients, seeds, (6, 7)), expected)


def test_weight_scale_at_the_edges() -> None:
    for empty in (torch.empty(0), torch.ones(1), torch.ones(5, 7)):
        weight = empty.requires_grad_()
        scale = quaver.weight_scale(weight)
        scale.backward()
        assert scale == 0
        assert weight.grad is not None
        assert (weight.grad == 0).all()
    # No cancellation: the mean is 10^4 deviations away.
    weight = values((300, 300), torch.float64, CPU) + 1e4
    torch.testing.assert_close(
        quaver.weight_scale(weight.float()).double(), weight.float().double().std(), rtol=1e-5, atol=0
    )


W = torch.zeros(4, 5)
BAD = [
    (lambda: quaver.perturb([1.0], 0.1, 1), TypeError, "weight: expected a tensor, got list"),
    (
        lambda: quaver.perturb(torch.zeros(3, dtype=torch.int64), 0.1, 1),
        TypeError,
        "weight: expected float64, float32, bfloat16 or float16, got torch.int64",
    ),
    (lambda: quaver.perturb(W, "x", 1), TypeError, "sigma: expected a float or a tensor, got str"),
    (lambda: quaver.perturb(W, True, 1), TypeError, "sigma: expected a float or a tensor, got bool"),
    (
        lambda: quaver.perturb(W, torch.zeros(5, 4), 1),
        ValueError,
        "sigma: expected a float or a tensor of shape (), (4, 5) or (4, 1) or (), with or without a leading P, "
        "for a weight of shape (4, 5); got (5, 4)",
    ),
    (
        lambda: quaver.perturb(W, torch.zeros(3), torch.arange(2)),
        ValueError,
        "sigma: expected a leading dimension of 2, as seed has, got 3",
    ),
    (lambda: quaver.perturb(W, 0.1, 1.0), TypeError, "seed: expected an int or an int64 tensor, got float"),
    (lambda: quaver.perturb(W, 0.1, torch.tensor(1.0)), TypeError, "seed: expected an int64 tensor, got torch.float32"),
    (
        lambda: quaver.perturb(W, 0.1, torch.zeros(2, 2, dtype=torch.int64)),
        ValueError,
        "seed: expected a 0-dim or [P] tensor, got shape (2, 2)",
    ),
    (lambda: quaver.perturb(W, 0.1, 1, stream=-1), ValueError, "stream: expected a value in [0, 2^32), got -1"),
    (lambda: quaver.perturb(W, 0.1, 1, stream=1.0), TypeError, "stream: expected an int, got float"),
    (
        lambda: quaver.perturb(W, 0.1, 1, distribution="cauchy"),
        ValueError,
        "distribution: expected one of normal, rademacher, got 'cauchy'",
    ),
    (lambda: quaver.perturb(W, 0.1, 1, row_offset=-1), ValueError, "row_offset: expected a value in [0, 2^63), got -1"),
    (
        lambda: quaver.perturb(W, 0.1, 1, column_offset=1),
        ValueError,
        "row_length: must be given with a column_offset",
    ),
    (
        lambda: quaver.perturb(W, 0.1, 1, column_offset=1, row_length=5),
        ValueError,
        "row_length: expected at least column_offset + columns = 6, got 5",
    ),
    (
        lambda: quaver.perturb_(W, 0.1, torch.arange(2)),
        ValueError,
        "seed: perturb_ has room for one member, got a population of 2",
    ),
    (
        lambda: quaver.perturbation_gradient(torch.ones(2), torch.arange(3), (4,)),
        ValueError,
        "coefficients, seeds: expected two tensors of shape [P], got (2,) and (3,)",
    ),
    (
        lambda: quaver.perturbation_gradient(torch.ones(2), torch.ones(2), (4,)),
        TypeError,
        "seeds: expected an int64 tensor, got torch.float32",
    ),
    (lambda: quaver.weight_scale(torch.zeros(3, dtype=torch.bool)), TypeError, "weight: expected float64, float32"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value).startswith(message)


def test_bad_input_under_compile() -> None:
    compiled = torch.compile(
        lambda w: quaver.perturb(w, 0.1, 1, distribution="cauchy"), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match="distribution: expected one of normal, rademacher, got 'cauchy'"):
        compiled(W)
