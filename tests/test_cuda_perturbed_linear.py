"""perturbed_linear's CUDA C++ kernels, compiled by g++ and run by csrc/emulator, against the reference."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import emulation
import op_checks
import pytest
import torch
from op_checks import CPU, DTYPES
from torch import Tensor

from quaver.kernels._cases import Case, values
from quaver.kernels.perturb import reference as perturb
from quaver.kernels.perturbed_linear import reference
from quaver.kernels.perturbed_linear.arguments import Arguments, checked
from quaver.kernels.perturbed_linear.cases import CASES
from quaver.kernels.perturbed_linear.cases import _case as case_of

_SEEDS = [4, 4, 2**62, -5, 7]
#: Beside the shared cases: octets of weights, which 16-bit types with few rows multiply as they are read, and products
#: of several tiles and of more steps than are under way at a time, ragged in every direction.
OWN = [
    case_of("octets", (5,), (37, 72), (37, 1), (37,)),
    case_of("octets-pairs", (2, 9), (21, 136), (5, 21, 1), (5, 21), seed=_SEEDS),
    case_of("octets-pairs-of-inputs", (5, 11), (44, 72), (5, 44, 72), 0.3, seed=_SEEDS, distribution="rademacher"),
    case_of("octets-pairs-few", (5, 4), (24, 72), (5, 24, 1), (5, 24), seed=_SEEDS),
    case_of("octets-splits", (3,), (20, 1288), (20, 1288), (20,)),
    case_of("octets-signs", (45,), (20, 264), (), (), distribution="rademacher"),
    case_of("octets-deep-signs", (3,), (520, 72), distribution="rademacher"),
    case_of("octets-master", (5,), (24, 72), (24, 72), (24,), master=True),
    case_of("octets-shard", (4,), (24, 72), row_offset=3, column_offset=16, row_length=600),
    case_of("tiles", (70,), (72, 136), (72, 1), (72,)),
    case_of("tiles-members", (5, 66), (24, 40), (5, 24, 40), (5, 1), seed=_SEEDS),
    case_of("tiles-shared", (66,), (72, 40), (5,), (72,), seed=_SEEDS),
]
cases = pytest.mark.parametrize("case", [*CASES, *OWN], ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """run(op, *arguments, order=, copies=): the emulated op, with every fault that the emulator sees raised."""
    with emulation.ops("perturbed_linear") as emulator:

        def call(name: str, *arguments: Any, order: str = "forward", copies: str = "early") -> Any:
            op = getattr(torch.ops.quaver_emulated, name)
            return emulator.run(lambda: op(*arguments), order, seed=1, copies=copies)

        yield call


def arguments_of(case: Case, dtype: torch.dtype) -> Arguments:
    made = case.inputs(dtype, CPU)
    names = ("stream", "distribution", "row_offset", "column_offset", "row_length")
    defaults = {"stream": 0, "distribution": "normal", "row_offset": 0, "column_offset": 0, "row_length": None}
    place = tuple(made.get(name, defaults[name]) for name in names)
    keys = ("x", "weight", "bias", "sigma", "bias_sigma", "seed")
    return checked(*(made[key] for key in keys), place, made.get("shared_input"))


def widened(arguments: Arguments) -> Arguments:
    return Arguments(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments))


def expected_gradients(arguments: Arguments, grad: Tensor) -> dict[str, Tensor]:
    """The reference's gradients of x, weight, bias, sigma and bias_sigma."""
    leaves = {}
    for name in ("x", "weight", "bias", "sigma", "bias_sigma"):
        if (tensor := getattr(arguments, name)) is not None:
            leaves[name] = tensor.detach().clone().requires_grad_()
    out = reference.perturbed_linear(*arguments._replace(**leaves))
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if found is None else found
        for (name, leaf), found in zip(leaves.items(), grads, strict=True)
    }


def gradients(run: Run, arguments: Arguments, grad: Tensor, **how: str) -> dict[str, Tensor]:
    x, weight, bias, sigma, bias_sigma, seed, *place = arguments
    found = {"x": run("perturbed_linear_input_gradient", grad, weight, sigma, seed, *place, **how)}
    needed = (True, True, bias is not None, bias_sigma is not None)
    tensors = (grad, x, weight, bias, sigma, bias_sigma, seed)
    parts = run("perturbed_linear_parameter_gradient", *tensors, *needed, *place, **how)
    names = ("weight", "sigma", "bias", "bias_sigma")
    return found | {name: part for name, part, need in zip(names, parts, needed, strict=True) if need}


