"""perturbed_linear's Triton kernels in Triton's interpreter: several tiles and steps, ragged on every axis."""

from collections.abc import Iterator
from typing import Any

import op_checks
import pytest
import torch
from op_checks import CPU, DTYPES
from torch import Tensor

import quaver
from quaver.kernels import use_backend
from quaver.kernels._cases import Case, values
from quaver.kernels.perturbed_linear import triton_products, tuning
from quaver.kernels.perturbed_linear.cases import CASES

BY_NAME = {case.name: case for case in CASES}
DRAWS = (3, 4)
#: What the interpreter itself calls, to hand over a view of a larger tensor.
INTERPRETERS = "aten::set_"
SEEDS = torch.tensor([3, -4, 2**40 + 2**31])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
#: Cases of a second or two in the interpreter (30 ms a tile of noise), each in one dtype in turn; slow tests have all.
QUICK = [
    "one",
    "no-rows",
    "no-columns",
    "no-features",
    "few-rows",
    "transposed",
    "strided",
    "master",
    "shard",
    "far",
    "population-few",
    "population-shared",
    "population-of-sigma",
    "population-of-none",
]
ROTATED = [
    pytest.param(
        *(case, dtype),
        id=f"{case}-{str(dtype).removeprefix('torch.')}",
        marks=[] if case.name in QUICK and QUICK.index(case.name) % len(DTYPES) == number else pytest.mark.slow,
    )
    for case in CASES
    for number, dtype in enumerate(DTYPES)
]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that the cases have several in each direction, and programs so few that each has several steps."""
    monkeypatch.setattr(tuning, "triton_tile", lambda *_: tuning.Tile(16, 32, 16, 4, 2))
    monkeypatch.setattr(tuning, "triton_gradient_tile", lambda *_: tuning.Tile(16, 32, 16, 4, 2))
    monkeypatch.setattr(tuning, "TRITON_PROGRAMS", 6)


@pytest.fixture
def with_triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("case, dtype", ROTATED)
def test_results_and_gradients_are_as_accurate_as_eager(case: Case, dtype: torch.dtype) -> None:
    op_checks.assert_result_as_accurate_as_eager(case, dtype, "triton")
    op_checks.assert_gradients_as_accurate_as_eager(case, dtype, "triton", draws=DRAWS)


@pytest.mark.parametrize(
    "name",
    [
        "master",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("population-few", "population-shared-square")),
    ],
)
def test_the_form_for_many_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "triton_fused_rows", lambda _: 0)
    # Members in chunks of two.
    monkeypatch.setattr(tuning, "TRITON_BUFFER", 2 * 37 * 53)
    op_checks.assert_result_as_accurate_as_eager(BY_NAME[name], torch.bfloat16, "triton")
    op_checks.assert_gradients_as_accurate_as_eager(BY_NAME[name], torch.bfloat16, "triton", draws=DRAWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vector", "population-few"])
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    op_checks.assert_gradients(BY_NAME[name], "triton")


#: Shape, offsets and form of sigma: rows that start with a group, inside one, at two and at all places of groups; far.
PLACES = {
    "even": ((32, 64), (0, 0, 64), "number"),
    "even, a sigma each": ((32, 64), (0, 0, 64), "element"),
    "aligned": ((21, 45), (1, 16, 128), "row"),
    "inside": ((21, 45), (2, 5, 128), "element"),
    "two places": ((21, 45), (2, 5, 130), "row"),
    "all places": ((21, 45), (2**33 + 1, 3, 2**20 + 5), "number"),
}


@pytest.mark.parametrize("distribution, dtype", [("normal", torch.float32), ("rademacher", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("with_triton")
def test_weights_have_the_bits_of_perturb(place: str, dtype: torch.dtype, distribution: str) -> None:
    """Products with a unit matrix show the weights themselves."""
    (rows, columns), offsets, form = PLACES[place]
    weight = values((rows, columns), dtype, CPU)
    where = dict(zip(("row_offset", "column_offset", "row_length"), offsets, strict=True))
    shapes = {"row": (rows, 1), "element": (rows, columns)}
    sigma = values(shapes[form], torch.float32, CPU) if form in shapes else 0.3
    noise: dict[str, Any] = {"sigma": sigma, "seed": 5, "distribution": distribution, **where}
    with use_backend("reference"):
        expected = quaver.perturb(weight, **noise)
    assert torch.equal(quaver.perturbed_linear(torch.eye(columns, dtype=dtype), weight, **noise).t(), expected)
    x = torch.zeros(rows, columns, dtype=dtype, requires_grad=True)
    (found,) = torch.autograd.grad(quaver.perturbed_linear(x, weight, **noise), x, torch.eye(rows, dtype=dtype))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seeds", [SEEDS, SEEDS[[0, 0, 1, 1]]], ids=["odd", "antithetic"])
@pytest.mark.usefixtures("with_triton")
def test_members_have_the_bits_of_perturb(seeds: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "triton_tile", lambda *_: tuning.Tile(32, 64, 64, 4, 2))
    weight = values((21, 45), torch.float32, CPU)
    noise: dict[str, Any] = {"sigma": values((len(seeds),), torch.float32, CPU), "seed": seeds, "stream": 3}
    with use_backend("reference"):
        expected = quaver.perturb(weight, **noise)
    unit = torch.eye(45)
    assert torch.equal(quaver.perturbed_linear(unit, weight, **noise).transpose(1, 2), expected)
    own = unit.expand(len(seeds), 45, 45)
    assert torch.equal(quaver.perturbed_linear(own, weight, shared_input=False, **noise).transpose(1, 2), expected)
    x = torch.zeros(len(seeds), 21, 45, requires_grad=True)
    y = quaver.perturbed_linear(x, weight, shared_input=False, **noise)
    (found,) = torch.autograd.grad(y, x, torch.eye(21).expand(len(seeds), 21, 21))
    assert torch.equal(found, expected)
    # Shared inputs: the sum of members.
    x = torch.zeros(21, 45, requires_grad=True)
    y = quaver.perturbed_linear(x, weight, shared_input=True, **noise)
    (found,) = torch.autograd.grad(y, x, torch.eye(21).expand(len(seeds), 21, 21))
    torch.testing.assert_close(found, expected.sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seeds, draws", [([7, 7, 9, 9], 2), ([7, 8, 9, 10], 4), ([7, 7, 9], 2), ([7], 1)], ids=str)
@pytest.mark.usefixtures("with_triton")
def test_antithetic_neighbours_share_a_draw(seeds: list[int], draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, make = [], triton_products.tile_noise
    monkeypatch.setattr(triton_products, "tile_noise", lambda *arguments: (calls.append(1), make(*arguments))[1])
    signs = torch.tensor([0.5, -0.5] * 2)[: len(seeds)]
    y = quaver.perturbed_linear(
        values((5, 32), torch.float32, CPU), torch.zeros(16, 32), sigma=signs, seed=torch.tensor(seeds)
    )
    assert len(calls) == draws  # one tile, one step
    if seeds[:2] == [7, 7]:
        assert torch.equal(y[0], -y[1])


@dtypes
@pytest.mark.usefixtures("with_triton")
def test_the_bias_is_that_of_the_bias_domain_to_the_bit(dtype: torch.dtype) -> None:
    bias, none, x = values((70,), dtype, CPU), torch.zeros(70, 0, dtype=dtype), torch.zeros(2, 0, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for kind, distribution in enumerate(("normal", "rademacher")):
        for sigma in (0.5, values((70,), wide, CPU)):
            noise: dict[str, Any] = {"bias_sigma": sigma, "seed": 9, "stream": 4, "row_offset": 2**33 + 1000}
            got = quaver.perturbed_linear(x, none, bias, sigma=0.1, distribution=distribution, **noise)
            epsilon = torch.empty(70, dtype=torch.float32)
            torch.ops.quaver.philox_fill_(epsilon, torch.tensor(9), 4, 256 + kind, 2**33 + 1000)
            assert torch.equal(got, (bias.to(wide) + sigma * epsilon.to(wide)).to(dtype).expand(2, 70))


@pytest.mark.usefixtures("with_triton")
def test_float32_weights_are_rounded_once_to_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = values((40, 40), torch.float32, CPU)
    for fused in (64, 0):
        monkeypatch.setattr(tuning, "triton_fused_rows", lambda _, rows=fused: rows)
        for dtype in (torch.bfloat16, torch.float16):
            expected = quaver.perturb(weight, 0.1, 3).to(dtype)
            got = quaver.perturbed_linear(torch.eye(40, dtype=dtype), weight, sigma=0.1, seed=3)
            assert torch.equal(got.t(), expected)


@pytest.mark.parametrize("name", ["strided", pytest.param("population-few", marks=pytest.mark.slow)])
def test_same_bits_again_and_everything_is_written(name: str) -> None:
    case = BY_NAME[name]
    expected = op_checks.run(case, torch.float32, "triton"), *op_checks.gradients(case, torch.float32, "triton")
    with op_checks.poisoned_memory():
        found = op_checks.run(case, torch.float32, "triton"), *op_checks.gradients(case, torch.float32, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "programs", [pytest.param(1, marks=pytest.mark.slow), pytest.param(264, marks=pytest.mark.slow)]
)
def test_any_number_of_programs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TRITON_PROGRAMS", programs)
    for name in ("few-rows", "population-few"):
        op_checks.assert_result_as_accurate_as_eager(BY_NAME[name], torch.float32, "triton")
        op_checks.assert_gradients_as_accurate_as_eager(BY_NAME[name], torch.float32, "triton", draws=DRAWS)


@pytest.mark.usefixtures("with_triton")
def test_nan_and_infinity_reach_only_what_depends_on_them() -> None:
    weight, x = values((37, 53), torch.float32, CPU), values((20, 53), torch.float32, CPU)
    for bad in (float("nan"), float("inf")):
        spoilt_x, spoilt_weight = x.clone(), weight.clone()
        spoilt_x[19, 52], spoilt_weight[36, 52] = bad, bad
        found = quaver.perturbed_linear(spoilt_x, spoilt_weight, sigma=0.1, seed=1).isfinite()
        assert found[:-1, :-1].all()
        assert not found[-1].any()
        assert not found[:, -1].any()
    # An infinite sigma makes what is outside of W infinite too, where it must not meet a zero.
    assert quaver.perturbed_linear(torch.ones(1, 1), torch.ones(1, 1), sigma=float("inf"), seed=1).isinf().all()
    one = torch.ones(1, 1, requires_grad=True)
    y = quaver.perturbed_linear(one, torch.ones(1, 1), sigma=float("inf"), seed=1)
    assert torch.autograd.grad(y, one, torch.ones(1, 1))[0].isinf().all()


def test_only_the_chosen_kernels_run() -> None:
    x, weight, bias = (values(shape, torch.float32, CPU).requires_grad_() for shape in ((20, 30), (10, 30), (10,)))
    sigma = torch.tensor(0.5, requires_grad=True)
    leaves = (x, weight, bias, sigma)

    def call() -> None:
        with use_backend("triton"):
            y = quaver.perturbed_linear(x, weight, bias, sigma=sigma, bias_sigma=sigma, seed=1)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=True)
        torch.autograd.grad(grads[0], (weight, sigma), torch.ones_like(x))

    names = op_checks.dispatched(call)
    # The sums are autograd's, of gradients that reach one tensor twice; ones are this test's own.
    others = ("aten::ones_like", "aten::add", "aten::add_", "aten::new_empty_strided", INTERPRETERS)
    op_checks.assert_only(names, "triton", *others)
    assert [name for name in names if name.startswith("quaver::")] == [
        "quaver::perturbed_linear_triton",
        "quaver::perturbed_linear_input_gradient_triton",
        "quaver::perturbed_linear_parameter_gradient_triton",
        "quaver::perturbed_linear_parameter_gradient_triton",
    ]


def test_many_rows_take_the_gemm_that_the_readme_names() -> None:
    weight, seeds = values((10, 30), torch.float32, CPU), torch.tensor([1, 2])
    for shape, seed, gemm in (((300, 30), 1, "addmm_"), ((2, 300, 30), seeds, "bmm")):
        x = values(shape, torch.float32, CPU).requires_grad_()

        def call(x: Tensor = x, seed: int | Tensor = seed) -> None:
            with use_backend("triton"):
                y = quaver.perturbed_linear(x, weight, sigma=0.1, seed=seed)
            torch.autograd.grad(y, x, torch.ones_like(y))

        names = op_checks.dispatched(call)
        op_checks.assert_only(names, "triton", "aten::ones_like", f"aten::{gemm}", INTERPRETERS)
        assert names.count(f"aten::{gemm}") == 2
