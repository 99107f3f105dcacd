"""spectral_linear, spectral_delta, delta_linear and spectral_coefficients: wrong calls and what is said of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quaver.kernels import delta_linear, spectral_coefficients, spectral_delta, spectral_linear

X, W, B = torch.zeros(2, 3, 5), torch.zeros(4, 5), torch.zeros(4)
DOWN, UP, C, D = torch.zeros(6, 2, 5), torch.zeros(6, 4, 2), torch.zeros(2, 6), torch.zeros(2, 4, 5)
THETA, DIRECTIONS = torch.zeros(2, 7), torch.zeros(3, 7)
META = torch.device("meta")


def linear(**changes: Any) -> Tensor:
    return spectral_linear(**{"x": X, "weight": W, "bias": None, "down": DOWN, "up": UP, "coefficients": C, **changes})


def shift(**changes: Any) -> Tensor:
    return spectral_delta(**{"down": DOWN, "up": UP, "coefficients": C, **changes})


def shifted(**changes: Any) -> Tensor:
    return delta_linear(**{"x": X, "weight": W, "bias": None, "delta": D, **changes})


def turned(theta: Any = THETA, directions: Any = DIRECTIONS) -> Tensor:
    return spectral_coefficients(theta, directions)


FLOATS = "expected float64, float32, bfloat16 or float16, got"
BAD = [
    (lambda: linear(x=[1.0]), TypeError, "x: expected a tensor, got list"),
    (lambda: linear(x=X.long()), TypeError, f"x: {FLOATS} torch.int64"),
    (lambda: linear(x=X[0]), ValueError, "x: expected [B, T, K], got [3, 5]"),
    (lambda: linear(weight=None), TypeError, "weight: expected a tensor, got NoneType"),
    (lambda: linear(weight=W.to(META)), ValueError, "weight: expected a tensor on cpu, as an x is, got one on meta"),
    (
        lambda: linear(weight=W.half()),
        TypeError,
        "weight: expected torch.float32 with an x of torch.float32, got torch.f",
    ),
    (
        lambda: linear(x=X.half(), weight=W.bfloat16()),
        TypeError,
        "weight: expected torch.float16 or torch.float32 with an x of torch.float16, got torch.bfloat16",
    ),
    (
        lambda: linear(x=X.int(), weight=W.int(), down=DOWN.int(), up=UP.int(), coefficients=C.int()),
        TypeError,
        f"x: {FLOATS} torch.int32",
    ),
    (lambda: linear(weight=W[:, :4]), ValueError, "weight: expected [N, 5] for x [2, 3, 5], got [4, 4]"),
    (lambda: shifted(bias=torch.zeros(5)), ValueError, "bias: expected [4] for a weight [4, 5], got [5]"),
    (lambda: linear(weight=W.t()), ValueError, "weight: expected [N, 5] for x [2, 3, 5], got [5, 4]"),
    (lambda: linear(weight=B), ValueError, "weight: expected [N, 5] for x [2, 3, 5], got [4]"),
    (lambda: linear(bias=torch.zeros(5)), ValueError, "bias: expected [4] for a weight [4, 5], got [5]"),
    (
        lambda: linear(x=X.half(), weight=W.half(), bias=B),
        TypeError,
        "bias: expected torch.float16, as the weight has, got torch.float32",
    ),
    (lambda: linear(down=DOWN.flatten(0, 1)), ValueError, "down: expected [2n, r, K], got [12, 5]"),
    (lambda: linear(down=DOWN.int()), TypeError, f"down: {FLOATS} torch.int32"),
    (lambda: linear(down=DOWN[..., :4]), ValueError, "down: expected [2n, r, 5] for x [2, 3, 5], got [6, 2, 4]"),
    (
        lambda: linear(down=DOWN.double(), up=UP.double()),
        TypeError,
        "down: expected torch.float32 with an x of torch.float32, got torch.float64",
    ),
    (lambda: linear(up=UP[:4]), ValueError, "up: expected [6, N, 2] for down [6, 2, 5], got [4, 4, 2]"),
    (lambda: linear(up=UP[..., :1]), ValueError, "up: expected [6, N, 2] for down [6, 2, 5], got [6, 4, 1]"),
    (lambda: linear(up=UP[:, :3]), ValueError, "up: expected [2n, 4, r] for a weight [4, 5], got [6, 3, 2]"),
    (lambda: linear(up=UP.double()), TypeError, "up: expected torch.float32, as down has, got torch.float64"),
    (lambda: linear(up=UP.to(META)), ValueError, "up: expected a tensor on cpu, as down is, got one on meta"),
    (
        lambda: linear(coefficients=C[:, :5]),
        ValueError,
        "coefficients: expected [2, 6] or [2, 3, 6] for x [2, 3, 5] and down [6, 2, 5], got [2, 5]",
    ),
    (
        lambda: linear(coefficients=C[:1]),
        ValueError,
        "coefficients: expected [2, 6] or [2, 3, 6] for x [2, 3, 5] and down [6, 2, 5], got [1, 6]",
    ),
    (
        lambda: linear(coefficients=torch.zeros(2, 4, 6)),
        ValueError,
        "coefficients: expected [2, 6] or [2, 3, 6] for x [2, 3, 5] and down [6, 2, 5], got [2, 4, 6]",
    ),
    (
        lambda: linear(coefficients=C.double()),
        TypeError,
        "coefficients: expected torch.float32 with an x of torch.float32, got torch.float64",
    ),
    (lambda: linear(gain=1.0), TypeError, "gain: expected a tensor or None, got float"),
    (lambda: linear(gain=torch.zeros(5)), ValueError, "gain: expected a 0-dim tensor or [4], got [5]"),
    (lambda: linear(gain=torch.zeros(4, 1)), ValueError, "gain: expected a 0-dim tensor or [4], got [4, 1]"),
    (lambda: linear(gain=B.double()), TypeError, "gain: expected torch.float32 with an x of torch.float32, got torch."),
    (lambda: linear(order="deltas"), ValueError, "order: expected 'token', 'delta' or None, got 'deltas'"),
    (lambda: linear(order=1), ValueError, "order: expected 'token', 'delta' or None, got 1"),
    (
        lambda: linear(order="delta", coefficients=torch.zeros(2, 3, 6)),
        ValueError,
        "order: 'delta' needs coefficients by samples, [B, 2n], got coefficients by tokens",
    ),
    (
        lambda: shift(coefficients=torch.zeros(2, 3, 6)),
        ValueError,
        "coefficients: Delta has one for each sample, expected [B, 6], got [2, 3, 6]",
    ),
    (
        lambda: shift(coefficients=C[:, :4]),
        ValueError,
        "coefficients: expected [B, 6] for down [6, 2, 5], got [2, 4]",
    ),
    (
        lambda: shift(coefficients=C.half()),
        TypeError,
        "coefficients: expected torch.float32 with down of torch.float32",
    ),
    (lambda: shift(up=UP[..., :1]), ValueError, "up: expected [6, N, 2] for down [6, 2, 5], got [6, 4, 1]"),
    (lambda: shift(gain=torch.zeros(3)), ValueError, "gain: expected a 0-dim tensor or [4], got [3]"),
    (
        lambda: shifted(delta=D[:1]),
        ValueError,
        "delta: expected [2, 4, 5] for x [2, 3, 5] and a weight [4, 5], got [1, 4, 5]",
    ),
    (
        lambda: shifted(delta=D[0]),
        ValueError,
        "delta: expected [2, 4, 5] for x [2, 3, 5] and a weight [4, 5], got [4, 5]",
    ),
    (
        lambda: shifted(delta=D.double()),
        TypeError,
        "delta: expected torch.float32 with an x of torch.float32, got torch",
    ),
    (lambda: shifted(gain="x"), TypeError, "gain: expected a tensor or None, got str"),
    (lambda: turned(THETA[0]), ValueError, "theta: expected [B, C] or [B, T, C], got [7]"),
    (lambda: turned(THETA.long()), TypeError, f"theta: {FLOATS} torch.int64"),
    (
        lambda: turned(directions=DIRECTIONS[:, :5]),
        ValueError,
        "directions: expected [n, 7] for theta [2, 7], got [3, 5]",
    ),
    (
        lambda: turned(directions=DIRECTIONS.double()),
        TypeError,
        "directions: expected a dtype beside torch.float32, as theta has, got torch.float64",
    ),
    (
        lambda: turned(directions=DIRECTIONS.to(META)),
        ValueError,
        "directions: expected a tensor on cpu, as theta is, got one on meta",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input_is_named(number: int) -> None:
    call, error, message = BAD[number]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input_is_named_under_compile(number: int) -> None:
    call, _, message = BAD[number]
    with pytest.raises(Exception) as raised:
        torch.compile(call, backend="eager", fullgraph=True)()
    assert message in str(raised.value)


def test_what_is_right_is_taken() -> None:
    """The forms that the wrong ones are beside."""
    narrow = {"x": X.half(), "weight": W, "bias": B, "down": DOWN.half(), "up": UP.half()}
    for changes in (
        {},
        {"gain": torch.tensor(2.0)},
        {"gain": B},
        {"coefficients": torch.zeros(2, 3, 6), "order": "token"},
        {**narrow, "coefficients": C.half(), "gain": B.half()},
        {**narrow, "down": DOWN, "up": UP, "gain": B},
    ):
        assert linear(**changes).shape == (2, 3, 4)
    assert shift(coefficients=C[:0]).shape == (0, 4, 5)
    assert shifted(x=X.half(), delta=D).dtype == torch.float16
    assert turned(THETA.half(), DIRECTIONS).dtype == torch.float32
