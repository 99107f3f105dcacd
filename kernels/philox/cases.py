"""Calls of the noise stream that every check shares, and its rows of the speed table."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._backends import use_backend
from .._cases import Case, Row, require_equal
from .op import philox_normal, philox_permutation, philox_rademacher, philox_uniform, philox_words

FILLS = (philox_normal, philox_uniform, philox_rademacher)
#: (shape, further arguments): odd sizes, size 1, empty, several dimensions, every form of seed, offsets past 2^34.
_FILLED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "empty": ((0,), {"seed": 1}),
    "scalar": ((), {"seed": 1}),
    "one": ((1,), {"seed": -1}),
    "odd": ((4097,), {"seed": 2**64 - 1, "stream": 2**32 - 1}),
    "offset": ((3, 5, 7), {"seed": 2, "stream": 9, "offset": 2**34 - 60}),
    "population": ((129,), {"seed": [3, 4, -5], "offset": 1}),
}


def _fill(function: Callable[..., Tensor], name: str) -> Case:
    shape, arguments = _FILLED[name]

    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        seed = arguments["seed"]
        seed = torch.tensor(seed, device=device) if isinstance(seed, list) else seed
        return {"shape": shape, **arguments, "seed": seed, "dtype": dtype, "device": device}

    return Case(f"{function.__name__}-{name}", function, inputs)


CASES = [
    *(_fill(function, name) for function in FILLS for name in _FILLED),
    Case(
        "words", philox_words, lambda _, device: {"count": 1001, "seed": 5, "stream": 3, "offset": 7, "device": device}
    ),
    Case("permutation", philox_permutation, lambda _, device: {"n": 1001, "seed": 5, "device": device}),
]


def _check(function: Callable[..., Tensor], count: int) -> Callable[[torch.device], None]:
    def check(device: torch.device) -> None:
        got = function(count, 1, device=device)
        # The reference needs 100 bytes an element: both ends stand for the whole.
        part = min(count, 2**14)
        for offset in (0, count - part):
            with use_backend("reference"):
                expected = function(part, 1, offset=offset, device=device)
            require_equal(got[offset : offset + part], expected, function.__name__)

    return check


def _noise_row(function: Callable[..., Tensor], other: Callable[..., Tensor], label: str, count: int, size: str) -> Row:
    quick = function is philox_normal or (function is philox_rademacher and count > 2**16)

    def variants(device: torch.device) -> dict[str, Callable[[], object]]:
        source, target = torch.zeros(count, device=device), torch.empty(count, device=device)
        return {
            "quaver": lambda: function(count, 1, device=device),
            label: lambda: other(count, device=device),
            "copy_": lambda: target.copy_(source),
        }

    return Row(
        function.__name__, size, ("quaver", label, "copy_"), variants, _check(function, count), 4 * count, count, quick
    )


def _signs(count: int, device: torch.device) -> Tensor:
    return torch.randint(0, 2, (count,), device=device).mul_(2).sub_(1).float()


def _permutation_row(n: int, size: str) -> Row:
    def variants(device: torch.device) -> dict[str, Callable[[], object]]:
        return {
            "quaver": lambda: philox_permutation(n, 1, device=device),
            "torch.randperm": lambda: torch.randperm(n, device=device),
        }

    def check(device: torch.device) -> None:
        with use_backend("reference"):
            expected = philox_permutation(n, 1, device=device)
        require_equal(philox_permutation(n, 1, device=device), expected, "philox_permutation")

    return Row("philox_permutation", size, ("quaver", "torch.randperm"), variants, check, 8 * n, n, quick=False)


_SIZES = ((2**16, "64 K"), (2**24, "16.7 M"))
ROWS = [
    *(_noise_row(philox_normal, torch.randn, "torch.randn", *size) for size in _SIZES),
    *(_noise_row(philox_uniform, torch.rand, "torch.rand", *size) for size in _SIZES),
    *(_noise_row(philox_rademacher, _signs, "randint", *size) for size in _SIZES),
    _permutation_row(2**16, "64 K"),
]
