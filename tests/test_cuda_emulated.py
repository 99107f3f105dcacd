"""The CUDA C++ kernels of the noise ops, compiled by g++ and run by csrc/emulator, against the references."""

from collections.abc import Callable, Iterator
from typing import Any

import emulation
import pytest
import torch
from torch import Tensor

from quaver.kernels._seeds import DISTRIBUTIONS, FLOATING, compute_dtype, signed
from quaver.kernels.dropout import op as _dropout_op  # noqa: F401  (defines its schema)
from quaver.kernels.dropout import reference as dropout
from quaver.kernels.perturb import op as _perturb_op  # noqa: F401
from quaver.kernels.perturb import reference as perturb
from quaver.kernels.perturb.arguments import noise_place, seeds_and_sigma
from quaver.kernels.philox import op as _philox_op  # noqa: F401
from quaver.kernels.philox import reference as philox

SEED = signed(0xDEADBEEF_12345678)
SEEDS = torch.tensor([SEED, -1, 7])
SIZES = (0, 1, 3, 5, 127, 129, 513, 4097)
#: Of elements: at a block's start, in one, and where the block's number needs more than 32 bits (past 2^34 for four an
#: element, 2^39 for the 128 of signs).
OFFSETS = (0, 3, 2**34 - 5, 2**40 + 6)

dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=lambda dtype: str(dtype).removeprefix("torch."))
signed_distributions = pytest.mark.parametrize("distribution", ("normal", "rademacher"))

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """run(op, *arguments, order=...): the emulated op, with every fault that the emulator sees raised."""
    with emulation.ops() as emulator:

        def call(name: str, *arguments: Any, order: str = "forward") -> Any:
            return emulator.run(lambda: getattr(torch.ops.quaver_emulated, name)(*arguments), order, seed=1)

        yield call


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _misaligned(tensor: Tensor) -> Tensor:
    """A contiguous copy one element past a 16-byte boundary."""
    copy = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return copy.copy_(tensor)


def _equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


# ---- philox ---------------------------------------------------------------------------------------------------------
@dtypes
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_fill(run: Run, dtype: torch.dtype, distribution: str) -> None:
    domain = DISTRIBUTIONS[distribution]
    for count in SIZES:
        for offset in OFFSETS if count == 129 else OFFSETS[:2]:
            for seed in (torch.tensor(SEED), SEEDS):
                out = torch.empty((*seed.shape, count), dtype=dtype)
                expected = philox.fill((count,), seed, 2**32 - 1, domain, offset, out.device).to(dtype)
                for target in (out, _misaligned(out)):
                    run("philox_fill_", target, seed, 2**32 - 1, domain, offset)
                    _equal(target, expected)


