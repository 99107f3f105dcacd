"""Random calls of spectral_linear, and of delta_linear on a shared Delta, against float64: results and gradients."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quaver.kernels import delta_linear, spectral_delta, spectral_linear, use_backend

#: Epsilons of x's dtype, of the sum of the magnitudes of all terms. Up to six roundings to that dtype, half an epsilon
#: each, lie on the way to a result or a gradient: of a parameter; of a factor, scaled; of a product; of a sum of
#: weights; of a shared Delta; of the result. They never all meet in one direction.
NARROW_EPSILONS = 2
#: Epsilons of the dtype of sums. Up to 192 terms are added one after the other: 96 at worst, some of its root in fact.
WIDE_EPSILONS = 16
NAMES = ("x", "weight", "bias", "down", "up", "coefficients", "gain")


@dataclass(frozen=True)
class Call:
    """The arguments of one call; sizes of 0 and 1 are as likely as any."""

    dtype: torch.dtype
    master: bool
    batch: int
    tokens: int
    outputs: int
    inputs: int
    factors: int
    rank: int
    bias: bool
    gain: str
    form: str
    layout: str
    seed: int


SIZES = st.one_of(st.integers(0, 20), st.integers(1, 70))
CALLS = st.builds(
    Call,
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    master=st.booleans(),
    batch=st.one_of(st.integers(0, 5), st.sampled_from([8, 9, 17])),
    tokens=st.one_of(st.just(1), SIZES),
    outputs=st.one_of(SIZES, st.sampled_from([128, 130, 200])),
    inputs=st.one_of(SIZES, st.sampled_from([128, 131, 450])),
    factors=st.one_of(st.integers(0, 9), st.just(19)),
    rank=st.one_of(st.integers(0, 5), st.sampled_from([8, 16, 17, 33])),
    bias=st.booleans(),
    gain=st.sampled_from(["none", "scalar", "row"]),
    form=st.sampled_from(["chosen", "token", "delta", "by tokens", "shared"]),
    layout=st.sampled_from(["dense", "dense", "rows", "strided", "swapped"]),
    seed=st.integers(0, 2**31),
)


def evaluate(form: str, tensors: dict[str, Tensor | None]) -> Tensor:
    x, weight, bias, down, up, coefficients, gain = (tensors[name] for name in NAMES)
    if form == "shared":
        return delta_linear(x, weight, bias, spectral_delta(down, up, coefficients), gain=gain)
    order = form if form in ("token", "delta") else None
    return spectral_linear(x, weight, bias, down, up, coefficients, gain=gain, order=order)


def results(form: str, tensors: dict[str, Tensor | None], grad: Tensor) -> dict[str, Tensor]:
    """The result, and the gradients by the names of the arguments."""
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in tensors.items()}
    out = evaluate(form, leaves)
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    return {
        "result": out.detach(),
        **dict(zip(given, torch.autograd.grad(out, list(given.values()), grad), strict=True)),
    }


def check(call: Call) -> None:
    """One call: within the roundings that its arithmetic has, of the same sums over the magnitudes of all terms."""
    generator = torch.Generator().manual_seed(call.seed)
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    of_weights = wide if call.master else call.dtype

    def made(*shape: int, dtype: torch.dtype = of_weights, by: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * by).to(dtype)

    def laid_out(batch: int, length: int, width: int) -> Tensor:
        if call.layout == "rows":
            return made(batch, length, width + 5, dtype=call.dtype)[..., 3:-2]
        if call.layout == "strided":
            return made(batch, length, 2 * width + 1, dtype=call.dtype)[..., 1::2]
        if call.layout == "swapped":
            return made(length, batch, width, dtype=call.dtype).transpose(0, 1)
        return made(batch, length, width, dtype=call.dtype)

    by_tokens = call.form == "by tokens"
    lead = (call.batch, call.tokens) if by_tokens else (call.batch,)
    scale = max(1, call.inputs) ** -0.5
    tensors = {
        "x": laid_out(call.batch, call.tokens, call.inputs),
        "weight": made(call.outputs, call.inputs, by=scale),
        "bias": made(call.outputs) if call.bias else None,
        "down": made(call.factors, call.rank, call.inputs, by=scale),
        "up": made(call.factors, call.outputs, call.rank, by=max(1, call.factors * call.rank) ** -0.5),
        "coefficients": made(*lead, call.factors, dtype=wide),
        "gain": None if call.gain == "none" else made(*([call.outputs] if call.gain == "row" else []), dtype=wide),
    }
    grad = laid_out(call.batch, call.tokens, call.outputs)
    with use_backend("cpp"):
        got = results(call.form, tensors, grad)
    exactly = {name: None if x is None else x.double() for name, x in tensors.items()}
    sizes = {name: None if x is None else x.abs() for name, x in exactly.items()}
    with use_backend("reference"):
        exact = results("by tokens" if by_tokens else "token", exactly, grad.double())
        magnitudes = results("by tokens" if by_tokens else "token", sizes, grad.double().abs())
    narrow = 0.0 if call.dtype == wide else NARROW_EPSILONS * torch.finfo(call.dtype).eps
    for name, ours in got.items():
        assert ours.shape == exact[name].shape
        assert ours.dtype == (call.dtype if name == "result" else tensors[name].dtype), name  # type: ignore[union-attr]
        sizes_of = magnitudes[name]
        # Products below the normal numbers of float16 lose more.
        tiny = 1e-6 * (1 + sizes_of.amax()) if call.dtype == torch.float16 and sizes_of.numel() else 1e-37
        allowed = (narrow + WIDE_EPSILONS * torch.finfo(wide).eps) * sizes_of + tiny
        within = (ours.double() - exact[name]).abs() <= allowed
        assert within.all(), (name, (ours.double() - exact[name])[~within][:3], allowed[~within][:3])


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(call=CALLS)
def test_random_calls(call: Call) -> None:
    check(call)


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None, derandomize=True, database=None)
@given(call=CALLS)
def test_five_thousand_random_calls(call: Call) -> None:
    check(call)
