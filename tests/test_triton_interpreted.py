"""The Triton kernels of philox, dropout and perturb in Triton's interpreter, against the references."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import op_checks
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from quaver.kernels import (
    dropout,
    perturb,
    perturb_,
    perturbation_gradient,
    philox_normal,
    philox_permutation,
    philox_rademacher,
    philox_uniform,
    philox_words,
    use_backend,
    weight_scale,
)
from quaver.kernels._cases import Case
from quaver.kernels._seeds import compute_dtype
from quaver.kernels.perturb import reference
from quaver.kernels.perturb.cases import CASES as PERTURB

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DISTRIBUTIONS = ("normal", "rademacher")
SEEDS = torch.tensor([3, -4, 2**40 + 2**31])  # [P]: read by the kernel, the other seeds go by value
#: 32 bits, both kinds of 32-bit integer that the interpreter has, negative, and two words.
SEED_VALUES = (1, 2**31 + 7, -5, 2**63 + 9)


def both(call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What `call` returns on Triton and on the reference."""
    with use_backend("triton"):
        got = call()
    with use_backend("reference"):
        return got, call()


def assert_same(call: Callable[[], Tensor]) -> None:
    got, expected = both(call)
    assert got.dtype == expected.dtype
    assert got.is_contiguous()
    assert torch.equal(got, expected)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [philox_normal, philox_uniform, philox_rademacher])
def test_elements_are_those_of_the_reference(make: Callable[..., Tensor], dtype: torch.dtype) -> None:
    for count, offset in ((1, 0), (3, 1), (5, 127), (129, 2**34 + 3), (513, 8), (1025, 2**40 + 6)):
        assert_same(lambda n=count, first=offset: make(n, 3, stream=2**32 - 3, offset=first, dtype=dtype))
    assert_same(lambda: make((5, 51), SEEDS, stream=1, offset=9, dtype=dtype))


@pytest.mark.parametrize("seed", SEED_VALUES)
def test_words_depend_on_all_64_bits_of_the_seed(seed: int) -> None:
    assert_same(lambda: philox_words(1025, seed, stream=2**31, offset=2**36 + 3, domain=2**32 - 1))
    assert_same(lambda: philox_permutation(515, seed, stream=7))


def test_words_are_the_published_ones() -> None:
    # Random123, kat_vectors, philox4x32 10: counter and key of ones.
    out = torch.empty(4, dtype=torch.int64)
    torch.ops.quaver.philox_words__triton(out, torch.tensor(-1), 2**32 - 1, 2**32 - 1, -1, 0)
    assert out.tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


SIGMAS = {
    "value": torch.tensor(0.3),
    "member": torch.tensor([0.3, -0.2, 1.7]),
    "row": normal(3, 1),
    "rows of members": normal(3, 3, 1),
    "element": normal(3, 129),
    "elements of members": normal(3, 3, 129),
}


@pytest.mark.parametrize(
    "distribution, dtype", [*(("normal", dtype) for dtype in DTYPES), ("rademacher", torch.bfloat16)]
)
@pytest.mark.parametrize("sigma", SIGMAS.values(), ids=SIGMAS.keys())
def test_perturbed_weights_are_those_of_the_reference(sigma: Tensor, dtype: torch.dtype, distribution: str) -> None:
    weight = normal(3, 129, dtype=dtype)
    shard = {"row_offset": 2**31 + 3, "column_offset": 6, "row_length": 137}
    assert_same(lambda: perturb(weight, sigma, SEEDS, stream=3, distribution=distribution))
    assert_same(lambda: perturb(weight, sigma, SEEDS, distribution=distribution, **shard))
    if sigma.dim() != 3 and sigma.shape != (3,):
        assert_same(lambda: perturb(weight, sigma, 5, distribution=distribution))


@pytest.mark.parametrize(
    "shape", [(), (1,), (3,), (127,), (513,), (1, 1), (2, 3, 43), (1025,), (0, 4), (4, 0), (2, 1300)]
)
def test_any_shape_and_strides(shape: tuple[int, ...]) -> None:
    weight = normal(*shape, dtype=torch.float32)
    assert_same(lambda: perturb(weight, 0.3, 5))
    assert_same(lambda: dropout(weight, 0.3, SEEDS[1], stream=2))
    transposed = weight.movedim(0, -1) if shape else weight
    spaced = torch.stack((weight, weight), dim=-1)[..., 0]
    for view in (transposed, spaced):
        assert_same(lambda w=view: perturb(w, 0.3, 5))
        assert_same(lambda w=view: perturb_(w.clone(memory_format=torch.preserve_format), 0.3, 5).contiguous())
    in_place = spaced.clone()
    target = torch.stack((in_place, in_place), dim=-1)
    with use_backend("triton"):
        perturb_(target[..., 0], 0.3, 5)
        assert torch.equal(target[..., 0], perturb(in_place, 0.3, 5))
    assert torch.equal(target[..., 1], in_place)


