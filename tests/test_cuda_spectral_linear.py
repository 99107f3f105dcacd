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

    def has(self, dtype: torch.dtype) -> bool:
        """Whether the shape shows something of this dtype that smaller ones do not."""
        return dtype.itemsize == 2 or "large" not in self.name

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
    Shape("decode-odd", 5, 1, 264, 41, 12, 12),
    Shape("wide", 2, 33, 40, 24, 6, 4, wide=True),
    Shape("strided", 2, 11, 24, 16, 4, 8, strided=True),
    Shape("deep", 1, 3, 200, 24, 24, 8, gain="one"),
    # Four tiles of 128 x 128 and more, which 16-bit types take where there are enough of them.
    Shape("large-tiles", 4, 34, 136, 132, 12, 12),
    Shape("large-tiles-rank", 1, 150, 40, 136, 2, 150, gain="one", bias=False),
    Shape("no-factors", 2, 5, 8, 16, 0, 4),
    Shape("no-rank", 2, 5, 8, 16, 4, 0),
    Shape("no-tokens", 2, 0, 8, 16, 4, 3),
    Shape("no-batch", 0, 4, 8, 16, 4, 3),
    Shape("no-outputs", 2, 4, 8, 0, 4, 3, bias=False),
]
#: Shapes with the dtypes that they show something of.
SHOWN = [
    pytest.param(shape, dtype, id=f"{shape}-{str(dtype).removeprefix('torch.')}")
    for shape in SHAPES
    for dtype in DTYPES
    if shape.has(dtype)
]
BY_SAMPLES = [one for one in SHOWN if not one.values[0].by_token]
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


@pytest.mark.parametrize(
    "shape, dtype, by_delta",
    [
        pytest.param(*one.values, by_delta, id=f"{one.id}-{'delta' if by_delta else 'token'}")
        for by_delta, every in ((False, SHOWN), (True, BY_SAMPLES))
        for one in every
    ],
)
def test_linear_is_as_accurate_as_eager(run: Run, shape: Shape, dtype: torch.dtype, by_delta: bool) -> None:
    def inputs(draw: int) -> tuple[Tensors, Tensor]:
        return shape.inputs_of(dtype, draw), shape.grad(dtype, draw)

    got = [linear(run, *inputs(draw), by_delta, keep=draw == 0) for draw in DRAWS]
    assert_accurate(got, reference.spectral_linear, inputs, f"{shape}, by_delta={by_delta}", by_delta=by_delta)


@pytest.mark.parametrize("shape, dtype", [one for one in BY_SAMPLES if not one.values[0].wide])
def test_delta_is_as_accurate_as_eager(run: Run, shape: Shape, dtype: torch.dtype) -> None:
    def inputs(draw: int) -> tuple[Tensors, Tensor]:
        tensors = shape.inputs_of(dtype, draw)
        names = ("down", "up", "coefficients", "gain")
        sizes = (shape.batch, shape.outputs, shape.inputs)
        return {name: tensors[name] for name in names}, values(sizes, dtype, CPU, draw + 9)

    def result(tensors: Tensors, grad: Tensor) -> list[Tensor]:
        found = run("spectral_delta_backward", grad, *tensors.values(), *[True] * 4)
        given = (one for one, tensor in zip(found, tensors.values(), strict=True) if tensor is not None)
        return [run("spectral_delta", *tensors.values()), *given]

    assert_accurate([result(*inputs(draw)) for draw in DRAWS], reference.spectral_delta, inputs, str(shape))


LAID_OUT = [shape for shape in SHAPES if shape.name in ("ragged", "wide-rank", "odd", "no-batch")]


@pytest.mark.parametrize(
    "shape, dtype, wide_delta, layout",
    [
        pytest.param(*one.values, wide_delta, layout, id=f"{one.id}{'-wide-delta' if wide_delta else ''}-{layout}")
        for one in BY_SAMPLES
        for wide_delta in ((False, True) if one.values[1].itemsize == 2 else (False,))
        for layout in ("whole", *(("slice", "misaligned") if one.values[0] in LAID_OUT else ()))
    ],
)
def test_delta_linear_is_as_accurate_as_eager(
    run: Run, shape: Shape, dtype: torch.dtype, wide_delta: bool, layout: str
) -> None:
    """Of a few tokens and of many; Delta whole, or the corner of a larger one, as layers share it."""
    of_delta = compute_dtype(dtype) if wide_delta else dtype

    def inputs(draw: int) -> tuple[Tensors, Tensor]:
        tensors = shape.inputs_of(dtype, draw)
        more = {"whole": 0, "slice": 8, "misaligned": 3}[layout]
        delta = values((shape.batch, shape.outputs + more, shape.inputs + more), of_delta, CPU, draw + 9) * 0.25
        first = more if layout == "misaligned" else 0
        tensors["delta"] = delta[:, first : first + shape.outputs, first : first + shape.inputs]
        return {name: tensors[name] for name in ("x", "weight", "bias", "delta", "gain")}, shape.grad(dtype, draw)

    def result(tensors: Tensors, grad: Tensor) -> list[Tensor]:
        found = run("delta_linear_backward", grad, *tensors.values(), *[True] * 5)
        given = (one for one, tensor in zip(found, tensors.values(), strict=True) if tensor is not None)
        return [run("delta_linear", *tensors.values()), *given]

    assert_accurate([result(*inputs(draw)) for draw in DRAWS], reference.delta_linear, inputs, str(shape))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("float64", "float32"))
