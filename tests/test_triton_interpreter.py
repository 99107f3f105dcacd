"""Triton's interpreter, as tests/triton_interpreter.py leaves it: casts, loads, stores and dot give torch's values."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import quaver
from quaver.kernels import use_backend
from quaver.kernels._triton import interpreting, launch


@triton.jit
def copy_kernel(source, out, elements, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    value = tl.load(source + index, mask=inside, other=0.0)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_kernel(source, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(source + index) + tl.load(source + index))


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr):
    index = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + index, tl.dot(tl.load(a + index), tl.load(b + index)))


# numpy warns of what torch does silently: float32 above 65504 to float16, a NaN's bits cut short.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in cast:RuntimeWarning")


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` through a Triton kernel that loads them, casts them and stores them as `dtype`."""
    out = torch.empty(values.shape, dtype=dtype)
    launch(copy_kernel, (triton.cdiv(values.numel(), 4096),), values, out, values.numel(), BLOCK=4096)
    return out


def same(got: Tensor, expected: Tensor) -> bool:
    """The same bits, or NaN in both."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    return bool(((got.view(integer) == expected.view(integer)) | (got.isnan() & expected.isnan())).all())


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def hard_values(dtype: torch.dtype) -> Tensor:
    """Random values of every size, ties and their neighbours, limits, and what is not finite."""
    generator = torch.Generator().manual_seed(7)
    words = torch.randint(-(2**31), 2**31, (2**18,), generator=generator)
    floats = [words.to(torch.int32).view(torch.float32)]
    # The middle between two neighbours and the float32s beside it: bfloat16 keeps 16 bits, float16 10 bits of fraction.
    for dropped in (16, 13):
        tie = ((words >> dropped << dropped) | (1 << (dropped - 1))).to(torch.int32)
        floats += [(tie + step).view(torch.float32) for step in (-1, 0, 1)]
    limits = [0.0, 65504.0, 65519.99, 65520.0, 3.3895e38, 3.3961775e38, 3.4028235e38, 6e-8, 2.98e-8, 1e-45, 9.2e-41]
    special = torch.tensor([*limits, float("inf"), float("nan")])
    return torch.cat([*floats, special, -special]).to(dtype)


def test_the_kernels_run_in_the_interpreter() -> None:
    assert interpreting()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_every_half_precision_value_widens_exactly(half: torch.dtype, wide: torch.dtype) -> None:
    values = every_half(half)
    assert same(cast(values, wide), values.to(wide))
    assert same(cast(cast(values, wide), half), values)
    assert same(cast(values, half), values)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_float32_rounds_to_the_nearest_half_ties_to_even(half: torch.dtype) -> None:
    values = hard_values(torch.float32)
    assert same(cast(values, half), values.to(half))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_float64_rounds_once(half: torch.dtype) -> None:
    values = hard_values(torch.float64)
    assert same(cast(values, half), values.to(half))
    # Just beside a tie, by less than a float32 can hold: rounding to float32 first would go to the even neighbour.
    tie = 1 + torch.finfo(half).eps / 2
    beside = torch.tensor([tie * (1 + 2**-40), tie * (1 - 2**-40), -tie * (1 + 2**-40)], dtype=torch.float64)
    eps = torch.finfo(half).eps
    assert cast(beside, half).tolist() == [1 + eps, 1.0, -1 - eps]


def test_float64_and_float32_convert_like_torch() -> None:
    values = torch.cat([hard_values(torch.float64), torch.randn(4096, dtype=torch.float64)])
    assert same(cast(values, torch.float32), values.to(torch.float32))
    assert same(cast(values.to(torch.float32), torch.float64), values.to(torch.float32).to(torch.float64))


def test_integers_become_bfloat16_values() -> None:
    values = torch.arange(-3000, 3000, dtype=torch.int32)
    assert same(cast(values, torch.bfloat16), values.to(torch.bfloat16))
    assert torch.equal(cast(torch.tensor([-2.5, 3.75], dtype=torch.bfloat16), torch.int32), torch.tensor([-2, 3]).int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_multiplies_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-8, 8, (16, 16), generator=generator).to(dtype) for _ in range(2))
    out = torch.full((16, 16), float("nan"))
    launch(dot_kernel, (1,), a, b, out, N=16)
    assert torch.equal(out, a.float() @ b.float())


def test_arithmetic_on_bfloat16_is_refused() -> None:
    values = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="cast to float32 first"):
        launch(add_kernel, (1,), values, torch.empty_like(values), BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_of_noise_rounds_once(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 813, generator=torch.Generator().manual_seed(1)).to(dtype)
    with use_backend("triton"):
        expected = quaver.perturb(weight.float(), 0.3, 5).to(dtype)
        assert same(quaver.perturb(weight, 0.3, 5), expected)
