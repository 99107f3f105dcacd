"""Checks the arguments of the public functions and brings them into the form that the ops take."""

from typing import NamedTuple

from torch import Tensor

from .._autocast import autocast
from .._seeds import FLOATING, check_floating, compute_dtype
from .orders import Sizes, forward_by_delta

ORDERS = ("token", "delta")


class Linear(NamedTuple):
    """The arguments of spectral_linear, in order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    coefficients: Tensor
    gain: Tensor | None
    by_delta: bool


class Delta(NamedTuple):
    """The arguments of spectral_delta, in order."""

    down: Tensor
    up: Tensor
    coefficients: Tensor
    gain: Tensor | None


class DeltaLinear(NamedTuple):
    """The arguments of delta_linear, in order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    delta: Tensor
    gain: Tensor | None


def _check_like(name: str, tensor: Tensor, like: Tensor, of: str) -> None:
    """A tensor on the device of `like`, in its dtype or the one that arithmetic on that runs in."""
    check_floating(name, tensor)
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, as {of} is, got one on {tensor.device}")
    wide = compute_dtype(like.dtype)
    if tensor.dtype not in (like.dtype, wide):
        also = "" if wide == like.dtype else f" or {wide}"
        raise TypeError(f"{name}: expected {like.dtype}{also} with {of} of {like.dtype}, got {tensor.dtype}")


def _check_x(x: Tensor) -> None:
    check_floating("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected [B, T, K], got {list(x.shape)}")


def _check_weight(x: Tensor, weight: Tensor) -> None:
    _check_like("weight", weight, x, "an x")
    if weight.dim() != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"weight: expected [N, {x.shape[2]}] for x {list(x.shape)}, got {list(weight.shape)}")


def _check_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        return
    _check_like("bias", bias, x, "an x")
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias: expected {weight.dtype}, as the weight has, got {bias.dtype}")
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(
            f"bias: expected [{weight.shape[0]}] for a weight {list(weight.shape)}, got {list(bias.shape)}"
        )


def _check_factors(down: Tensor, up: Tensor) -> None:
    """Both of three dimensions, with the same number of factors and the same rank, and of one dtype."""
    check_floating("down", down)
    check_floating("up", up)
    if down.dim() != 3:
        raise ValueError(f"down: expected [2n, r, K], got {list(down.shape)}")
    if up.dim() != 3 or up.shape[0] != down.shape[0] or up.shape[2] != down.shape[1]:
        raise ValueError(
            f"up: expected [{down.shape[0]}, N, {down.shape[1]}] for down {list(down.shape)}, got {list(up.shape)}"
        )
    if up.device != down.device:
        raise ValueError(f"up: expected a tensor on {down.device}, as down is, got one on {up.device}")
    if up.dtype != down.dtype:
        raise TypeError(f"up: expected {down.dtype}, as down has, got {up.dtype}")


