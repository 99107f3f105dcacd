"""Calls of the ops of spectral_linear that every check shares, and the rows of the table."""

from typing import Any

import torch
from torch import Tensor

from .._cases import Case, values
from .op import delta_linear, spectral_coefficients, spectral_delta, spectral_linear
from .rows import ROWS

__all__ = ["CASES", "ROWS"]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def laid_out(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int, layout: str, scale: float = 1.0
) -> Tensor:
    """Fixed values; "rows": each a part of a longer one, "strided": not even a row's elements lie side by side."""
    if layout == "rows":
        return (values((*shape[:-1], shape[-1] + 5), dtype, device, seed) * scale)[..., 3:-2]
    if layout == "strided":
        return (values((*shape[:-1], 2 * shape[-1] + 3), dtype, device, seed) * scale)[..., 3::2]
    if layout == "swapped" and len(shape) == 3:  # the first two dimensions in the other order
        return (values((shape[1], shape[0], shape[2]), dtype, device, seed) * scale).transpose(0, 1)
    return values(shape, dtype, device, seed) * scale


def _unit(depth: int) -> float:
    """What keeps a sum of so many products of normal values near 1."""
    return float(max(1, depth) ** -0.5)


def _factors(
    count: int, rank: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, layout: str
) -> dict[str, Tensor]:
    outputs, inputs = shape
    return {
        "down": laid_out((count, rank, inputs), dtype, device, 4, layout, _unit(inputs)),
        "up": laid_out((count, outputs, rank), dtype, device, 5, layout, _unit(count * rank)),
    }