@pytest.mark.parametrize("distribution", [0, 1])
def test_a_bias_has_noise_of_its_own(distribution: int) -> None:
    weight, sigma, place = normal(513, dtype=torch.float32), torch.tensor(0.5), (0, distribution + 256, 0, 0, 513)
    got = torch.ops.quaver.perturb_triton(weight, sigma, torch.tensor(9), *place)
    assert torch.equal(got, reference.perturb(weight, sigma, torch.tensor(9), *place))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_perturbation_gradient_has_the_bits_of_the_reference(distribution: str, dtype: torch.dtype) -> None:
    for shape in ((1,), (5, 129), (2, 513)):
        coefficients = normal(3, dtype=dtype)
        assert_same(lambda c=coefficients, s=shape: perturbation_gradient(c, SEEDS, s, distribution=distribution))
    shard = {"row_offset": 3, "column_offset": 5, "row_length": 140}
    assert_same(lambda: perturbation_gradient(coefficients, SEEDS, (5, 129), distribution=distribution, **shard))
    assert_same(lambda: perturbation_gradient(coefficients[:0], SEEDS[:0], (5, 129), distribution=distribution))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_has_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    for p in (0, 0.3, 1):
        assert_same(lambda p=p: dropout(normal(5, 257, dtype=dtype), p, 9, stream=1))
    for offset in (1, 4, 2**33 + 7):
        assert_same(lambda at=offset: dropout(normal(5, 257, dtype=dtype), 0.3, 9, stream=1, offset=at))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigma", SIGMAS.values(), ids=SIGMAS.keys())
