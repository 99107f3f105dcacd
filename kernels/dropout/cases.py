"""Calls of dropout that every check shares, and its rows of the speed table."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._backends import use_backend
from .._cases import Case, Rotation, Row, require_equal, rotated_weights, values
from .op import dropout


def _case(name: str, layout: Callable[[torch.dtype, torch.device], Tensor], **arguments: Any) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        return {"x": layout(dtype, device), "p": 0.3, "seed": 11, **arguments}

    return Case(name, dropout, inputs, ("x",))


CASES = [
    _case("empty", lambda dtype, device: values((0, 3), dtype, device)),
    _case("scalar", lambda dtype, device: values((), dtype, device)),
    _case("odd", lambda dtype, device: values((7, 131), dtype, device), stream=5),
    _case("transposed", lambda dtype, device: values((9, 33), dtype, device).t()),
    _case("strided", lambda dtype, device: values((5, 64), dtype, device)[:, ::3]),
    _case("offset", lambda dtype, device: values((7, 131), dtype, device), stream=5, offset=393),
    _case("keep-all", lambda dtype, device: values((300,), dtype, device), p=0.0),
    _case("drop-all", lambda dtype, device: values((300,), dtype, device), p=1.0),
    _case("large", lambda dtype, device: values((300,), dtype, device) * 1e4, p=0.5),
]


def _row(count: int, size: str) -> Row:
    def variants(device: torch.device) -> dict[str, Callable[[], object]]:
        inputs = rotated_weights(count, device)
        to = torch.empty_like(inputs[0])
        return {
            "quaver": Rotation(lambda x: dropout(x, 0.1, 1), inputs),
            "F.dropout": Rotation(lambda x: functional.dropout(x, 0.1), inputs),
            "copy_": Rotation(to.copy_, inputs),
        }

    def check(device: torch.device) -> None:
        x = values((min(count, 2**16),), torch.float32, device)
        with use_backend("reference"):
            expected = dropout(x, 0.1, 1)
        require_equal(dropout(x, 0.1, 1), expected, "dropout")

    return Row(
        "dropout", size, ("quaver", "F.dropout", "copy_"), variants, check, 8 * count, count, quick=count > 2**16
    )


ROWS = [_row(2**16, "64 K"), _row(2**24, "16.7 M")]