def _check_fit(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> None:
    if down.shape[2] != x.shape[2]:
        raise ValueError(f"down: expected [2n, r, {x.shape[2]}] for x {list(x.shape)}, got {list(down.shape)}")
    if up.shape[1] != weight.shape[0]:
        raise ValueError(
            f"up: expected [2n, {weight.shape[0]}, r] for a weight {list(weight.shape)}, got {list(up.shape)}"
        )


def _gain(gain: Tensor | None, like: Tensor, of: str, outputs: int) -> Tensor | None:
    """The gain in the dtype that arithmetic runs in, 0-dim or [N]."""
    if gain is None:
        return None
    if not isinstance(gain, Tensor):
        raise TypeError(f"gain: expected a tensor or None, got {type(gain).__name__}")
    _check_like("gain", gain, like, of)
    if gain.dim() != 0 and tuple(gain.shape) != (outputs,):
        raise ValueError(f"gain: expected a 0-dim tensor or [{outputs}], got {list(gain.shape)}")
    return gain.to(compute_dtype(like.dtype))


def _sample_coefficients(coefficients: Tensor, down: Tensor) -> Tensor:
    """[B, 2n] for spectral_delta."""
    _check_like("coefficients", coefficients, down, "down")
    factors = down.shape[0]
    if coefficients.dim() == 3:
        raise ValueError(
            f"coefficients: Delta has one for each sample, expected [B, {factors}], got {list(coefficients.shape)}"
        )
    if coefficients.dim() != 2 or coefficients.shape[1] != factors:
        raise ValueError(
            f"coefficients: expected [B, {factors}] for down {list(down.shape)}, got {list(coefficients.shape)}"
        )
    return coefficients.to(compute_dtype(down.dtype))


def _check_coefficients(coefficients: Tensor, x: Tensor, down: Tensor) -> None:
    _check_like("coefficients", coefficients, x, "an x")
    batch, length, _ = x.shape
    factors = down.shape[0]
    if tuple(coefficients.shape) not in ((batch, factors), (batch, length, factors)):
        raise ValueError(
            f"coefficients: expected [{batch}, {factors}] or [{batch}, {length}, {factors}] for x {list(x.shape)} and "
            f"down {list(down.shape)}, got {list(coefficients.shape)}"
        )


def _usual(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, coefficients: Tensor) -> bool:
    """Whether these fit, have one dtype and coefficients by samples: what the checks one by one would allow.

    The weights of a decoder empty the caches, and then those checks take 25 of 300 us, these 5.
    """
    for tensor in (x, weight, down, up, coefficients):
        if not isinstance(tensor, Tensor) or tensor.dtype is not x.dtype or tensor.device != x.device:
            return False
    if x.dtype not in FLOATING or x.dim() != 3 or down.dim() != 3 or weight.dim() != 2:
        return False
    (batch, _, inputs), (factors, rank, depth), (outputs, columns) = x.shape, down.shape, weight.shape
    return (
        inputs == depth == columns and up.shape == (factors, outputs, rank) and coefficients.shape == (batch, factors)
    )


def _by_delta(order: str | None, x: Tensor, weight: Tensor, down: Tensor, coefficients: Tensor) -> bool:
    if order is not None and order not in ORDERS:
        raise ValueError(f"order: expected {', '.join(map(repr, ORDERS))} or None, got {order!r}")
    if coefficients.dim() == 3:
        if order == "delta":
            raise ValueError("order: 'delta' needs coefficients by samples, [B, 2n], got coefficients by tokens")
        return False
    if order is not None:
        return order == "delta"
    (_, tokens, inputs), outputs = x.shape, weight.shape[0]
    # Each sample's Delta takes N K a factor at least: a decoder's call saves 2 us here.
    if tokens * (inputs + outputs) * down.shape[1] <= inputs * outputs:
        return False
    return forward_by_delta(Sizes.of(x, weight, down))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    gain: Tensor | None,
    order: str | None,
) -> Linear:
    """Checked arguments of spectral_linear.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    x = autocast(x)
    if not _usual(x, weight, down, up, coefficients):
        _check_x(x)
        _check_weight(x, weight)
        _check_factors(down, up)
        _check_like("down", down, x, "an x")
        _check_fit(x, weight, down, up)
        _check_coefficients(coefficients, x, down)
    _check_bias(x, weight, bias)
    wide = compute_dtype(x.dtype)
    if coefficients.dtype is not wide:
        coefficients = coefficients.to(wide)
    gain = _gain(gain, x, "an x", weight.shape[0])
    return Linear(x, weight, bias, down, up, coefficients, gain, _by_delta(order, x, weight, down, coefficients))


def delta(down: Tensor, up: Tensor, coefficients: Tensor, gain: Tensor | None) -> Delta:
    """Checked arguments of spectral_delta.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    _check_factors(down, up)
    coefficients = _sample_coefficients(coefficients, down)
    return Delta(down, up, coefficients, _gain(gain, down, "down", up.shape[1]))


def delta_linear(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, gain: Tensor | None) -> DeltaLinear:
    """Checked arguments of delta_linear.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    x = autocast(x)
    _check_x(x)
    _check_weight(x, weight)
    _check_bias(x, weight, bias)
    _check_like("delta", delta, x, "an x")
    expected = (x.shape[0], *weight.shape)
    if tuple(delta.shape) != expected:
        raise ValueError(
            f"delta: expected {list(expected)} for x {list(x.shape)} and a weight {list(weight.shape)}, "
            f"got {list(delta.shape)}"
        )
    return DeltaLinear(x, weight, bias, delta, _gain(gain, x, "an x", weight.shape[0]))


def coefficients(theta: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Checked arguments of spectral_coefficients, in the dtype that angles are computed in.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    check_floating("theta", theta)
    if theta.dim() not in (2, 3):
        raise ValueError(f"theta: expected [B, C] or [B, T, C], got {list(theta.shape)}")
    check_floating("directions", directions)
    if directions.device != theta.device:
        raise ValueError(
            f"directions: expected a tensor on {theta.device}, as theta is, got one on {directions.device}"
        )
    if compute_dtype(directions.dtype) != compute_dtype(theta.dtype):
        raise TypeError(f"directions: expected a dtype beside {theta.dtype}, as theta has, got {directions.dtype}")
    if directions.dim() != 2 or directions.shape[1] != theta.shape[-1]:
        raise ValueError(
            f"directions: expected [n, {theta.shape[-1]}] for theta {list(theta.shape)}, got {list(directions.shape)}"
        )
    wide = compute_dtype(theta.dtype)
    return theta.to(wide), directions.to(wide)
