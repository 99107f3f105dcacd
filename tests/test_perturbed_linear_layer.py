"""PerturbedLinear: nn.Linear's state, the intensity, learned sigmas, compilation, and shards in two processes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from op_checks import CPU
from torch import nn

import quaver
from quaver import PerturbedLinear
from quaver.kernels._cases import values

ROOT = Path(__file__).parents[1]


def layer(**arguments: object) -> PerturbedLinear:
    torch.manual_seed(0)
    return PerturbedLinear(7, 5, **arguments)  # type: ignore[arg-type]


X = values((3, 7), torch.float32, CPU)


def test_is_a_linear_layer_at_intensity_zero() -> None:
    ours, plain = layer(intensity=0.0), nn.Linear(7, 5)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours(X), plain(X))
    assert isinstance(ours, nn.Linear)


def test_the_noise_is_relative_to_the_spread_of_the_weights() -> None:
    ours = layer(intensity=0.3, seed=11, stream=4)
    expected = quaver.perturbed_linear(
        X,
        ours.weight,
        ours.bias,
        sigma=0.3 * ours.weight.std().detach(),
        bias_sigma=0.3 * ours.bias.std().detach(),
        seed=11,
        stream=4,
    )
    torch.testing.assert_close(ours(X), expected)
    assert torch.equal(ours(X), ours(X))
    before = ours(X)
    ours.seed = 12
    assert not torch.equal(ours(X), before)
    ours.intensity = 0.0
    assert ours.intensity == 0.0
    assert torch.equal(ours(X), nn.functional.linear(X, ours.weight, ours.bias))


def test_sigma_is_detached() -> None:
    ours = layer(intensity=0.3, seed=1)
    ours(X).sum().backward()
    assert ours.weight.grad is not None
    torch.testing.assert_close(ours.weight.grad, X.sum(0).expand(5, 7))


def test_a_bias_of_one_element_has_no_noise_and_one_may_be_left_out() -> None:
    one = PerturbedLinear(7, 1, intensity=0.5, seed=3)
    with torch.no_grad():
        one.weight.zero_()
    assert torch.equal(one(X), one.bias.expand(3, 1))
    still = layer(perturb_bias=False, seed=3)
    with torch.no_grad():
        still.weight.zero_()
    assert torch.equal(still(X), still.bias.expand(3, 5))
    assert PerturbedLinear(7, 5, bias=False, seed=3)(X).shape == (3, 5)


@pytest.mark.parametrize(
    "learnable, shapes", [("scalar", ((), ())), ("row", ((5, 1), (5,))), ("element", ((5, 7), (5,)))]
)
def test_learned_sigmas(learnable: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    ours = layer(learnable_sigma=learnable, initial_sigma=0.2, seed=5)
    assert ours.sigma is not None
    assert ours.bias_sigma is not None
    assert (ours.sigma.shape, ours.bias_sigma.shape) == shapes
    assert [name for name, _ in ours.named_parameters()] == ["weight", "bias", "sigma", "bias_sigma"]
    ours(X).square().sum().backward()
    for parameter in ours.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


def test_the_state_is_that_of_linear() -> None:
    plain, ours = nn.Linear(7, 5), layer(intensity=0.2)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours.weight, plain.weight)
    learned = layer(learnable_sigma="row", initial_sigma=0.4)
    learned.load_state_dict(plain.state_dict())
    assert learned.sigma is not None
    assert (learned.sigma == 0.4).all()
    other = layer(learnable_sigma="row", initial_sigma=0.1)
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other.sigma, learned.sigma)  # type: ignore[arg-type]
    nested = nn.Sequential(layer(learnable_sigma="row"))
    nested.load_state_dict(nn.Sequential(plain).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        nested.load_state_dict({})


def test_populations() -> None:
    ours = layer(intensity=0.3, seed=torch.tensor([3, 4]))
    got = ours(X)
    assert got.shape == (2, 3, 5)
    for p, seed in enumerate((3, 4)):
        ours.seed = seed
        assert torch.equal(got[p], ours(X))
    ours.seed, ours.intensity = torch.tensor([3, 4]), 0.0
    assert torch.equal(ours(X)[0], ours(X)[1])
    assert ours(X).shape == (2, 3, 5)


def test_a_schedule_compiles_twice_at_most() -> None:
    ours = layer(intensity=0.3, seed=torch.tensor(1))
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for intensity in (0.0, 0.1, 0.2, 0.35, 0.0):
        ours.intensity = intensity
        torch.testing.assert_close(compiled(X), ours(X))
    assert counter.frame_count == 2


def test_copies_moves_and_dtypes() -> None:
    ours = layer(intensity=0.3, seed=2)
    copied = copy.deepcopy(ours)
    assert torch.equal(copied(X), ours(X))
    half = copy.deepcopy(ours).to(torch.bfloat16)
    assert half(X.bfloat16()).dtype == torch.bfloat16
    assert (half(X.bfloat16()).float() - ours(X)).abs().max() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(X).dtype == torch.bfloat16
    assert "intensity=0.3, distribution='normal'" in repr(ours)


BAD = [
    (
        lambda: layer(learnable_sigma="column"),
        ValueError,
        "learnable_sigma: expected None, scalar, row, element, got 'c",
    ),
    (
        lambda: layer(distribution="cauchy"),
        ValueError,
        "distribution: expected one of normal, rademacher, got 'cauchy'",
    ),
    (lambda: layer(stream=-1), ValueError, "stream: expected a value in [0, 2^32), got -1"),
    (lambda: layer(seed=1.5), TypeError, "seed: expected an int or an int64 tensor, got float"),
    (lambda: layer(intensity="much"), TypeError, "intensity: expected a float, got str"),
    (lambda: layer()(torch.zeros(3, 8)), ValueError, "x: expected [.., 7] for a weight [5, 7], got [3, 8]"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value).startswith(message)


@pytest.mark.slow
def test_shards_in_two_processes() -> None:
    """Column- and row-parallel layers of two gloo processes: equal noise, results and gradients equal to rounding."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = ROOT / "tests/sharded_layers.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = ["bits equal", "None: equal", "scalar: equal", "row: equal", "element: equal", "fully sharded: equal"]
    assert done.stdout.splitlines() == expected
