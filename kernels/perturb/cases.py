"""Calls of the perturb family that every check shares, and its rows of the speed table."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._backends import use_backend
from .._cases import Case, Rotation, Row, require_equal, rotated_weights, values
from .op import perturb, perturb_, perturbation_gradient, weight_scale

Layout = Callable[[torch.dtype, torch.device], Tensor]

_LAYOUTS: dict[str, Layout] = {
    "empty": lambda dtype, device: values((0, 5), dtype, device),
    "scalar": lambda dtype, device: values((), dtype, device),
    "vector": lambda dtype, device: values((131,), dtype, device),
    "one": lambda dtype, device: values((1, 1), dtype, device),
    "odd": lambda dtype, device: values((37, 53), dtype, device),
    "transposed": lambda dtype, device: values((53, 37), dtype, device).t(),
    "strided": lambda dtype, device: values((19, 96), dtype, device)[:, 1::2],
    "convolution": lambda dtype, device: values((6, 5, 3, 3), dtype, device),
    "large": lambda dtype, device: values((37, 53), dtype, device) * 1e4,
}


def _sigma(form: tuple[int, ...] | float) -> Callable[[torch.dtype, torch.device], Tensor | float]:
    def make(dtype: torch.dtype, device: torch.device) -> Tensor | float:
        if isinstance(form, float):
            return form
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return values(form, wide, device, seed=1)

    return make


def _case(name: str, layout: str, sigma: tuple[int, ...] | float, seed: int | list[int] = 7, **arguments: Any) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        made = torch.tensor(seed, device=device) if isinstance(seed, list) else seed
        return {
            "weight": _LAYOUTS[layout](dtype, device),
            "sigma": _sigma(sigma)(dtype, device),
            "seed": made,
            **arguments,
        }

    return Case(name, perturb, inputs, ("weight",) if isinstance(sigma, float) else ("weight", "sigma"))


def _gradient_case(distribution: str) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        seeds = torch.arange(5, device=device) - 2
        arguments = {"coefficients": values((5,), dtype, device), "seeds": seeds, "shape": (37, 53)}
        return {**arguments, "distribution": distribution, **_SHARD}

    return Case(f"gradient-{distribution}", perturbation_gradient, inputs, ("coefficients",))


def _scale_case(layout: str) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        return {"weight": _LAYOUTS[layout](dtype, device)}

    return Case(f"scale-{layout}", weight_scale, inputs, ("weight",), exact=False)


_SHARD = {"row_offset": 3, "column_offset": 11, "row_length": 100}
_POPULATION = [4, -5, 2**62]
CASES = [
    *(_case(f"layout-{layout}", layout, 0.1) for layout in _LAYOUTS),
    _case("sigma-scalar", "odd", ()),
    _case("sigma-negative", "odd", -0.25, distribution="rademacher"),
    _case("sigma-row", "odd", (37, 1), stream=2**32 - 1),
    _case("sigma-element", "odd", (37, 53), distribution="rademacher"),
    _case("sigma-vector", "vector", (131,)),
    _case("shard", "odd", (37, 1), **_SHARD),
    _case("far", "odd", 0.1, row_offset=2**40, column_offset=5, row_length=2**20),
    _case("population", "odd", (), _POPULATION),
    _case("population-shard", "transposed", (3,), _POPULATION, **_SHARD),
    _case("population-row", "odd", (3, 37, 1), _POPULATION, distribution="rademacher"),
    _case("population-element", "odd", (3, 37, 53), _POPULATION),
    _case("population-shared-row", "odd", (37, 1), _POPULATION),
    _case("population-shared-element", "odd", (37, 53), _POPULATION),
    _case("population-of-sigma", "odd", (3,)),
    *(_gradient_case(distribution) for distribution in ("normal", "rademacher")),
    *(_scale_case(layout) for layout in ("empty", "one", "odd", "strided", "large")),
]


def _naive(w: Tensor) -> Tensor:
    return w + 0.1 * torch.randn_like(w)


def _check(count: int, distribution: str) -> Callable[[torch.device], None]:
    def check(device: torch.device) -> None:
        weight = values((min(count, 2**16),), torch.float32, device).repeat(max(1, count // 2**16))
        got = perturb(weight, 0.1, 1, distribution=distribution)
        part = min(count, 2**14)
        # The reference needs 100 bytes an element: both ends stand for the whole.
        for first in (0, count - part):
            with use_backend("reference"):
                expected = perturb(
                    weight[first : first + part],
                    0.1,
                    1,
                    distribution=distribution,
                    column_offset=first,
                    row_length=count,
                )
            require_equal(got[first : first + part], expected, "perturb")

    return check


def _row(count: int, size: str, distribution: str, in_place: bool, quick: bool = True) -> Row:
    names = (
        ("quaver", "best eager", "copy_") if in_place else ("quaver", "naive", "best eager", "torch.compile", "copy_")
    )

    def variants(device: torch.device) -> dict[str, Callable[[], object]]:
        weights = rotated_weights(count, device)
        noise, out = torch.empty_like(weights[0]), torch.empty_like(weights[0])

        def best(w: Tensor) -> Tensor:
            return torch.add(w, noise.normal_(), alpha=0.1, out=out)

        calls: dict[str, Callable[[Tensor], object]] = {"copy_": out.copy_}
        if in_place:
            calls["quaver"] = lambda w: perturb_(w, 0.1, 1, distribution=distribution)
            calls["best eager"] = lambda w: w.add_(noise.normal_(), alpha=0.1)
        else:
            calls["quaver"] = lambda w: perturb(w, 0.1, 1, distribution=distribution)
            calls["naive"] = _naive
            calls["best eager"] = best
            calls["torch.compile"] = torch.compile(_naive, dynamic=False)
        return {variant: Rotation(calls[variant], weights) for variant in names}

    name = "perturb_" if in_place else f"perturb, {distribution}"
    return Row(name, size, names, variants, _check(count, distribution), 8 * count, count, quick)


def _scale_row(count: int, size: str) -> Row:
    def variants(device: torch.device) -> dict[str, Callable[[], object]]:
        weights = rotated_weights(count, device)
        return {"quaver": Rotation(weight_scale, weights), "Tensor.std": Rotation(torch.std, weights)}

    def check(device: torch.device) -> None:
        weight = values((2**16,), torch.float32, device)
        torch.testing.assert_close(weight_scale(weight).double(), weight.double().std(), rtol=1e-6, atol=0)

    return Row("weight_scale", size, ("quaver", "Tensor.std"), variants, check, 4 * count, count, quick=count > 2**16)


def _gradient_row(members: int, shape: tuple[int, int], size: str) -> Row:
    def variants(device: torch.device) -> dict[str, Callable[[], object]]:
        coefficients, seeds = values((members,), torch.float32, device), torch.arange(members, device=device)
        stored = torch.randn(members, *shape, device=device)

        def regenerated() -> Tensor:
            total, noise = torch.zeros(shape, device=device), torch.empty(shape, device=device)
            for c in coefficients.tolist():
                total.add_(noise.normal_(), alpha=c)
            return total

        return {
            "quaver": lambda: perturbation_gradient(coefficients, seeds, shape),
            "randn again": regenerated,
            "stored noise": lambda: torch.tensordot(coefficients, stored, 1),
        }

    def check(device: torch.device) -> None:
        arguments = (values((3,), torch.float32, device), torch.arange(3, device=device), shape)
        with use_backend("reference"):
            expected = perturbation_gradient(*arguments)
        require_equal(perturbation_gradient(*arguments), expected, "perturbation_gradient")

    count = shape[0] * shape[1]
    names = ("quaver", "randn again", "stored noise")
    return Row("perturbation_gradient", size, names, variants, check, 4 * count, members * count)


_SIZES = ((2**16, "64 K"), (2**24, "16.7 M"))
ROWS = [
    *(_row(*size, "normal", False) for size in _SIZES),
    *(_row(*size, "normal", True) for size in _SIZES),
    *(_row(*size, "rademacher", False, quick=size[0] > 2**16) for size in _SIZES),
    *(_scale_row(*size) for size in _SIZES),
    _gradient_row(64, (256, 256), "64 of 64 K"),
]
