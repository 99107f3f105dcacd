"""Calls of perturbed_linear that every check shares."""

from typing import Any

import torch
from torch import Tensor

from .._cases import Case, values
from .op import perturbed_linear
from .rows import ROWS

__all__ = ["CASES", "ROWS"]

_SHARD: dict[str, Any] = {"row_offset": 3, "column_offset": 11, "row_length": 600}
_POPULATION = [4, -5, 2**62]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _case(
    name: str,
    lead: tuple[int, ...],
    shape: tuple[int, int],
    sigma: tuple[int, ...] | float = 0.1,
    bias_sigma: tuple[int, ...] | float | None = None,
    *,
    seed: int | list[int] = 7,
    bias: bool = True,
    layout: str = "dense",
    scale: float = 1.0,
    master: bool = False,
    **arguments: Any,
) -> Case:
    """lead: x's dimensions before the last; master: float32 weights beside 16-bit inputs."""

    def laid_out(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
        if layout == "transposed" and len(shape) > 1:
            return values((*shape[:-2], shape[-1], shape[-2]), dtype, device, seed).transpose(-1, -2) * scale
        if layout == "strided":
            return (values((*shape[:-1], 2 * shape[-1] + 3), dtype, device, seed) * scale)[..., 3::2]
        return values(shape, dtype, device, seed) * scale

    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        weight_dtype = _wide(dtype) if master else dtype
        made: dict[str, Any] = {
            "x": laid_out((*lead, shape[1]), dtype, device, 1),
            "weight": laid_out(shape, weight_dtype, device, 2),
            "bias": laid_out(shape[:1], weight_dtype, device, 3) if bias else None,
            "seed": torch.tensor(seed, dtype=torch.int64, device=device) if isinstance(seed, list) else seed,
            "sigma": sigma if isinstance(sigma, float) else values(sigma, _wide(dtype), device, 4),
            "bias_sigma": values(bias_sigma, _wide(dtype), device, 5) if isinstance(bias_sigma, tuple) else bias_sigma,
        }
        return {**made, **arguments}

    tensors = (("bias", bias), ("sigma", isinstance(sigma, tuple)), ("bias_sigma", isinstance(bias_sigma, tuple)))
    return Case(name, perturbed_linear, inputs, ("x", "weight", *(key for key, used in tensors if used)), exact=False)


# Up to 16 rows are dot products, up to 48 are packed by each thread for itself, more by all; depths of one block and of
# several, ragged in every direction.
CASES = [
    _case("one", (1,), (1, 1)),
    _case("vector", (), (5, 7), (), ()),
    _case("no-rows", (0,), (5, 7), (), ()),
    _case("no-columns", (4,), (5, 0), (), (5,)),
    _case("no-columns-many-rows", (60,), (5, 0), (), (5,), row_length=9),
    _case("no-features", (4,), (0, 7), (), (0,)),
    _case("few-rows", (3,), (37, 53), (37, 1), (37,)),
    _case("few-rows-long", (2, 3), (11, 1283), (11, 1), 0.5, distribution="rademacher"),
    _case("few-rows-aligned", (16,), (19, 640), (19, 640), stream=2**32 - 1),
    _case("some-rows", (17,), (101, 131), (), (101,)),
    _case("some-rows-aligned", (5, 4), (70, 384), (70, 1), 0.2),
    _case("many-rows", (61,), (53, 300), (53, 300), (53,)),
    _case("many-rows-aligned", (2, 50), (131, 256), (131, 1), distribution="rademacher"),
    _case("deep", (50,), (9, 1300), (), bias=False),
    _case("wide", (49,), (517, 20), (517, 1), (517,)),
    _case("transposed", (20,), (37, 53), layout="transposed"),
    _case("strided", (4, 5), (37, 53), (), (), layout="strided"),
    _case("large", (6,), (37, 53), layout="dense", scale=1e4),
    _case("master", (20,), (37, 53), (37, 1), (37,), master=True),
    _case("shard", (20,), (37, 53), (37, 1), (37,), **_SHARD),
    _case("far", (3,), (37, 53), row_offset=2**40, column_offset=5, row_length=2**20, bias_sigma=0.3),
    _case("population", (3, 20), (37, 53), (), (), seed=_POPULATION),
    _case("population-few", (3, 2), (37, 53), (3, 37, 1), (3, 37), seed=_POPULATION),
    _case("population-shared", (2, 10), (37, 53), (3, 37, 53), (3, 1), seed=_POPULATION, distribution="rademacher"),
    _case("population-shared-square", (3, 53), (37, 53), (37, 1), (37,), seed=_POPULATION, shared_input=True),
    _case("population-of-sigma", (19,), (37, 53), (3,), seed=5),
    _case("population-of-none", (4,), (5, 7), (), (), seed=[]),
]