@pytest.mark.parametrize("lead", [(3,), (2, 37), (0,), (70,)], ids=str)
@pytest.mark.parametrize("n, coordinates", [(1, 1), (70, 136), (5, 300), (3, 0), (0, 4)])
def test_coefficients_are_as_accurate_as_eager(
    run: Run, lead: tuple[int, ...], n: int, coordinates: int, dtype: torch.dtype
) -> None:
    def inputs(draw: int) -> tuple[Tensors, Tensor]:
        # Float64 is compared to roundings of the result: those of a large angle are larger.
        scale = (coordinates or 1) ** -0.5 if dtype == torch.float64 else 1.0
        tensors = {
            "theta": values((*lead, coordinates), dtype, CPU, 20 * draw + 1) * scale,
            "directions": values((n, coordinates), dtype, CPU, 20 * draw + 2),
        }
        return {**tensors}, values((*lead, 2 * n), dtype, CPU, 20 * draw + 3)

    def result(tensors: Tensors, grad: Tensor) -> list[Tensor]:
        out = run("spectral_coefficients", *tensors.values())
        return [out, *run("spectral_coefficients_backward", grad, out, *tensors.values(), True, True)]

    assert_accurate([result(*inputs(draw)) for draw in DRAWS], reference.spectral_coefficients, inputs, f"{lead} {n}")


#: All but the order and the copies of an ordinary run, which they are compared with.
OTHER_ORDERS = [both for both in product(emulation.ORDERS, emulation.COPIES) if both != ("forward", "early")]
ORDERED = [shape for shape in SHAPES if shape.name in ("ragged", "by-token", "halves", "decode", "wide-rank", "deep")]


@pytest.mark.parametrize("order, copies", OTHER_ORDERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_same_bits_in_any_order(run: Run, dtype: torch.dtype, order: str, copies: str) -> None:
    for shape in ORDERED if dtype.itemsize == 2 else ORDERED[:2]:
        tensors, grad = shape.inputs_of(dtype), shape.grad(dtype)
        for by_delta in (False, True):
            if by_delta and shape.by_token:
                continue
            first, other = (
                linear(run, tensors, grad, by_delta, True, **how) for how in ({}, {"order": order, "copies": copies})
            )
            for a, b in zip(first, other, strict=True):
                assert torch.equal(a, b), (shape, by_delta)


@orders
@pytest.mark.parametrize("wanted", range(7))
def test_a_gradient_alone_has_the_same_bits(run: Run, wanted: int, by_delta: bool) -> None:
    shape = Shape("alone", 2, 37, 40, 72, 6, 12)
    tensors, grad = shape.inputs_of(torch.bfloat16), shape.grad(torch.bfloat16)
    arguments = (grad, *tensors.values(), None, None, by_delta)
    every = run("spectral_linear_backward", *arguments, *[True] * 7)
    alone = run("spectral_linear_backward", *arguments, *[i == wanted for i in range(7)])
    assert [one.numel() for one in alone] == [every[i].numel() if i == wanted else 0 for i in range(7)]
    assert torch.equal(every[wanted], alone[wanted])


@orders
def test_a_nan_stays_in_its_sample(run: Run, by_delta: bool) -> None:
    """A row of x reaches its row of the result, a coefficient its sample's; both gradients what is theirs."""
    shape = Shape("nan", 3, 37, 40, 72, 6, 12)
    for name, at in (("x", (1, 5, 3)), ("coefficients", (1, 2))):
        tensors, grad = shape.inputs_of(torch.bfloat16), shape.grad(torch.bfloat16)
        clean = linear(run, tensors, grad, by_delta, True)
        tensors[name][at] = torch.nan  # type: ignore[index]
        got = linear(run, tensors, grad, by_delta, True)
        touched = [1, slice(None) if name == "coefficients" else 5]
        assert got[0][tuple(touched)].isnan().all()
        got[0][tuple(touched)] = clean[0][tuple(touched)]
        assert torch.equal(got[0], clean[0])
        for sample in (0, 2):
            assert torch.equal(got[1][sample], clean[1][sample])
            assert torch.equal(got[6][sample], clean[6][sample])
