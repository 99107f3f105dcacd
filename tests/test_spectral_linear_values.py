"""spectral_linear: what it computes, by other means: LoRA, a shared Delta, angles, NaN, higher derivatives."""

import pytest
import torch
from op_checks import CPU, LEVELS
from torch import Tensor
from torch.nn import functional as F

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
from quaver.kernels.spectral_linear.cases import CASES

BY_NAME = {case.name: case for case in CASES}


# ---- what it means --------------------------------------------------------------------------------------------------
def lora(
    x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, scaling: float, order: str | None
) -> Tensor:
    """A LoRA linear: one angle of 0, whose cosine is 1 and whose sine takes the second factor away."""
    theta, directions = torch.zeros(x.shape[0], 1, dtype=x.dtype), torch.ones(1, 1, dtype=x.dtype)
    downs, ups = (torch.stack([factor, torch.full_like(factor, 3.0)]) for factor in (down, up))
    gain = torch.tensor(scaling, dtype=x.dtype)
    coefficients = spectral_coefficients(theta, directions)
    assert torch.equal(coefficients, torch.tensor([[1.0, 0.0]], dtype=x.dtype).expand(x.shape[0], 2))
    return spectral_linear(x, weight, bias, downs, ups, coefficients, gain=gain, order=order)


@pytest.mark.parametrize("order", [None, *ORDERS])
def test_lora_is_one_angle_of_zero(order: str | None) -> None:
    shapes = ((2, 9, 12), (10, 12), (10,), (4, 12), (10, 4))
    leaves = [values(shape, torch.float64, CPU, i).requires_grad_() for i, shape in enumerate(shapes)]
    x, weight, bias, down, up = leaves
    expected = F.linear(x, weight, bias) + 0.5 * F.linear(F.linear(x, down), up)
    got = lora(*leaves, 0.5, order)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grad = values(expected.shape, torch.float64, CPU, 9)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("order", [None, *ORDERS])
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_agrees_with_the_package_peft(tokens: int, order: str | None) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 40))
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=12, target_modules=["0"], init_lora_weights=False, bias="all")
    )
    layer = model.base_model.model[0]
    x = torch.randn(3, tokens, 48, requires_grad=True)
    leaves = [x, layer.base_layer.weight.requires_grad_(), layer.base_layer.bias]
    leaves += [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    expected, got = model(x), lora(*leaves, 12 / 8, order)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_cosines_and_sines_are_within_two_units_in_the_last_place(level: str) -> None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(200_000, generator=generator, dtype=torch.float64) * 2e4 - 1e4
    quarters = torch.arange(-6366, 6367, dtype=torch.float64) * (torch.pi / 2)  # where one of the two is almost 0
    for dtype in (torch.float32, torch.float64):
        theta = torch.cat([angles, angles / 1e4, angles / 1e12, quarters, torch.zeros(1)]).to(dtype)
        with _library.capped_simd(level):
            got = spectral_coefficients(theta.unsqueeze(1), torch.ones(1, 1, dtype=dtype))
        for ours, function in zip(got.unbind(1), (torch.cos, torch.sin), strict=True):
            exact = function(theta.double())
            unit = torch.finfo(dtype).eps * torch.exp2(exact.abs().log2().floor())
            assert ((ours.double() - exact).abs() <= 2 * unit).all()
    ends = torch.tensor([[float("inf")], [float("nan")], [1e30], [-1e7]])
    got = spectral_coefficients(ends, torch.ones(1, 1))
    assert got[:2].isnan().all()
    torch.testing.assert_close(got[2:], torch.cat([ends.double().cos(), ends.double().sin()], 1)[2:].float())


def test_layers_that_share_a_delta_are_each_their_own_call() -> None:
    inputs = BY_NAME["delta"].inputs(torch.float64, CPU)
    factors = {key: inputs[key].requires_grad_() for key in ("down", "up", "coefficients")}
    gains = [values((53,), torch.float64, CPU, seed).requires_grad_() for seed in (11, 12)]
    weights = [values((53, 37), torch.float64, CPU, seed).requires_grad_() for seed in (13, 14)]
    leaves = [*factors.values(), *gains, *weights]
    delta = spectral_delta(**factors)
    shared, alone = [], []
    for weight, gain in zip(weights, gains, strict=True):
        shared.append(delta_linear(inputs["x"], weight, inputs["bias"], delta, gain=gain))
        alone.append(spectral_linear(inputs["x"], weight, inputs["bias"], **factors, gain=gain, order="token"))
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    for one, other in zip(
        torch.autograd.grad(sum(x.square().sum() for x in shared), leaves),
        torch.autograd.grad(sum(x.square().sum() for x in alone), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def spoilt(case: Case, name: str, place: tuple[int, ...], bad: float) -> Tensor:
    inputs = case.inputs(torch.float32, CPU)
    inputs[name] = inputs[name].clone()
    inputs[name][place] = bad
    return case.function(**inputs).isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["token", "delta", "by-tokens", "decode-some", "decode-in-order", "delta-deep", "delta_linear"]
)
def test_nan_and_infinity_reach_only_what_depends_on_them(name: str, bad: float) -> None:
    case = BY_NAME[name]
    inputs = case.inputs(torch.float32, CPU)
    batch, length, outputs = case.function(**inputs).shape
    ok = torch.ones(batch, length, outputs, dtype=torch.bool)
    b, t, n = batch - 1, length // 2, outputs - 1
    of_row, of_sample, of_column = ok.clone(), ok.clone(), ok.clone()
    of_row[b, t], of_sample[b], of_column[:, :, n] = False, False, False
    places = {
        "x": ((b, t, 1), of_row),
        "weight": ((n, 2), of_column),
        "bias": ((n,), of_column),
        "up": ((1, n, 0), of_column),
        "coefficients": ((b, 1), of_sample),
        "gain": ((n,), of_column),
        "delta": ((b, n, 3), of_column | torch.arange(batch).ne(b)[:, None, None]),
    }
    if name == "by-tokens":
        places["coefficients"] = ((b, t, 1), of_row)
    for key, (place, expected) in places.items():
        if isinstance(inputs.get(key), Tensor):
            found = spoilt(case, key, place, bad)
            # All that depends on it is spoilt, and nothing else.
            assert torch.equal(found, expected), key


@pytest.mark.parametrize("name", ["token", "delta", "by-tokens"])
def test_a_gradient_of_nan_reaches_only_what_depends_on_it(name: str) -> None:
    case = BY_NAME[name]
    inputs = case.inputs(torch.float32, CPU)
    leaves = {key: inputs[key].detach().requires_grad_() for key in case.differentiable}
    out = case.function(**{**inputs, **leaves})
    grad = torch.ones_like(out)
    grad[1, 2, 5] = float("nan")
    found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
    finite = {key: x.isfinite() for key, x in found.items()}
    for key, axes in {"x": (0, 1), "weight": (0,), "bias": (0,), "up": (1,), "gain": (0,)}.items():
        expected = torch.ones_like(finite[key])
        at = dict(zip(axes, (1, 2) if key == "x" else (5,), strict=True))
        expected[tuple(at.get(axis, slice(None)) for axis in range(expected.dim()))] = False
        assert torch.equal(finite[key], expected), key
    expected = torch.ones_like(finite["coefficients"])
    expected[(1, 2) if name == "by-tokens" else (1,)] = False
    assert torch.equal(finite["coefficients"], expected)


# ---- derivatives ----------------------------------------------------------------------------------------------------
def test_penalty_on_gradients_through_two_layers() -> None:
    """A penalty on gradients differentiates the backward ops: it equals the reference's."""

    def penalty(backend: str) -> list[Tensor]:
        shapes = ((2, 5, 8), (8, 8), (4, 3, 8), (4, 8, 3), (2, 3), (2, 3), (8,))
        leaves = [values(shape, torch.float64, CPU, i).requires_grad_() for i, shape in enumerate(shapes)]
        x, weight, down, up, theta, directions, gain = leaves
        with use_backend(backend):
            coefficients = spectral_coefficients(theta, directions)
            hidden = torch.tanh(spectral_linear(x, weight, None, down, up, coefficients, gain=gain, order="token"))
            shift = spectral_delta(down, up, coefficients, gain=gain)
            out = delta_linear(hidden, weight, None, shift) + spectral_linear(
                hidden, weight, None, down, up, coefficients, order="delta"
            )
        (of_x,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(of_x.square().sum(), leaves))

    for ours, theirs in zip(penalty("cpp"), penalty("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("order", ORDERS)
def test_third_derivatives(order: str) -> None:
    """With a graph asked for, the derivative of a backward op has one too."""

    def third(backend: str) -> Tensor:
        shapes = ((2, 3, 4), (5, 4), (5,), (2, 2, 4), (2, 5, 2), (2, 1), (1, 1))
        leaves = [values(shape, torch.float64, CPU, i).requires_grad_() for i, shape in enumerate(shapes)]
        *tensors, theta, directions = leaves
        with use_backend(backend):
            total = spectral_linear(*tensors, spectral_coefficients(theta, directions), order=order).square().sum()
            for _ in range(3):
                (of_theta,) = torch.autograd.grad(total, theta, create_graph=True)
                total = of_theta.square().sum()
        return of_theta

    torch.testing.assert_close(third("cpp"), third("reference"), rtol=1e-8, atol=1e-10)
