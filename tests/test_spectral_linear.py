"""spectral_linear, spectral_delta, delta_linear and spectral_coefficients: the table of checks, on C++."""

import itertools

import pytest
import torch
from op_checks import (
    CPU,
    DTYPES,
    LEVELS,
    assert_compiles,
    assert_gradients,
    assert_gradients_as_accurate_as_eager,
    assert_result_as_accurate_as_eager,
    dispatched,
    gradients,
    poisoned_memory,
    run,
)
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

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
from quaver.kernels.spectral_linear.arguments import ORDERS
from quaver.kernels.spectral_linear.cases import CASES, linear_case

BY_NAME = {case.name: case for case in CASES}
SOME = [
    BY_NAME[name]
    for name in (
        *(
            "token",
            "delta-panels",
            "delta-deep",
            "by-tokens",
            "swapped",
            "decode-some",
            "decode-adjacent",
            "decode-deep",
        ),
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


THREADS = [
    *SOME,
    *(linear_case(f"large-{order}", (3, 130), (200, 230), (8, 16), gain=(200,), order=order) for order in ORDERS),
    linear_case("large-by-tokens", (2, 70), (300, 130), (6, 11), by_tokens=True),
    linear_case("one-sample-delta", (1, 300), (310, 90), (6, 11), order="delta"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", THREADS, ids=str)
def test_bits_do_not_depend_on_threads(case: Case, dtype: torch.dtype) -> None:
    found = []
    for threads in (1, 2, 5):
        with timing.pinned_threads(threads):
            found.append([run(case, dtype), *gradients(case, dtype, "cpp")])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("layout", ["rows", "strided", "swapped", "shared", "adjacent"])
@pytest.mark.parametrize("order", ORDERS)
def test_strides_change_no_bit(layout: str, order: str) -> None:
    """Slices, every second element, [T, B, K], one sample for all, and factors stored as [N, 2n, r]."""
    case = linear_case("", (3, 10), (37, 24), gain=(37,), layout=layout, order=order)
    inputs = case.inputs(torch.float32, CPU)
    if layout == "shared":
        inputs["x"] = inputs["x"][:1].expand(3, -1, -1)
    if layout == "adjacent":
        inputs["up"] = inputs["up"].transpose(0, 1).contiguous().transpose(0, 1)
    packed = {key: x.contiguous() if isinstance(x, Tensor) else x for key, x in inputs.items()}
    assert torch.equal(spectral_linear(**inputs), spectral_linear(**packed))
    leaves = [
        {key: x.detach().requires_grad_() for key, x in of.items() if isinstance(x, Tensor)} for of in (inputs, packed)
    ]
    grad = values((37, 3, 10), torch.float32, CPU, 9).permute(1, 2, 0)
    one, other = (
        torch.autograd.grad(spectral_linear(**of, order=order), list(of.values()), g)
        for of, g in zip(leaves, (grad, grad.contiguous()), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_sizes_of_zero(order: str) -> None:
    """Whatever is empty, the rest is there: the bias above all."""
    for sizes in itertools.product((0, 2), (0, 1, 3), (0, 5), (0, 7), (0, 2), (0, 3)):
        batch, length, outputs, inputs, factors, rank = sizes
        case = linear_case("", (batch, length), (outputs, inputs), (factors, rank), gain=(outputs,), order=order)
        got = run(case, torch.float32)
        torch.testing.assert_close(got, run(case, torch.float32, "reference"))
        ours, theirs = (gradients(case, torch.float32, backend) for backend in ("cpp", "reference"))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        if inputs == 0:
            assert torch.equal(got, case.inputs(torch.float32, CPU)["bias"].expand(batch, length, outputs))


# ---- registration ---------------------------------------------------------------------------------------------------
def internal_calls() -> dict[str, tuple[object, ...]]:
    def made(*shape: int, seed: int = 0) -> Tensor:
        return values(shape, torch.float64, CPU, seed).requires_grad_()

    x, weight, bias, down, up = made(2, 3, 5), made(4, 5), made(4), made(6, 2, 5), made(6, 4, 2)
    coefficients, by_tokens, gain, grad = made(2, 6), made(2, 3, 6), made(4), made(2, 3, 4, seed=9)
    theta, directions, delta = made(2, 3, 5), made(3, 5), made(2, 4, 5, seed=8)
    linear = (x, weight, bias, down, up, coefficients, gain)
    plain = (x, weight, None, down, up, by_tokens, None)
    return {
        "spectral_coefficients": (theta, directions),
        "spectral_coefficients_backward": (by_tokens.detach(), by_tokens.detach(), theta, directions, True, True),
        "spectral_linear-token": (*linear, False, True),
        "spectral_linear-delta": (*linear, True, True),
        "spectral_linear-by-tokens": (*plain, False, False),
        "spectral_linear_backward-token": (grad, *linear, None, made(2, 3, 12).detach(), False, *[True] * 7),
        "spectral_linear_backward-delta": (grad, *linear, delta.detach(), None, True, *[True] * 7),
        "spectral_delta": (down, up, coefficients, gain),
        "spectral_delta_backward": (delta, down, up, coefficients, gain, *[True] * 4),
        "spectral_delta_backward-some": (delta, down, up, coefficients, None, False, True, False, True),
        "delta_linear": (x, weight, bias, delta, gain),
        "delta_linear_backward": (grad, x, weight, bias, delta, gain, *[True] * 5),
        "delta_linear_backward-some": (grad, x, weight, None, delta, None, True, False, True, False, True),
    }


@pytest.mark.parametrize("name", internal_calls())
def test_opcheck(name: str) -> None:
    opcheck(getattr(torch.ops.quaver, name.split("-")[0]).default, internal_calls()[name])


@pytest.mark.parametrize("name", [*(case.name for case in SOME if case.name != "master-delta"), "chosen"])
def test_compiles(name: str) -> None:
    assert_compiles(BY_NAME[name], torch.float32, "aot_eager")


@pytest.mark.parametrize("name", ["token", "delta"])
def test_compiles_with_inductor(name: str) -> None:
    assert_compiles(BY_NAME[name], torch.float32, "inductor")


def test_compiles_with_dynamic_shapes() -> None:
    """One function for lengths on both sides of where the order changes (6.4), and for more samples."""
    inputs = linear_case("", (5, 40), (16, 12)).inputs(torch.float32, CPU)
    tensors = [inputs.pop(name).requires_grad_() for name in ("weight", "bias", "down", "up")]

    def function(x: Tensor, coefficients: Tensor) -> Tensor:
        return spectral_linear(x, *tensors, coefficients) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((2, 3), (3, 9), (5, 40)):
        x, coefficients = inputs["x"][:batch, :length], inputs["coefficients"][:batch]
        got, expected = compiled(x, coefficients), function(x, coefficients)
        assert torch.equal(got, expected)
        for one, other in zip(
            torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("order", ORDERS)
def test_transforms_take_the_reference(order: str) -> None:
    inputs = linear_case("", (3, 4), (6, 5), order=order).inputs(torch.float64, CPU)

    def function(x: Tensor, coefficients: Tensor) -> Tensor:
        return spectral_linear(**{**inputs, "x": x, "coefficients": coefficients})

    x, coefficients = inputs["x"], inputs["coefficients"]
    batched = torch.func.vmap(lambda x, c: function(x.unsqueeze(0), c.unsqueeze(0)).squeeze(0))
    names = dispatched(lambda: batched(x, coefficients))
    assert not [name for name in names if name.startswith("quaver::")]
    with use_backend("reference"):
        expected = function(x, coefficients)
    torch.testing.assert_close(batched(x, coefficients), expected)
    _, tangent = torch.func.jvp(lambda c: function(x, c), (coefficients,), (coefficients,))
    plain = F.linear(x, inputs["weight"], inputs["bias"])
    torch.testing.assert_close(tangent, expected - plain)
    gradient = torch.func.grad(lambda x: function(x, coefficients).sum())(x)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(function(leaf, coefficients).sum(), leaf)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, order: str) -> None:
    inputs = linear_case("", (3, 12), (37, 24), gain=(37,), order=order).inputs(torch.float32, CPU)
    theta, directions = (values(shape, torch.float32, CPU, 20).mul(50).requires_grad_() for shape in ((3, 6), (2, 6)))
    del inputs["coefficients"]
    leaves = [x.requires_grad_() for x in inputs.values() if isinstance(x, Tensor)] + [theta, directions]

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        coefficients = spectral_coefficients(theta, directions)
        delta = spectral_delta(inputs["down"], inputs["up"], coefficients)
        return (
            spectral_linear(**{**inputs, "x": x, "coefficients": coefficients}),
            delta_linear(x, inputs["weight"], inputs["bias"], delta, gain=inputs["gain"]),
        )

    outside, expected = spectral_coefficients(theta, directions), function(inputs["x"].to(dtype))
    with torch.autocast("cpu", dtype):
        got = function(inputs["x"])
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(inputs["x"])
        # Angles of thousands in 16 bits would be off by whole turns.
        assert torch.equal(spectral_coefficients(theta, directions), outside)
    for one, other, third in zip(got, expected, compiled, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)
        assert torch.equal(third, other)
    grads = torch.autograd.grad(sum(x.float().sum() for x in got), leaves)
    assert {grad.dtype for grad in grads} == {torch.float32}
    wide = linear_case("", (3, 12), (37, 24)).inputs(torch.float64, CPU)
    with torch.autocast("cpu", dtype):
        assert spectral_linear(**wide).dtype == torch.float64
