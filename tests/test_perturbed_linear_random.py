"""Random calls of perturbed_linear, forward and backward, against float64 arithmetic on the same rounded numbers."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quaver

DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
#: Float32 sums run over 256 or 384 terms at a time: their roundings stay below a few of the sum of magnitudes.
ROUNDINGS = 4


@dataclass(frozen=True)
class Call:
    """The arguments of one call; sizes of 0 and 1 are as likely as any."""

    dtype: torch.dtype
    master: bool
    lead: tuple[int, ...]
    outputs: int
    inputs: int
    bias: bool
    bias_noise: str
    sigma: str
    distribution: str
    members: int
    shared: bool
    seed: int
    shard: tuple[int, int, int]
    transposed: bool


SIZES = st.one_of(st.integers(0, 20), st.integers(0, 70))
CALLS = st.builds(
    Call,
    dtype=DTYPES,
    master=st.booleans(),
    lead=st.one_of(st.just(()), st.tuples(SIZES), st.tuples(st.integers(0, 6), st.integers(0, 12))),
    outputs=SIZES,
    inputs=st.one_of(st.integers(0, 20), st.integers(0, 300), st.sampled_from([128, 256, 384, 1100])),
    bias=st.booleans(),
    bias_noise=st.sampled_from(["none", "number", "scalar", "element"]),
    sigma=st.sampled_from(["number", "scalar", "row", "element"]),
    distribution=st.sampled_from(["normal", "rademacher"]),
    members=st.sampled_from([0, 0, 0, 1, 2, 3]),
    shared=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
    shard=st.one_of(st.just((0, 0, 0)), st.tuples(st.integers(0, 2**31), st.integers(0, 300), st.integers(0, 99))),
    transposed=st.booleans(),
)


def _exact_eps(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _close(got: Tensor, exact: Tensor, magnitude: Tensor, what: str) -> None:
    """Sums made in float32 or float64, then rounded to got's dtype."""
    assert got.shape == exact.shape, what
    allowed = ROUNDINGS * _exact_eps(got.dtype) * magnitude + torch.finfo(got.dtype).eps * exact.abs() + 1e-37
    if got.dtype == torch.float16:
        allowed = allowed + 2.0**-24  # subnormal results
        got = torch.where(exact.abs() > 65504, exact.to(torch.float16), got)
    within = (got.double() - exact).abs() <= allowed
    assert within.all(), f"{what}: {(got.double() - exact)[~within][:3]} where {allowed[~within][:3]} is allowed"