def test_words_and_keys(run: Run) -> None:
    for count in SIZES:
        for block, word in ((0, 0), (2**32 - 2, 3), (2**61 - 7, 1)):
            for seed in (torch.tensor(SEED), SEEDS):
                out = torch.empty((*seed.shape, count), dtype=torch.int64)
                run("philox_words_", out, seed, 5, 256, block, word)
                element = torch.arange(word, word + count)
                every = philox.words_of_blocks(block + element // 4, seed.unsqueeze(-1) if seed.dim() else seed, 5, 256)
                pick = (element % 4).expand(every.shape[:-1]).unsqueeze(-1)
                _equal(out, every.gather(-1, pick).squeeze(-1))
        keys = torch.empty(count, dtype=torch.int64)
        run("philox_keys_", keys, torch.tensor(SEED), 9)
        _equal(keys, philox.keys(count, torch.tensor(SEED), 9, keys.device))


def test_a_seed_that_is_a_stride_apart(run: Run) -> None:
    for seeds in (SEEDS.repeat_interleave(2)[::2], torch.tensor(SEED).expand(3)):
        out = torch.empty(3, 130)
        run("philox_fill_", out, seeds, 0, 0, 0)
        _equal(out, philox.fill((130,), seeds, 0, 0, 0, out.device))


# ---- dropout --------------------------------------------------------------------------------------------------------
@dtypes
def test_dropout(run: Run, dtype: torch.dtype) -> None:
    seed = torch.tensor(SEED)
    for count in SIZES:
        x = _random((count,), dtype)
        for p in (0.0, 0.3, 1.0):
            for source in (x, _misaligned(x)):
                for offset in (0, 5, 2**33 + 8):
                    expected = dropout.dropout(x, seed, p, 3, offset)
                    _equal(run("dropout", source, seed, p, 3, offset), expected)
    x = _random((5, 26), dtype).t()
    _equal(run("dropout", x, seed, 0.5, 0, 0), dropout.dropout(x, seed, 0.5, 0))


# ---- perturb --------------------------------------------------------------------------------------------------------
#: Shape, row offset, column offset and row length.
PLACES = (
    ((0, 4), 0, 0, None),
    ((), 0, 0, None),
    ((1, 1), 5, 0, None),
    ((513,), 0, 7, 9999),
    ((7, 129), 2, 0, None),
    ((5, 64), 3, 64, 256),
    ((5, 13), 2**33, 6, 67),
    ((3, 3, 43), 1, 0, None),
    ((9, 512), 2**34 + 1, 0, None),
)


def _sigmas(shape: tuple[int, ...], dtype: torch.dtype, members: int) -> Iterator[Tensor | float]:
    """Every form of sigma for a weight: scalar, row and element, with a leading P where there is a population."""
    yield -0.75
    if members > 1:
        yield _random((members, 1) if len(shape) == 1 else (members,), dtype)
    forms = {shape} if shape else set()
    if len(shape) > 1:
        forms.add((shape[0], *[1] * (len(shape) - 1)))
    for form in forms:
        yield _random(form, dtype, 1)
        if members > 1:
            yield _random((members, *form), dtype, 2)


@dtypes
@signed_distributions
def test_perturb(run: Run, dtype: torch.dtype, distribution: str) -> None:
    for shape, row, column, length in PLACES:
        weight = _random(shape, dtype)
        place = noise_place(shape, 11, distribution, row, column, length)
        for seed in (SEED, SEEDS):
            for sigma in _sigmas(shape, compute_dtype(dtype), 3 if isinstance(seed, Tensor) else 1):
                seeds, sigmas = seeds_and_sigma(weight, sigma, seed)
                _equal(run("perturb", weight, sigmas, seeds, *place), perturb.perturb(weight, sigmas, seeds, *place))


@dtypes
def test_perturb_of_misaligned_tensors(run: Run, dtype: torch.dtype) -> None:
    weight, sigma = _random((6, 64), dtype), _random((6, 64), compute_dtype(dtype), 1)
    place = noise_place((6, 64), 0, "normal", 0, 0, None)
    seeds, sigmas = seeds_and_sigma(weight, sigma, SEED)
    expected = perturb.perturb(weight, sigmas, seeds, *place)
    _equal(run("perturb", _misaligned(weight), sigmas, seeds, *place), expected)
    _equal(run("perturb", weight, _misaligned(sigmas), seeds, *place), expected)


@dtypes
def test_perturb_in_place(run: Run, dtype: torch.dtype) -> None:
    for weight in (_random((7, 40), dtype), _random((40, 7), dtype).t(), _random((7, 80), dtype)[:, ::2]):
        place = noise_place((7, 40), 1, "normal", 3, 0, None)
        seeds, sigmas = seeds_and_sigma(weight, 0.5, SEED)
        expected = perturb.perturb(weight, sigmas, seeds, *place)
        run("perturb_", weight, sigmas, seeds, *place)
        _equal(weight, expected)


def test_perturb_takes_several_blocks(run: Run) -> None:
    for shape, column, length in (((10, 1100), 0, None), ((10, 1100), 2, 1103), ((2, 4500), 0, None)):
        weight = _random(shape, torch.bfloat16)
        place = noise_place(shape, 0, "normal", 0, column, length)
        for sigma in (2.0, _random((shape[0], 1), torch.float32)):
            seeds, sigmas = seeds_and_sigma(weight, sigma, SEED)
            expected = perturb.perturb(weight, sigmas, seeds, *place)
            _equal(run("perturb", weight, sigmas, seeds, *place, order="random"), expected)


def _sigma_gradient(grad: Tensor, sigma: Tensor, seeds: Tensor, place: tuple[int, ...]) -> Tensor:
    """d <grad, W + sigma epsilon> / d sigma, in float64."""
    shape = tuple(grad.shape[seeds.dim() :])
    noise = perturb.epsilon(shape, seeds, *place, grad.device).double()
    products = grad.double().reshape(noise.shape) * noise
    products = products if seeds.dim() else products.unsqueeze(0)
    return products.sum_to_size(sigma.shape or (1, 1, 1)).reshape(sigma.shape)


@dtypes
@signed_distributions
def test_sigma_gradient(run: Run, dtype: torch.dtype, distribution: str) -> None:
    for shape, row, column, length in PLACES[1:]:
        place = noise_place(shape, 11, distribution, row, column, length)
        weight = _random(shape, dtype)
        for seed in (SEED, SEEDS):
            for sigma in _sigmas(shape, compute_dtype(dtype), 3 if isinstance(seed, Tensor) else 1):
                seeds, sigmas = seeds_and_sigma(weight, sigma, seed)
                grad = _random((*seeds.shape, *shape), dtype, 3)
                for of_members in (grad, grad[:1].expand_as(grad)) if seeds.dim() else (grad,):
                    actual = run("perturb_sigma_gradient", of_members, sigmas, seeds, *place)
                    expected = _sigma_gradient(of_members, sigmas, seeds, place)
                    assert actual.dtype == sigmas.dtype
                    torch.testing.assert_close(actual.double(), expected, rtol=3e-6, atol=3e-5)


def test_sigma_gradient_of_many_elements_in_any_order(run: Run) -> None:
    # 1050 columns: two chunks a row, the last one ragged; 11 rows of 3 members: several blocks.
    grad = _random((3, 11, 1050), torch.bfloat16)
    for column, length in ((0, None), (3, 2001)):
        place = noise_place((11, 1050), 0, "normal", 1, column, length)
        for shape in ((), (1, 11, 1), (3, 1, 1)):
            sigma = torch.ones(shape)
            first, *others = [
                run("perturb_sigma_gradient", grad, sigma, SEEDS, *place, order=order) for order in emulation.ORDERS
            ]
            expected = _sigma_gradient(grad, sigma, SEEDS, place)
            torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-4)
            for other in others:
                _equal(other, first)


