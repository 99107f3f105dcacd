"""What an op's cases.py is made of: the calls that every check shares, and the rows of its speed table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = Callable[[torch.dtype, torch.device], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One call of a public function.

    Attributes:
        name: for test ids.
        function: the public function.
        inputs: makes its keyword arguments for a dtype and a device, the same at every call.
        differentiable: the arguments that have gradients.
        exact: results equal the reference's bit for bit on every backend; otherwise to rounding.
    """

    name: str
    function: Callable[..., Tensor]
    inputs: Inputs
    differentiable: tuple[str, ...] = ()
    exact: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Row:
    """One row of a speed table: quaver's call and what a user would otherwise write.

    Attributes:
        name: what is timed.
        size: its size, as the table shows it.
        names: of the variants, "quaver" first.
        variants: makes the calls for a device, by name. Each call moves on to the next of enough inputs that the
            weights come from memory, as they do in a model, not from the cache.
        check: raises unless quaver's result equals the reference.
        bytes: moved by quaver's call at least.
        elements: made or changed by it.
        quick: whether `quaver bench --quick` shows it.
        slow: the variants that it leaves out then.
    """

    name: str
    size: str
    names: tuple[str, ...]
    variants: Callable[[torch.device], dict[str, Callable[[], object]]]
    check: Callable[[torch.device], None]
    bytes: int
    elements: int
    quick: bool = True
    slow: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.size}"


def values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Fixed standard normal inputs of any dtype, equal on every device, independent of torch's global generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


class Rotation:
    """Calls a function on each of several inputs in turn, so that none is still in the cache."""

    def __init__(self, function: Callable[[Tensor], object], inputs: list[Tensor]) -> None:
        self._function, self._inputs, self._next = function, inputs, 0

    def __call__(self) -> object:
        tensor = self._inputs[self._next]
        self._next = (self._next + 1) % len(self._inputs)
        return self._function(tensor)


def rotated_weights(elements: int, device: torch.device) -> list[Tensor]:
    """float32 weights of `elements` each, together 128 MiB, but two at least."""
    base = values((min(elements, 2**16),), torch.float32, device).repeat(max(1, elements // 2**16))
    return [base.clone() for _ in range(max(2, 2**25 // elements))]


def require_equal(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise unless two tensors are equal to the bit (-0 equals +0)."""
    if got.shape != expected.shape or got.dtype != expected.dtype or not bool((got == expected).all()):
        raise RuntimeError(f"{what}: the result differs from the reference")