def output_gradient(arguments: Arguments, draw: int = 3) -> Tensor:
    lead = arguments.x.shape[1:-1] if arguments.member_inputs else arguments.x.shape[:-1]
    shape = (*arguments.seed.shape, *lead, arguments.weight.shape[0])
    return values(shape, arguments.x.dtype, CPU, draw)


@cases
@dtypes
def test_result_is_as_accurate_as_eager(run: Run, case: Case, dtype: torch.dtype) -> None:
    arguments = arguments_of(case, dtype)
    got = run("perturbed_linear", *arguments)
    assert got.is_contiguous()
    eager, wide = (reference.perturbed_linear(*a) for a in (arguments, widened(arguments)))
    op_checks.assert_as_accurate_as_eager(dtype, [got], [eager], [wide], f"{case}, result")


@cases
@dtypes
def test_gradients_are_as_accurate_as_eager(run: Run, case: Case, dtype: torch.dtype) -> None:
    arguments = arguments_of(case, dtype)
    draws = [output_gradient(arguments, draw) for draw in (3, 4, 5)]
    got = [gradients(run, arguments, grad) for grad in draws]
    eager = [expected_gradients(arguments, grad) for grad in draws]
    wide = [expected_gradients(widened(arguments), grad) for grad in draws]
    for name in got[0]:
        # A gradient of "large" weights may be more than float16 holds; and eager's overflows on the way to sigma's.
        holds = 0.99 * torch.finfo(dtype).max
        for found, exact in zip(got, wide, strict=True):
            assert (found[name].isfinite() | (exact[name].abs() > holds)).all(), name
        bounded = [i for i in range(len(draws)) if eager[i][name].isfinite().all()]
        parts = ([every[i][name] for i in bounded] for every in (got, eager, wide))
        if bounded:
            op_checks.assert_as_accurate_as_eager(dtype, *parts, f"{case}, {name}")


ORDERED = [case for case in OWN if case.name not in ("octets-splits", "octets-deep-signs")]


#: All but the order and the copies of an ordinary run, which they are compared with.
OTHER_ORDERS = [both for both in product(emulation.ORDERS, emulation.COPIES) if both != ("forward", "early")]


@pytest.mark.parametrize("order, copies", OTHER_ORDERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_same_bits_in_any_order(run: Run, dtype: torch.dtype, order: str, copies: str) -> None:
    for case in ORDERED:
        arguments = arguments_of(case, dtype)
        grad = output_gradient(arguments)
        results = []
        for how in ({}, {"order": order, "copies": copies}):
            results.append(
                [run("perturbed_linear", *arguments, **how), *gradients(run, arguments, grad, **how).values()]
            )
        for first, other in zip(*results, strict=True):
            assert torch.equal(first, other), case


@pytest.mark.parametrize("rows", (8, 24, 72))
@dtypes
@pytest.mark.parametrize("distribution", ("normal", "rademacher"))
def test_the_weights_are_those_of_perturb_to_the_bit(
    run: Run, dtype: torch.dtype, rows: int, distribution: str
) -> None:
    """Products with a unit matrix show the weights themselves."""
    for weight_dtype in {dtype, torch.float32 if dtype.itemsize == 2 else dtype}:
        weight = values((37, rows), weight_dtype, CPU)
        for offsets in ((0, 0, None), (3, 8, 1000), (1, 5, 901)):
            for sigma in (0.3, values((37, 1), torch.float64, CPU), values((37, rows), torch.float64, CPU)):
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                chosen = sigma.to(wide) if isinstance(sigma, Tensor) else sigma
                x = torch.eye(rows, dtype=dtype)
                arguments = checked(x, weight, None, chosen, None, 5, (2, distribution, *offsets), None)
                _, _, _, sigmas, _, seed, _, *place = arguments
                expected = perturb.perturb(weight, sigmas, seed, *place).to(dtype)
                assert torch.equal(run("perturbed_linear", *arguments).t(), expected)
                unit = torch.eye(37, dtype=dtype)
                for part in (unit, unit[:16]):
                    got = run("perturbed_linear_input_gradient", part, weight, sigmas, seed, False, *place)
                    assert torch.equal(got, expected[: part.shape[0]])