@dtypes
def test_weight_gradient(run: Run, dtype: torch.dtype) -> None:
    for shape in ((3, 5, 13), (2, 64), (5, 1), (1, 513), (0, 4), (4, 0)):
        grad = _random(shape, dtype)
        total = torch.zeros(shape[1:], dtype=compute_dtype(dtype))
        for member in grad.unbind():
            total = total + member
        _equal(run("perturb_weight_gradient", grad), total.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@signed_distributions
def test_perturbation_gradient(run: Run, dtype: torch.dtype, distribution: str) -> None:
    for shape, row, column, length in PLACES:
        place = noise_place(shape, 4, distribution, row, column, length)
        for members in (0, 1, 6):
            coefficients, seeds = _random((members,), dtype), torch.arange(members) * 3 - 5
            expected = perturb.perturbation_gradient(coefficients, seeds, shape, *place)
            _equal(run("perturbation_gradient", coefficients, seeds, list(shape), *place), expected)


# ---- the scale of a weight ------------------------------------------------------------------------------------------
@dtypes
def test_weight_scale(run: Run, dtype: torch.dtype) -> None:
    for shape in ((0,), (), (1,), (2,), (3, 43), (4096,), (4097,), (5, 3001)):
        for mean in (0.0, 1000.0):
            weight = (_random(shape, torch.float64) + mean).to(dtype)
            first, *others = [run("weight_scale", weight, order=order) for order in emulation.ORDERS]
            expected = perturb.weight_scale(weight.double())
            torch.testing.assert_close(first.double(), expected, rtol=1e-6, atol=0)
            for other in (*others, run("weight_scale", _misaligned(weight))):
                _equal(other, first)
            scale, grad = expected.to(first.dtype), torch.tensor(-1.5, dtype=first.dtype)
            actual = run("weight_scale_gradient", grad, weight, scale)
            wanted = perturb.weight_scale_gradient(grad.double(), weight.double(), scale.double())
            step = max(torch.finfo(dtype).eps, 2e-6)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.double(), wanted, rtol=step, atol=step * 1e-4)
    flat = torch.full((130,), 3.0, dtype=dtype)
    assert run("weight_scale", flat) == 0
    one = torch.ones((), dtype=compute_dtype(dtype))
    _equal(run("weight_scale_gradient", one, flat, one * 0), torch.zeros_like(flat))


# ---- what protects memory -------------------------------------------------------------------------------------------
def test_arguments_that_would_break_memory_are_refused(run: Run) -> None:
    weight, sigma, seed = torch.ones(4, 4), torch.tensor(1.0), torch.tensor(1)
    place = noise_place((4, 4), 0, "normal", 0, 0, None)
    with pytest.raises(RuntimeError, match="sigma has the wrong dtype"):
        run("perturb", weight, sigma.double(), seed, *place)
    with pytest.raises(RuntimeError, match="sigma does not fit the weight"):
        run("perturb", weight, torch.ones(1, 3, 1), seed, *place)
    with pytest.raises(RuntimeError, match="int64 seed"):
        run("perturb", weight, sigma, torch.tensor(1.0), *place)
    with pytest.raises(RuntimeError, match="grad does not fit the population"):
        run("perturb_sigma_gradient", weight, sigma, SEEDS, *place)
    with pytest.raises(RuntimeError, match="a coefficient for every seed"):
        run("perturbation_gradient", torch.ones(2), SEEDS, [4, 4], *place)
    with pytest.raises(RuntimeError, match="room for one member"):
        run("perturb_", weight, sigma, SEEDS, *place)