def _gain(shape: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    return None if shape is None else values(shape, _wide(dtype), device, 7)


def linear_case(
    name: str,
    sizes: tuple[int, int],
    shape: tuple[int, int],
    factors: tuple[int, int] = (4, 3),
    *,
    gain: tuple[int, ...] | None = None,
    by_tokens: bool = False,
    bias: bool = True,
    layout: str = "dense",
    master: bool = False,
    scale: float = 1.0,
    **arguments: Any,
) -> Case:
    """sizes: B and T; shape: N and K; factors: how many, and their rank; master: float32 weights beside a 16-bit x."""

    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        (batch, length), (outputs, width), (count, rank) = sizes, shape, factors
        of_weights = _wide(dtype) if master else dtype
        lead = (batch, length, count) if by_tokens else (batch, count)
        return {
            "x": laid_out((batch, length, width), dtype, device, 1, layout, scale),
            "weight": laid_out(shape, of_weights, device, 2, layout, _unit(width)),
            "bias": values((outputs,), of_weights, device, 3) if bias else None,
            **_factors(count, rank, shape, of_weights, device, layout),
            "coefficients": laid_out(lead, _wide(dtype), device, 6, layout),
            "gain": _gain(gain, dtype, device),
            **arguments,
        }

    names = ("x", "weight", *(("bias",) if bias else ()), "down", "up", "coefficients")
    names += () if gain is None else ("gain",)
    return Case(name, spectral_linear, inputs, names, exact=False)


def _delta_case(
    name: str,
    batch: int,
    shape: tuple[int, int],
    factors: tuple[int, int],
    gain: tuple[int, ...] | None = None,
    layout: str = "dense",
) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        return {
            **_factors(*factors, shape, dtype, device, layout),
            "coefficients": values((batch, factors[0]), _wide(dtype), device, 6),
            "gain": _gain(gain, dtype, device),
        }

    names = ("down", "up", "coefficients", *(() if gain is None else ("gain",)))
    return Case(name, spectral_delta, inputs, names, exact=False)


def _delta_linear_case(
    name: str,
    sizes: tuple[int, int],
    shape: tuple[int, int],
    gain: tuple[int, ...] | None = None,
    *,
    layout: str = "dense",
    wide_delta: bool = False,
) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        of_delta = _wide(dtype) if wide_delta else dtype
        return {
            "x": laid_out((*sizes, shape[1]), dtype, device, 1, layout),
            "weight": laid_out(shape, dtype, device, 2, layout, _unit(shape[1])),
            "bias": values(shape[:1], dtype, device, 3),
            "delta": laid_out((sizes[0], *shape), of_delta, device, 4, layout, _unit(shape[1])),
            "gain": _gain(gain, dtype, device),
        }

    names = ("x", "weight", "bias", "delta", *(() if gain is None else ("gain",)))
    return Case(name, delta_linear, inputs, names, exact=False)


def _coefficients_case(name: str, lead: tuple[int, ...], angles: int, width: int, scale: float = 1.0) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        return {
            "theta": values((*lead, width), dtype, device, 1) * scale,
            "directions": values((angles, width), dtype, device, 2) * _unit(width),
        }

    return Case(name, spectral_coefficients, inputs, ("theta", "directions"), exact=False)


# Sizes ragged in every direction; one vector of columns and several panels; one block of depth and several; ranks of
# less than a vector, of several, and odd; few rows, which go without packing, and many; samples for which Delta is made
# one by one, and in groups of 16.
CASES = [
    linear_case("one", (1, 1), (1, 1), (2, 1), order="token"),
    linear_case("one-delta", (1, 1), (1, 1), (2, 1), order="delta"),
    linear_case("no-tokens", (2, 0), (5, 7), order="token"),
    linear_case("no-tokens-delta", (2, 0), (5, 7), gain=(5,), order="delta"),
    linear_case("no-batch", (0, 3), (5, 7), gain=(), order="token"),
    linear_case("no-batch-delta", (0, 3), (5, 7), order="delta"),
    linear_case("no-columns", (2, 3), (5, 0), order="delta"),
    linear_case("no-columns-token", (2, 3), (5, 0), gain=(5,), order="token"),
    linear_case("no-features", (2, 3), (0, 7), order="token"),
    linear_case("token", (3, 21), (53, 37), (4, 5), gain=(53,), order="token"),
    linear_case("delta", (3, 21), (53, 37), (4, 5), gain=(53,), order="delta"),
    linear_case("token-panels", (2, 13), (131, 96), (6, 12), gain=(), order="token"),
    linear_case("delta-panels", (2, 13), (131, 96), (6, 12), gain=(), order="delta"),
    linear_case("token-deep", (2, 9), (33, 450), (26, 17), order="token", bias=False),
    linear_case("delta-deep", (1, 9), (33, 450), (26, 17), order="delta"),
    linear_case("delta-alone", (1, 21), (131, 37), (4, 5), gain=(131,), order="delta"),
    linear_case("delta-together", (17, 7), (131, 70), (19, 5), order="delta"),
    linear_case("delta-many-tokens", (2, 100), (20, 24), (4, 6), order="delta"),
    linear_case("delta-together-deep", (4, 3), (33, 1100), (3, 9), gain=(), order="delta"),
    linear_case("delta-very-deep", (2, 3), (20, 2100), (2, 2), order="delta"),
    linear_case("by-tokens", (3, 11), (41, 29), (4, 3), gain=(41,), by_tokens=True),
    linear_case("chosen", (2, 40), (32, 48), (6, 4)),
    linear_case("rows", (3, 10), (37, 24), layout="rows", order="token"),
    linear_case("strided-delta", (3, 10), (37, 24), layout="strided", order="delta"),
    linear_case("swapped", (3, 10), (37, 24), layout="swapped", order="token", gain=(37,)),
    linear_case("swapped-delta", (3, 10), (37, 24), layout="swapped", order="delta", gain=()),
    linear_case("decode", (1, 1), (67, 75), (6, 5), gain=(67,), order="token"),
    linear_case("decode-some", (7, 1), (130, 64), (4, 12), order="token"),
    linear_case("decode-adjacent", (5, 1), (70, 64), (4, 16), layout="swapped", gain=(), order="token"),
    linear_case("decode-by-tokens", (2, 3), (67, 75), (6, 20), by_tokens=True),
    linear_case("decode-deep", (2, 1), (21, 1100), (4, 5), gain=(), order="token"),
    linear_case("decode-master", (1, 3), (37, 24), gain=(37,), master=True, order="token"),
    linear_case("decode-adjacent-no-gain", (3, 1), (67, 75), (6, 5), layout="swapped", order="token"),
    linear_case("decode-tiles", (3, 13), (70, 66), (6, 7), by_tokens=True, gain=(70,), order="token"),
    linear_case("decode-tiles-of-samples", (2, 20), (150, 48), (12, 6), layout="swapped", order="token"),
    linear_case("decode-in-order", (3, 1), (67, 64), (6, 12), gain=(67,), order="token"),
    linear_case("decode-long-rows", (2, 1), (38, 24), (4, 17), gain=(), order="token"),
    linear_case("decode-many", (33, 1), (67, 75), (6, 5), order="token"),
    linear_case("master", (3, 12), (37, 24), gain=(37,), master=True, order="token"),
    linear_case("master-delta", (3, 12), (37, 24), gain=(), master=True, order="delta"),
    linear_case("large", (2, 20), (37, 24), scale=100.0, order="delta"),
    _delta_case("Delta-one", 1, (1, 1), (2, 1)),
    _delta_case("Delta-none", 0, (5, 7), (2, 3)),
    _delta_case("Delta", 3, (53, 37), (4, 5), gain=(53,)),
    _delta_case("Delta-panels", 1, (131, 110), (6, 12), gain=()),
    _delta_case("Delta-long-factors", 3, (37, 40), (3, 36)),
    _delta_case("Delta-together", 18, (67, 110), (35, 4), gain=(67,)),
    _delta_case("Delta-swapped", 2, (37, 24), (26, 17), layout="swapped"),
    _delta_linear_case("delta_linear-one", (1, 1), (1, 1)),
    _delta_linear_case("delta_linear-no-tokens", (2, 0), (5, 7), gain=()),
    _delta_linear_case("delta_linear", (3, 21), (53, 37), gain=(53,)),
    _delta_linear_case("delta_linear-panels", (2, 13), (131, 450), gain=()),
    _delta_linear_case("delta_linear-strided", (2, 13), (37, 24), layout="strided", wide_delta=True),
    _coefficients_case("coefficients-one", (1,), 1, 1),
    _coefficients_case("coefficients-none", (0,), 3, 4),
    _coefficients_case("coefficients", (5,), 19, 70),
    _coefficients_case("coefficients-by-tokens", (3, 37), 21, 33, scale=3.0),
]