def test_gradients_of_a_sum_are_those_of_float64(sigma: Tensor, dtype: torch.dtype) -> None:
    weight, upstream = normal(3, 129, dtype=dtype), normal(3, 3, 129, dtype=dtype)

    def gradients(weight: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        w, s = weight.clone().requires_grad_(), sigma.to(compute_dtype(weight.dtype), copy=True).requires_grad_()
        return torch.autograd.grad(perturb(w, s, SEEDS), (w, s), upstream)

    with use_backend("triton"):
        got, again = gradients(weight, upstream), gradients(weight, upstream)
    with use_backend("reference"):
        expected = gradients(weight.double(), upstream.double())
    assert all(map(torch.equal, got, again))
    # The weight's gradient is a sum of three, rounded to the weight's dtype.
    assert torch.allclose(got[0].double(), expected[0], rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.allclose(got[1].double(), expected[1].double(), rtol=1e-5, atol=1e-4)


def test_a_sum_over_many_blocks_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from quaver.kernels.perturb import tuning

    weight, sigma = normal(3, 2700, dtype=torch.float32), torch.tensor(0.5, requires_grad=True)
    for partials in (2, 64):
        monkeypatch.setattr(tuning, "TRITON_PARTIALS", partials)
        got, expected = both(
            lambda: torch.autograd.grad(perturb(weight, sigma, SEEDS[:2]), sigma, weight.expand(2, -1, -1))[0]
        )
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_weight_scale_of_any_size(dtype: torch.dtype, mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from quaver.kernels.perturb import tuning

    monkeypatch.setattr(tuning, "TRITON_SUM_BLOCK", 2)
    for count in (0, 1, 2, 127, 4096, 12289):
        weight = (normal(count) + mean).to(dtype)
        with use_backend("triton"):
            got = weight_scale(weight)
        expected = weight.double().std() if count > 1 else torch.zeros((), dtype=torch.float64)
        assert got.dtype == compute_dtype(dtype)
        assert torch.allclose(got.double(), expected, rtol=1e-6, atol=0)


PAIR = SEEDS[:2]
DIFFERENTIABLE: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "perturb, sigma": (lambda w, s: perturb(w, s, 5), ((2, 2), ())),
    "perturb, element sigma": (lambda w, s: perturb(w, s, 5), ((2, 2), (2, 2))),
    "perturb members, row sigma": (lambda w, s: perturb(w, s, PAIR), ((2, 2), (2, 1))),
    "perturb members, sigma each": (lambda w, s: perturb(w, s, PAIR), ((2, 2), (2,))),
    "perturb members, element sigma each": (lambda w, s: perturb(w, s, PAIR), ((2, 2), (2, 2, 2))),
    "perturbation_gradient": (lambda c: perturbation_gradient(c, PAIR, (3,)), ((2,),)),
    "weight_scale": (weight_scale, ((2, 2),)),
    "dropout": (lambda x: dropout(x, 0.4, 3), ((5,),)),
}


@pytest.mark.parametrize("function, shapes", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
def test_derivatives(function: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]) -> None:
    inputs = tuple(normal(*shape).requires_grad_() for shape in shapes)
    with use_backend("triton"):
        assert gradcheck(function, inputs, fast_mode=True)
        assert gradgradcheck(function, inputs, fast_mode=True)


def test_the_gradient_of_a_weight_scale_of_zero_is_zero() -> None:
    weight = torch.ones(3, requires_grad=True)
    with use_backend("triton"):
        (gradient,) = torch.autograd.grad(weight_scale(weight), weight)
    assert gradient.tolist() == [0, 0, 0]


class Dispatched(TorchDispatchMode):
    """Notes the names of the aten ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "aten":
            self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_the_kernels_do_all_the_arithmetic() -> None:
    ops, place = torch.ops.quaver, (0, 0, 0, 0, 4)
    weight, seed, value = normal(3, 4).t().t(), torch.tensor(5), torch.tensor(0.5, dtype=torch.float64)
    with Dispatched() as dispatched:
        ops.philox_fill__triton(torch.empty(9), seed, 0, 0, 3)
        ops.philox_words__triton(torch.empty(9, dtype=torch.int64), seed, 0, 0, 0, 1)
        ops.philox_keys__triton(torch.empty(9, dtype=torch.int64), seed, 0)
        ops.dropout_triton(weight, seed, 0.5, 0)
        for sigma in (value, weight.reshape(1, 3, 4), weight[:, :1].reshape(1, 3, 1)):
            members = ops.perturb_triton(weight, sigma, SEEDS, *place)
            ops.perturb_sigma_gradient_triton(members, sigma, SEEDS, *place)
        ops.perturb__triton(torch.empty(4, 3, dtype=torch.float64).t(), value, seed, *place)
        ops.perturb_weight_gradient_triton(members)
        ops.perturbation_gradient_triton(torch.empty(3), SEEDS, [3, 4], *place)
        ops.weight_scale_gradient_triton(value, weight, ops.weight_scale_triton(weight))
    moves = {"empty", "empty_like", "new_empty", "clone", "copy_", "view", "select", "_local_scalar_dense", "detach"}
    shapes = {"_unsafe_view", "reshape", "t", "transpose", "slice", "expand", "alias", "_to_copy", "empty_strided"}
    assert {name.removeprefix("aten::") for name in dispatched.names} <= moves | shapes


COMPILATIONS = """
import torch
from triton.backends.compiler import GPUTarget
from quaver.kernels._triton import recording
from quaver.kernels.dropout.triton_kernels import dropout
from quaver.kernels.perturb.triton_kernels import perturb
from quaver.kernels.philox.triton_kernels import philox_fill_
with recording() as launches:
    for seed in (0, 1, 16, -1, 2**31, 2**32 - 1, 2**40, -2**63):
        for stream in (0, 1, 2**32 - 1):
            philox_fill_(torch.empty(64), torch.tensor(seed), stream, 0, 16 * stream)
            dropout(torch.empty(64), torch.tensor(seed), 0.1 + stream / 2**33, stream, 16 * (seed % 16))
            perturb(torch.empty(64), torch.tensor(seed / 7), torch.tensor(seed), stream, 0, 0, 0, 64)
keys = {(launch.kernel.__name__, source.hash(), str(options))
        for launch in launches for source, options in [launch.bind(GPUTarget("cuda", 90, 32))]}
raise SystemExit(0 if len(keys) == 3 else str(keys))
"""


def test_a_new_seed_stream_offset_or_scale_compiles_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILATIONS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_quaver_imports_no_triton() -> None:
    code = "import sys, quaver; raise SystemExit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("case", PERTURB, ids=str)
def test_cases_and_their_gradients(case: Case) -> None:
    op_checks.assert_equals_reference(case, torch.float32, "triton")
    op_checks.assert_gradients_equal_reference(case, torch.float32, "triton")
