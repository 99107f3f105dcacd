"""spectral_linear's Triton kernels in Triton's interpreter: several tiles and steps, ragged on every axis."""

from collections.abc import Callable, Iterator
from typing import Any

import op_checks
import pytest
import torch
from op_checks import CPU, DTYPES
from torch import Tensor

from quaver.kernels import delta_linear, spectral_coefficients, spectral_delta, spectral_linear, use_backend
from quaver.kernels._cases import Case, values
from quaver.kernels._seeds import compute_dtype
from quaver.kernels.spectral_linear import tuning
from quaver.kernels.spectral_linear.cases import CASES, linear_case

BY_NAME = {case.name: case for case in CASES}
DRAWS = (3, 4)
#: What the interpreter itself calls, to hand over a view of a larger tensor.
INTERPRETERS = "aten::set_"
#: Cases of about a second in the interpreter, each in one dtype in turn; slow tests have all.
QUICK = [
    "one",
    "one-delta",
    "no-tokens",
    "no-tokens-delta",
    "no-batch",
    "no-batch-delta",
    "no-columns",
    "no-features",
    "swapped",
    "by-tokens",
    "master",
    "master-delta",
    "strided-delta",
    "Delta-none",
    "Delta",
    "delta_linear-no-tokens",
    "delta_linear",
    "coefficients-one",
    "delta_linear-strided",
    "coefficients-none",
    "coefficients",
    "coefficients-by-tokens",
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
SMALL = tuning.Tile(16, 32, 16, 4, 2)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that the cases have several in each direction, and programs so few that each has several steps."""
    for name in ("triton_tile", "triton_summed_tile", "triton_projected_tile", "triton_shifted_tile"):
        monkeypatch.setattr(tuning, name, lambda *_: SMALL)
    monkeypatch.setattr(tuning, "TRITON_PROGRAMS", 6)


@pytest.fixture
def with_triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def assert_as_accurate_as_eager(case: Case, dtype: torch.dtype) -> None:
    op_checks.assert_result_as_accurate_as_eager(case, dtype, "triton")
    op_checks.assert_gradients_as_accurate_as_eager(case, dtype, "triton", draws=DRAWS)


def arguments(dtype: torch.dtype = torch.float32, *, by_tokens: bool = False, rank: int = 5) -> dict[str, Any]:
    """Of spectral_linear: 2 samples of 9 tokens, 19 columns to 21."""
    lead, wide = (2, 9) if by_tokens else (2,), compute_dtype(dtype)
    return {
        "x": values((2, 9, 19), dtype, CPU, 1),
        "weight": values((21, 19), dtype, CPU, 2),
        "bias": values((21,), dtype, CPU, 3),
        "down": values((4, rank, 19), dtype, CPU, 4),
        "up": values((4, 21, rank), dtype, CPU, 5),
        "coefficients": values((*lead, 4), wide, CPU, 6),
        "gain": values((21,), wide, CPU, 7),
    }


@pytest.mark.parametrize("case, dtype", ROTATED)
def test_results_and_gradients_are_as_accurate_as_eager(case: Case, dtype: torch.dtype) -> None:
    assert_as_accurate_as_eager(case, dtype)


#: Ranks that a tile of 32 columns has no part of, pieces of, and several of; ragged and even.
RANKED = [
    linear_case("no-rank", (2, 5), (8, 7), (4, 0), gain=(8,), order="token"),
    linear_case("no-factors", (2, 5), (8, 7), (0, 4), gain=(), order="delta"),
    linear_case("rank-one", (2, 5), (18, 17), (18, 1), by_tokens=True),
    linear_case("rank-pieces", (2, 9), (20, 17), (2, 37), gain=(), order="token"),
    linear_case("rank-pieces-by-tokens", (2, 9), (20, 17), (2, 37), by_tokens=True),
]


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, marks=[] if number % len(DTYPES) == n else pytest.mark.slow)
        for number, case in enumerate(RANKED)
        for n, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_every_rank(case: Case, dtype: torch.dtype) -> None:
    assert_as_accurate_as_eager(case, dtype)


@pytest.mark.parametrize("name", ["strided-delta", "swapped-delta"])
def test_weights_that_nobody_keeps_are_made_a_few_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TRITON_BUFFER", 2 * 37 * 24)
    expected = op_checks.run(BY_NAME[name], torch.float32, "reference")
    shapes = []
    empty = torch.empty

    def noted(shape: Any, *rest: Any, **keywords: Any) -> Tensor:
        shapes.append(tuple(shape) if isinstance(shape, (tuple, list, torch.Size)) else (shape,))
        return empty(shape, *rest, **keywords)

    with torch.no_grad():
        monkeypatch.setattr(torch, "empty", noted)
        found = op_checks.run(BY_NAME[name], torch.float32, "triton")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [shape for shape in shapes if shape[1:] == (37, 24)] == [(2, 37, 24), (1, 37, 24)]


#: The order of a forward pass that kept its intermediate result, and that of backward.
@pytest.mark.parametrize("kept_by_delta", [False, True])
@pytest.mark.parametrize("by_delta", [False, True])
def test_backward_makes_again_what_the_other_order_kept(kept_by_delta: bool, by_delta: bool) -> None:
    tensors = tuple(arguments(torch.float64).values())
    grad = values((2, 9, 21), torch.float64, CPU, 8)
    _, kept = torch.ops.quaver.spectral_linear(*tensors, kept_by_delta, True)
    of_kept = (kept, None) if kept_by_delta else (None, kept)
    needed = [True] * 7
    expected = torch.ops.quaver.spectral_linear_backward(grad, *tensors, *of_kept, by_delta, *needed)
    found = torch.ops.quaver.spectral_linear_backward_triton(grad, *tensors, *of_kept, by_delta, *needed)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("by_delta", [False, True])
def test_each_gradient_alone(number: int, by_delta: bool) -> None:
    tensors = tuple(arguments(torch.float64).values())
    grad = values((2, 9, 21), torch.float64, CPU, 8)
    needed = [i == number for i in range(7)]
    expected = torch.ops.quaver.spectral_linear_backward(grad, *tensors, None, None, by_delta, *needed)
    found = torch.ops.quaver.spectral_linear_backward_triton(grad, *tensors, None, None, by_delta, *needed)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["one", "swapped", "swapped-delta", "by-tokens", "Delta", "delta_linear", "coefficients"]
)
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    op_checks.assert_gradients(BY_NAME[name], "triton")


@pytest.mark.parametrize(
    "name",
    [
        "swapped",
        "strided-delta",
        "delta_linear-strided",
        "coefficients",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("by-tokens", "delta-panels", "Delta")),
    ],
)
def test_same_bits_again_and_everything_is_written(name: str) -> None:
    case = BY_NAME[name]
    expected = op_checks.run(case, torch.float32, "triton"), *op_checks.gradients(case, torch.float32, "triton")
    with op_checks.poisoned_memory():
        found = op_checks.run(case, torch.float32, "triton"), *op_checks.gradients(case, torch.float32, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 264])
@pytest.mark.parametrize("name", ["swapped", "strided-delta", "delta_linear"])
def test_any_number_of_programs(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TRITON_PROGRAMS", programs)
    assert_as_accurate_as_eager(BY_NAME[name], torch.float32)


#: Every tile that kernels have on a GPU, with more of everything than one of them has.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", ["token-panels", "delta-panels", "decode-many", "Delta-panels", "delta_linear-panels"])
def test_the_tiles_of_a_gpu(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert_as_accurate_as_eager(BY_NAME[name], dtype)


def _finite(call: Callable[..., Tensor], **spoilt: Any) -> Tensor:
    return call(**{**arguments(), **spoilt}).isfinite()


def _with(tensor: Tensor, place: Any, value: float) -> Tensor:
    spoilt = tensor.clone()
    spoilt[place] = value
    return spoilt


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", ["token", "delta"])
@pytest.mark.usefixtures("with_triton")
def test_nan_and_infinity_reach_only_what_depends_on_them(order: str, bad: float) -> None:
    given = arguments()

    def finite(name: str, place: Any) -> Tensor:
        return _finite(spectral_linear, order=order, **{name: _with(given[name], place, bad)})

    found = finite("x", (1, 8, 18))
    assert not found[1, 8].any()
    assert found.sum() == found.numel() - 21
    for name, place in (("weight", (20, 18)), ("bias", 20), ("up", (3, 20, 4)), ("gain", 20)):
        found = finite(name, place)
        assert not found[..., 20].any()
        assert found.sum() == found.numel() - 18
    found = finite("coefficients", (1, 3))
    assert found[0].all()
    assert not found[1].any()


@pytest.mark.parametrize("order", ["token", "delta"])
@pytest.mark.usefixtures("with_triton")
def test_nan_reaches_only_the_gradients_that_depend_on_it(order: str) -> None:
    given = {name: tensor.requires_grad_() for name, tensor in arguments().items()}
    grad = _with(values((2, 9, 21), torch.float32, CPU, 8), (1, 8, 20), float("nan"))
    out = spectral_linear(**given, order=order)
    of = dict(zip(given, torch.autograd.grad(out, list(given.values()), grad), strict=True))
    finite = {name: gradient.isfinite() for name, gradient in of.items()}
    assert finite["x"].sum() == finite["x"].numel() - 19
    assert not finite["x"][1, 8].any()
    for name in ("weight", "bias", "gain"):
        assert finite[name][:20].all()
        assert not finite[name][20].any()
    assert finite["up"][:, :20].all()
    assert not finite["up"][:, 20].any()
    assert finite["coefficients"][0].all()
    assert not finite["coefficients"][1].any()
    assert not finite["down"].any()


@pytest.mark.usefixtures("with_triton")
def test_nan_in_a_sample_of_delta_stays_there() -> None:
    given = arguments()
    delta = _with(values((2, 21, 19), torch.float32, CPU, 9), (1, 20, 18), float("inf"))
    found = delta_linear(given["x"], given["weight"], given["bias"], delta, gain=given["gain"]).isfinite()
    assert not found[1, :, 20].any()
    assert found.sum() == found.numel() - 9
    made = spectral_delta(given["down"], given["up"], _with(given["coefficients"], (1, 0), float("nan"))).isfinite()
    assert made[0].all()
    assert not made[1].any()
    waves = spectral_coefficients(_with(given["x"], (1, 8, 0), float("nan")), given["down"][0]).isfinite()
    assert not waves[1, 8].any()
    assert waves.sum() == waves.numel() - waves.shape[-1]


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.usefixtures("with_triton")
def test_waves_are_within_two_units_in_the_last_place(scale: float) -> None:
    angles = values((300, 1), torch.float32, CPU, 1).clamp(-1, 1) * scale
    found = spectral_coefficients(angles, torch.ones(1, 1)).double()
    expected = torch.cat((angles.double().cos(), angles.double().sin()), -1)
    unit = torch.finfo(torch.float32).eps * torch.exp2(expected.abs().log2().floor())
    assert ((found - expected).abs() <= 2 * unit).all()


def _call(name: str) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """A public function, and its arguments."""
    given: dict[str, Any] = arguments(torch.bfloat16, by_tokens=name == "by tokens")
    if name == "delta_linear":
        delta = values((2, 21, 19), torch.bfloat16, CPU, 9)
        return delta_linear, {key: given[key] for key in ("x", "weight", "bias", "gain")} | {"delta": delta}
    if name == "spectral_delta":
        return spectral_delta, {key: given[key] for key in ("down", "up", "coefficients", "gain")}
    if name == "spectral_coefficients":
        return spectral_coefficients, {"theta": values((2, 7), torch.float32, CPU), "directions": torch.ones(3, 7)}
    return spectral_linear, given if name == "by tokens" else given | {"order": name}


@pytest.mark.parametrize(
    "name", ["token", "by tokens", "delta", "spectral_delta", "delta_linear", "spectral_coefficients"]
)
def test_only_the_chosen_kernels_run(name: str) -> None:
    function, given = _call(name)
    leaves = {key: value.requires_grad_() for key, value in given.items() if isinstance(value, Tensor)}

    def call() -> None:
        with use_backend("triton"):
            y = function(**given)
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    names = op_checks.dispatched(call)
    op_checks.assert_only(names, "triton", "aten::ones_like", INTERPRETERS)
    op = name if name in ("spectral_delta", "delta_linear", "spectral_coefficients") else "spectral_linear"
    ours = [found for found in names if found.startswith("quaver::")]
    assert ours == [f"quaver::{op}_triton", f"quaver::{op}_backward_triton"]


def test_sums_of_16_bit_products_are_in_float32() -> None:
    """4096 and ones: a sum that 16 bits could not hold."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(1, 1, 65, dtype=dtype)
        x[..., 0] = 4096
        weight = torch.ones(1, 65, dtype=dtype)
        none = torch.zeros(1, 0, 65, dtype=dtype), torch.zeros(1, 1, 0, dtype=dtype), torch.zeros(1, 1)
        bias = torch.full((1,), -4096.0, dtype=dtype)
        for order in ("token", "delta"):
            with use_backend("triton"):
                assert spectral_linear(x, weight, bias, *none, order=order).item() == 64