def check(call: Call) -> None:
    """One call, its result and its gradients."""
    generator = torch.Generator().manual_seed(call.seed & 0xFFFF)

    def made(*shape: int, dtype: torch.dtype = call.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    weight_dtype = wide if call.master else call.dtype
    members = (call.members,) if call.members else ()
    x = made(*(() if call.shared else members), *call.lead, call.inputs)
    weight = made(call.inputs, call.outputs, dtype=weight_dtype).t() if call.transposed else None
    weight = made(call.outputs, call.inputs, dtype=weight_dtype) if weight is None else weight
    shapes = {"scalar": (), "row": (call.outputs, 1), "element": (call.outputs, call.inputs)}
    sigma = 0.3 if call.sigma == "number" else made(*shapes[call.sigma], dtype=wide)
    bias = made(call.outputs, dtype=weight_dtype) if call.bias else None
    kinds = {"none": None, "number": 0.5, "scalar": made(dtype=wide), "element": made(call.outputs, dtype=wide)}
    bias_sigma = kinds[call.bias_noise] if call.bias else None
    seed = torch.arange(call.members) + (call.seed >> 2) if call.members else call.seed
    row_offset, column_offset, beyond = call.shard
    place = {
        "row_offset": row_offset,
        "column_offset": column_offset,
        "row_length": column_offset + call.inputs + beyond,
        "distribution": call.distribution,
    }
    leaves = [tensor for tensor in (x, weight, bias, sigma, bias_sigma) if isinstance(tensor, Tensor)]
    for leaf in leaves:
        leaf.requires_grad_()
    shared = call.shared if call.members else None
    y = quaver.perturbed_linear(
        x, weight, bias, sigma=sigma, bias_sigma=bias_sigma, seed=seed, shared_input=shared, **place
    )
    assert y.dtype == call.dtype
    assert y.shape == (*members, *call.lead, call.outputs)
    with torch.no_grad():
        population = max(call.members, 1)
        perturbed = quaver.perturb(weight, sigma, seed, **place).to(call.dtype).double()
        perturbed = perturbed.reshape(population, call.outputs, call.inputs)
        rows = torch.Size(call.lead).numel()
        inputs = x.detach().double().reshape(1 if call.shared or not call.members else population, rows, call.inputs)
        exact, magnitude = inputs @ perturbed.mT, inputs.abs() @ perturbed.abs().mT
        epsilon_bias = torch.zeros(population, call.outputs, dtype=torch.float64)
        if bias is not None:
            if bias_sigma is not None:
                noise = torch.empty((*members, call.outputs))
                domain = 256 + (call.distribution == "rademacher")
                seeds = seed if isinstance(seed, Tensor) else torch.tensor(seed)
                torch.ops.quaver.philox_fill_(noise, seeds, 0, domain, row_offset)
                epsilon_bias = noise.double().reshape(population, call.outputs)
            scaled = 0 if bias_sigma is None else bias_sigma * epsilon_bias.to(wide)
            added = (bias.to(wide) + scaled).to(call.dtype).double().expand(population, call.outputs).unsqueeze(1)
            exact, magnitude = exact + added, magnitude + added.abs()
        _close(y.detach().reshape(exact.shape), exact, magnitude, "result")
    grad = made(*y.shape)
    found = torch.autograd.grad(y, leaves, grad)
    with torch.no_grad():
        _check_gradients(
            call,
            dict(zip(map(id, leaves), found, strict=True)),
            grad,
            x,
            weight,
            sigma,
            bias,
            bias_sigma,
            inputs,
            perturbed,
            epsilon_bias,
            seed,
            place,
        )


def _check_gradients(
    call: Call,
    found: dict[int, Tensor],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    sigma: float | Tensor,
    bias: Tensor | None,
    bias_sigma: float | Tensor | None,
    inputs: Tensor,
    perturbed: Tensor,
    epsilon_bias: Tensor,
    seed: int | Tensor,
    place: dict[str, object],
) -> None:
    population = perturbed.shape[0]
    of_rows = grad.double().reshape(population, inputs.shape[1], call.outputs)
    of_x, x_magnitude = of_rows @ perturbed, of_rows.abs() @ perturbed.abs()
    if inputs.shape[0] < population:
        of_x, x_magnitude = of_x.sum(0, keepdim=True), x_magnitude.sum(0, keepdim=True)
    _close(found[id(x)].reshape(of_x.shape), of_x, x_magnitude, "gradient of x")
    of_members, magnitudes = of_rows.mT @ inputs, of_rows.abs().mT @ inputs.abs()
    _close(found[id(weight)], of_members.sum(0), magnitudes.sum(0), "gradient of weight")
    if isinstance(sigma, Tensor):
        zero = torch.zeros(weight.shape, dtype=torch.float64)
        epsilon = quaver.perturb(zero, 1.0, seed, **place).reshape(of_members.shape)  # type: ignore[arg-type]
        products, sizes = (of_members * epsilon).sum(0), (magnitudes * epsilon.abs()).sum(0)
        dims = {"scalar": (0, 1), "row": (1,), "element": ()}[call.sigma]
        if dims:
            products, sizes = (t.sum(dims, keepdim=call.sigma == "row") for t in (products, sizes))
        _close(found[id(sigma)], products, sizes, "gradient of sigma")
    if bias is None:
        return
    sums, sizes = of_rows.sum(1), of_rows.abs().sum(1)
    _close(found[id(bias)], sums.sum(0), sizes.sum(0), "gradient of bias")
    if isinstance(bias_sigma, Tensor):
        products, sizes = (sums * epsilon_bias).sum(0), (sizes * epsilon_bias.abs()).sum(0)
        if bias_sigma.dim() == 0:
            products, sizes = products.sum(), sizes.sum()
        _close(found[id(bias_sigma)], products, sizes, "gradient of bias_sigma")


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(call=CALLS)
def test_random_calls(call: Call) -> None:
    check(call)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=True, database=None)
@given(call=CALLS)
def test_ten_thousand_random_calls(call: Call) -> None:
    check(call)
