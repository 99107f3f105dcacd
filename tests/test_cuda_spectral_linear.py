"""spectral_linear's CUDA C++ kernels, compiled by g++ and run by csrc/emulator, against the reference."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import emulation
import op_checks
import pytest
import torch
from op_checks import CPU, DTYPES
from torch import Tensor

from quaver.kernels import _ops
from quaver.kernels._cases import values
from quaver.kernels._seeds import compute_dtype
from quaver.kernels.spectral_linear import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
Run = Callable[..., Any]
Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Shape:
    """One call: x [batch, tokens, inputs], `factors` factors of a rank."""

    name: str
    batch: int
    tokens: int
    inputs: int
    outputs: int
    factors: int
    rank: int
    gain: str = "rows"  # rows, one, none
    bias: bool = True
    by_token: bool = False
    wide: bool = False  # weight, factors and Delta in float32 beside a 16-bit x
    strided: bool = False  # x and grad are slices: their rows do not follow each other

    def __str__(self) -> str:
        return self.name

    def values(self, lead: tuple[int, ...], last: int, dtype: torch.dtype, seed: int) -> Tensor:
        if self.strided:
            return values((*lead, 2 * last + 3), dtype, CPU, seed)[..., 3 : 3 + last]
        return values((*lead, last), dtype, CPU, seed)

    def inputs_of(self, dtype: torch.dtype, draw: int = 0) -> Tensors:
        """The arguments of spectral_linear in the form that its ops take, by name."""
        wide = compute_dtype(dtype)
        of_weight = wide if self.wide else dtype
        lead = (self.batch, self.tokens) if self.by_token else (self.batch,)
        scale = (self.inputs or 1) ** -0.5
        seed = 20 * draw

        def small(shape: tuple[int, ...], number: int, by: float) -> Tensor:
            return (values(shape, torch.float64, CPU, seed + number) * by).to(of_weight)

        gain = (self.outputs,) if self.gain == "rows" else ()
        return {
            "x": self.values((self.batch, self.tokens), self.inputs, dtype, seed + 1),
            "weight": small((self.outputs, self.inputs), 2, scale),
            "bias": small((self.outputs,), 3, 1.0) if self.bias else None,
            "down": small((self.factors, self.rank, self.inputs), 4, scale),
            "up": small((self.factors, self.outputs, self.rank), 5, 0.3),
            "coefficients": values((*lead, self.factors), wide, CPU, seed + 6),
            "gain": None if self.gain == "none" else values(gain, wide, CPU, seed + 7),
        }

    def grad(self, dtype: torch.dtype, draw: int = 0) -> Tensor:
        """A gradient of the result."""
        return self.values((self.batch, self.tokens), self.outputs, dtype, 20 * draw + 8)


SHAPES = [
    Shape("one", 1, 1, 1, 1, 2, 1, gain="none", bias=False),
    # Several tiles and steps in every direction, ragged, with ranks that tiles of columns cut in two.
    Shape("ragged", 2, 37, 72, 88, 8, 12),
    Shape("odd", 3, 9, 19, 21, 6, 5, gain="one"),
    Shape("by-token", 2, 35, 40, 72, 10, 8, by_token=True),
    Shape("wide-rank", 1, 70, 24, 40, 2, 72, gain="one", bias=False),
    Shape("halves", 2, 18, 16, 70, 18, 4, by_token=True, gain="none"),
    Shape("rank-one", 2, 20, 24, 30, 70, 1),
    Shape("decode", 5, 1, 264, 40, 12, 12),
    Shape("wide", 2, 33, 40, 24, 6, 4, wide=True),
    Shape("strided", 2, 11, 24, 16, 4, 8, strided=True),
    Shape("deep", 1, 3, 200, 24, 24, 8, gain="one"),
    Shape("no-factors", 2, 5, 8, 16, 0, 4),
    Shape("no-rank", 2, 5, 8, 16, 4, 0),
    Shape("no-tokens", 2, 0, 8, 16, 4, 3),
    Shape("no-batch", 0, 4, 8, 16, 4, 3),
    Shape("no-outputs", 2, 4, 8, 0, 4, 3, bias=False),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_samples = pytest.mark.parametrize("shape", [shape for shape in SHAPES if not shape.by_token], ids=str)
orders = pytest.mark.parametrize("by_delta", (False, True), ids=("token", "delta"))


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """run(op, *arguments, order=, copies=): the emulated op, with every fault that the emulator sees raised."""
    library = torch.library.Library("quaver_emulated", "FRAGMENT")
    for schema in _ops.schemas:
        if schema.startswith(("spectral", "delta_linear")):
            library.define(schema)
    emulator = emulation.load()

    def call(name: str, *arguments: Any, order: str = "forward", copies: str = "early") -> Any:
        op = getattr(torch.ops.quaver_emulated, name)
        return emulator.run(lambda: op(*arguments), order, seed=1, copies=copies)

    yield call
    library._destroy()


def widened(tensors: Tensors) -> Tensors:
    return {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}


def expected(function: Callable[..., Tensor], tensors: Tensors, grad: Tensor, **rest: Any) -> list[Tensor]:
    """The result, then the gradient of each tensor that is given."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = function(**leaves, **rest)
    given = [leaf for leaf in leaves.values() if leaf is not None]
    grads = torch.autograd.grad(out, given, grad.to(out.dtype), allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(t) if g is None else g for t, g in zip(given, grads, strict=True)),
    ]


