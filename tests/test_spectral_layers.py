"""SpectralBank and SpectralLinear: layers that share the factors of their modulation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quaver.pymodels.layers import Modulation, SpectralBank, SpectralLinear


def bank(*, seed: int = 0) -> SpectralBank:
    """Of 12 x 20 with an `up` that is not zero."""
    torch.manual_seed(seed)
    module = SpectralBank(coordinates=16, directions=3, rank=2, in_features=12, out_features=20)
    with torch.no_grad():
        module.up.normal_()
    return module


def effective(factors: SpectralBank, layer: SpectralLinear, theta: torch.Tensor) -> torch.Tensor:
    """The weight of each sample by the formula."""
    angles = theta @ factors.directions.T
    coefficients = torch.cat((angles.cos(), angles.sin()), 1)
    delta = torch.einsum("bi,inr,irk->bnk", coefficients, factors.up, factors.down)
    gain = layer.gain if layer.gain.dim() == 0 else layer.gain[:, None]
    return layer.weight + gain * delta[:, : layer.out_features, : layer.in_features]


@pytest.mark.parametrize("by_delta", [True, False])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("sizes", [(12, 20), (12, 7), (5, 20), (5, 7)], ids=str)
def test_weights_follow_the_coordinates(sizes: tuple[int, int], by_row: bool, by_delta: bool) -> None:
    factors, layer = bank(), SpectralLinear(*sizes, gain_by_row=by_row)
    with torch.no_grad():
        layer.gain.normal_()
    theta, x = torch.randn(3, 16), torch.randn(3, 9, sizes[0])
    expected = torch.einsum("btk,bnk->btn", x, effective(factors, layer, theta)) + layer.bias
    torch.testing.assert_close(layer(x, factors(theta, by_delta=by_delta)), expected, rtol=1e-5, atol=1e-5)


def test_coordinates_by_tokens_are_those_of_a_sample_where_they_agree() -> None:
    factors, layer, theta, x = bank(), SpectralLinear(12, 20), torch.randn(3, 16), torch.randn(3, 9, 12)
    by_tokens = factors(theta[:, None].expand(3, 9, 16))
    assert by_tokens.delta is None
    torch.testing.assert_close(layer(x, by_tokens), layer(x, factors(theta)), rtol=1e-5, atol=1e-5)


def test_it_begins_and_without_a_modulation_stays_a_plain_linear_layer() -> None:
    factors, layer, x = SpectralBank(16, 3, 2, 12, 20), SpectralLinear(12, 20), torch.randn(3, 9, 12)
    plain = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain)
    torch.testing.assert_close(layer(x, factors(torch.randn(3, 16))), plain, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        layer.gain.zero_()
    torch.testing.assert_close(layer(x, bank()(torch.randn(3, 16))), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by_delta", [True, False])
def test_every_parameter_learns_through_two_layers(by_delta: bool) -> None:
    factors, first, second = bank(), SpectralLinear(12, 20), SpectralLinear(12, 7, gain_by_row=True)
    theta, x = torch.randn(3, 16, requires_grad=True), torch.randn(3, 9, 12)
    modulation = factors(theta, by_delta=by_delta)
    (first(x, modulation).square().sum() + second(x, modulation).square().sum()).backward()
    modules = nn.ModuleList([factors, first, second])
    grads = {name: parameter.grad for name, parameter in [*modules.named_parameters(), ("theta", theta)]}
    for name, grad in grads.items():
        assert grad is not None, name
        assert grad.abs().sum() > 0, name
    # The bank's gradient is the sum of both layers'.
    expected = torch.zeros(())
    for layer in (first, second):
        weights = effective(factors, layer, theta)
        expected = expected + (torch.einsum("btk,bnk->btn", x, weights) + layer.bias).square().sum()
    wanted = torch.autograd.grad(expected, [factors.up, factors.down, factors.directions, theta])
    found = [grads[name] for name in ("0.up", "0.down", "0.directions", "theta")]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_bank_is_in_the_state_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = bank()
            self.layers = nn.ModuleList([SpectralLinear(12, 12) for _ in range(3)])

        def forward(self, x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
            modulation = self.bank(theta)
            for layer in self.layers:
                x = layer(x, modulation)
            return x

    model = Model()
    assert sum("down" in name for name in model.state_dict()) == 1
    x, theta = torch.randn(2, 5, 12), torch.randn(2, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, theta), model(x, theta))


def test_under_autocast_angles_are_float32() -> None:
    factors, layer, theta, x = bank(), SpectralLinear(12, 20), 30 * torch.randn(3, 16), torch.randn(3, 9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        modulation = factors(theta)
        y = layer(x, modulation)
    assert y.dtype == torch.bfloat16
    assert torch.equal(modulation.coefficients, factors(theta).coefficients)
    torch.testing.assert_close(y.float(), layer(x, factors(theta)), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 3, 2, 12, 20), "coordinates: expected at least 1, got 0"),
        ((16, 3, 0, 12, 20), "rank: expected at least 1, got 0"),
        ((16, 3, 2, 12, -1), "out_features: expected at least 1, got -1"),
    ],
)
def test_bad_sizes_are_named(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        SpectralBank(*arguments)
    assert message in str(raised.value)


def test_what_does_not_fit_is_named() -> None:
    factors, x = bank(), torch.randn(3, 9, 12)
    with pytest.raises(ValueError, match=r"at least 12 inputs and 21 outputs, got 12 and 20"):
        SpectralLinear(12, 21)(x, factors(torch.randn(3, 16)))
    with pytest.raises(ValueError, match=r"theta: expected \[B, C\]"):
        factors(torch.randn(16))
    with pytest.raises(ValueError, match=r"delta: expected \[3, 20, 12\]"):
        SpectralLinear(12, 20)(x, factors(torch.randn(2, 16)))
    with pytest.raises(ValueError, match="coefficients"):
        factors(torch.randn(3, 9, 16), by_delta=True)


@pytest.mark.slow
@pytest.mark.parametrize("by_delta", [True, False])
def test_int8_weights_of_torchao(by_delta: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    factors = SpectralBank(16, 3, 2, 64, 64)
    layer, theta, x = SpectralLinear(64, 64).eval(), torch.randn(3, 16), torch.randn(3, 9, 64)
    with torch.no_grad():
        factors.up.normal_(std=0.1)
        before = layer(x, factors(theta, by_delta=by_delta)), layer(x)
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
        after = layer(x, factors(theta, by_delta=by_delta)), layer(x)
        assert type(layer.weight) is not nn.Parameter
        # The whole weight is used: rounding to 8 bits changes results by some of 1 / 256 of the largest weight.
        for one, other in zip(after, before, strict=True):
            assert not torch.equal(one, other)
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
        # And the modulation is what it was: the difference from the plain layer has the same values.
        torch.testing.assert_close(after[0] - after[1], before[0] - before[1], rtol=1e-4, atol=1e-4)


def test_a_modulation_is_a_tuple_of_tensors() -> None:
    """So that torch.utils.checkpoint and torch.compile see through it."""
    modulation = bank()(torch.randn(3, 16))
    assert isinstance(modulation, Modulation)
    assert all(isinstance(part, torch.Tensor) for part in modulation)