#: Draws of all inputs: eager's error of one alone may be small by chance, that of a single number above all.
DRAWS, EAGER_DRAWS = range(2), range(8)


def assert_accurate(
    got: list[list[Tensor]],
    function: Callable[..., Tensor],
    inputs: Callable[[int], tuple[Tensors, Tensor]],
    what: str,
    **rest: Any,
) -> None:
    """The result and every gradient are as accurate as eager's; inputs(draw): the arguments, the result's gradient."""
    draws = [inputs(draw) for draw in EAGER_DRAWS]
    eager = [expected(function, tensors, grad, **rest) for tensors, grad in draws]
    wide = [expected(function, widened(tensors), grad, **rest) for tensors, grad in draws]
    dtype = draws[0][1].dtype
    for i, name in enumerate(["result", *(name for name, tensor in draws[0][0].items() if tensor is not None)]):
        ours, theirs, exact = ([draw[i] for draw in every] for every in (got, eager, wide))
        allowed = dtype if dtype == torch.float64 else torch.float32
        op_checks.assert_as_accurate_as_eager(allowed, ours, theirs, exact, f"{what}, {name}")
        assert all(one.is_contiguous() for one in ours), name


def linear(run: Run, tensors: Tensors, grad: Tensor, by_delta: bool, keep: bool, **how: str) -> list[Tensor]:
    """The result and the gradients of all that is given."""
    out, kept = run("spectral_linear", *tensors.values(), by_delta, keep, **how)
    assert (kept.numel() > 0) <= keep
    between = (kept, None) if by_delta else (None, kept)
    needed = [True] * len(tensors)
    arguments = (grad, *tensors.values(), *(between if keep else (None, None)), by_delta, *needed)
    found = run("spectral_linear_backward", *arguments, **how)
    return [out, *(one for one, tensor in zip(found, tensors.values(), strict=True) if tensor is not None)]


@orders
@shapes
@dtypes
def test_linear_is_as_accurate_as_eager(run: Run, shape: Shape, dtype: torch.dtype, by_delta: bool) -> None:
    if shape.by_token and by_delta:
        return

    def inputs(draw: int) -> tuple[Tensors, Tensor]:
        return shape.inputs_of(dtype, draw), shape.grad(dtype, draw)

    got = [linear(run, *inputs(draw), by_delta, keep=draw == 0) for draw in DRAWS]
    assert_accurate(got, reference.spectral_linear, inputs, f"{shape}, by_delta={by_delta}", by_delta=by_delta)
