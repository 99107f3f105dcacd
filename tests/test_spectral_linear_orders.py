"""spectral_linear: which order each pass takes, what forward keeps for backward, and which kernels run."""

import math
import random
from fractions import Fraction
from typing import Any

import pytest
import torch
from op_checks import CPU, assert_only, dispatched
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quaver.kernels import _library, delta_linear, spectral_coefficients, spectral_delta, spectral_linear, use_backend
from quaver.kernels._cases import Case
from quaver.kernels.spectral_linear.cases import CASES, linear_case
from quaver.kernels.spectral_linear.orders import Sizes, backward_by_delta, forward_by_delta

BY_NAME = {case.name: case for case in CASES}
ARGUMENTS = ("x", "weight", "bias", "down", "up", "coefficients", "gain")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_forward_takes_the_order_of_fewer_multiplications(seed: int, shared: bool) -> None:
    draw = random.Random(seed)
    batch, inputs, outputs, factors, rank = (draw.randint(1, most) for most in (40, 600, 600, 9, 40))
    crossover = inputs * outputs // (inputs + outputs)
    for tokens in (1, crossover, crossover + 1, *(draw.randint(1, 600) for _ in range(20))):
        base = batch * tokens * outputs * inputs
        by_tokens = batch * tokens * (inputs + outputs) * factors * rank + base
        by_delta = batch * outputs * inputs * factors * rank
        # A factor's product for each 16 samples and its share for each of them, at 3 / 4 of the rate.
        together = Fraction(4, 3) * (math.ceil(batch / 16) * rank + batch) * factors * outputs * inputs
        least = min(by_delta, together) if shared else by_delta
        sizes = Sizes(batch, tokens, inputs, outputs, factors, rank, shared)
        assert forward_by_delta(sizes) == (least + base < by_tokens)


@pytest.mark.parametrize(
    "batch, rank, crossover",
    [
        (8, 12, 224 * 4 / 3 * 20 / 96),
        (1, 12, 224),
        (2, 2, 224),
        (64, 12, 224 * 4 / 3 * 28 / 192),
        (17, 12, 224 * 4 / 3 * 41 / 204),
    ],
)
def test_samples_that_share_the_products_of_factors_cross_over_earlier(batch: int, rank: int, crossover: float) -> None:
    for tokens in (*range(1, 230), 1000):
        sizes = Sizes(batch, tokens, 448, 448, 3, rank, True)
        assert forward_by_delta(sizes) == (tokens > crossover), tokens


@pytest.mark.parametrize(
    "device, dtype, shared",
    [
        ("cpu", torch.float32, True),
        ("cpu", torch.float16, True),
        ("meta", torch.float32, False),
    ],
)
def test_who_shares(device: str, dtype: torch.dtype, shared: bool) -> None:
    x, weight, down = (torch.empty(shape, dtype=dtype, device=device) for shape in ((2, 3, 5), (7, 5), (4, 6, 5)))
    assert Sizes.of(x, weight, down) == (2, 3, 5, 7, 4, 6, shared)


def test_bfloat16_shares_unless_by_tiles() -> None:
    x, weight, down = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((2, 3, 5), (7, 5), (4, 6, 5)))
    assert Sizes.of(x, weight, down).shared == (_library.current_simd() != "amx")


ALL = {"need_x": True, "need_weight": True, "need_down": True, "need_up": True, "need_coefficients": True}
NONE = dict.fromkeys(ALL, False)
NEVER = 10**9


@pytest.mark.parametrize(
    "needed, kept_by_delta, crossover",
    [
        # Of width 448 and R = 320. By tokens dz, z, g^T z, dz^T x, dz down: 5 T; by Delta H, P and W + Delta: 3 * 448.
        (ALL, None, 3 * 448 / 5),
        (ALL, False, 3 * 448 / 4),
        (ALL, True, 2 * 448 / 5),
        ({**NONE, "need_x": True}, None, 448 / 2),
        ({**NONE, "need_x": True}, True, 0),
        # G, T 448 / 320, is not made for the weight in any case.
        ({**NONE, "need_coefficients": True}, None, 448 / (2 - 1.4)),
        ({**NONE, "need_coefficients": True}, False, NEVER),
        ({**NONE, "need_down": True}, None, 448 / (2 - 1.4)),
        ({**NONE, "need_up": True, "need_weight": True}, None, 448 / 3),
        ({**NONE, "need_weight": True}, None, NEVER),
    ],
)
def test_backward_takes_the_order_of_fewer_multiplications(
    needed: dict[str, bool], kept_by_delta: bool | None, crossover: float
) -> None:
    for tokens in range(1, 1000):
        by_delta = backward_by_delta(Sizes(8, tokens, 448, 448, 20, 16, False), **needed, kept_by_delta=kept_by_delta)
        assert by_delta == (tokens > crossover), tokens


#: Of 8 samples and rank 16: what W + Delta, and the gradients of down, up and coefficients, each take, in N K R.
SHARED = 4 / 3 * (16 + 8) / (8 * 16)


@pytest.mark.parametrize(
    "needed, kept_by_delta, crossover",
    [
        (ALL, None, 4 * SHARED * 448 / 5),
        (ALL, True, 3 * SHARED * 448 / 5),
        ({**NONE, "need_x": True}, None, SHARED * 448 / 2),
        # G, of T N K, is not made for the weight in any case.
        ({**NONE, "need_coefficients": True}, None, SHARED * 448 / (2 - 1.4)),
        ({**NONE, "need_up": True, "need_coefficients": True, "need_weight": True}, None, 2 * SHARED * 448 / 3),
    ],
)
def test_backward_counts_what_samples_share(
    needed: dict[str, bool], kept_by_delta: bool | None, crossover: float
) -> None:
    for tokens in range(1, 1000):
        by_delta = backward_by_delta(Sizes(8, tokens, 448, 448, 20, 16, True), **needed, kept_by_delta=kept_by_delta)
        assert by_delta == (tokens > crossover), tokens


class Calls(TorchDispatchMode):
    """The arguments of quaver's ops, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "quaver":
            self.seen[func.name().removeprefix("quaver::")] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "tokens, order, forward, backward",
    # N = K = 24: forward crosses at 12, backward at 18 where z was kept, at 9.6 where W + Delta was.
    [
        *((tokens, None, False, False) for tokens in (1, 12)),
        *((tokens, None, True, True) for tokens in (13, 40)),
        *((tokens, "token", False, tokens > 18) for tokens in (1, 18, 19, 40)),
        *((tokens, "delta", True, tokens > 9) for tokens in (1, 9, 10, 40)),
    ],
)
def test_each_pass_is_in_its_order(tokens: int, order: str | None, forward: bool, backward: bool) -> None:
    inputs = linear_case("", (2, tokens), (24, 24), order=order).inputs(torch.float32, CPU)
    leaves = {key: x.requires_grad_() if isinstance(x, Tensor) else x for key, x in inputs.items()}
    with Calls() as calls:
        spectral_linear(**leaves).sum().backward()
    assert calls.seen["spectral_linear"][7:] == (forward, True)
    assert calls.seen["spectral_linear_backward"][10] == backward
    kept = calls.seen["spectral_linear_backward"][8:10]
    assert [x is not None for x in kept] == [forward, not forward]


def test_coefficients_by_tokens_take_the_token_path() -> None:
    inputs = linear_case("", (2, 40), (8, 8), by_tokens=True).inputs(torch.float32, CPU)
    leaves = {key: x.requires_grad_() if isinstance(x, Tensor) else x for key, x in inputs.items()}
    with Calls() as calls:
        spectral_linear(**leaves).sum().backward()
    assert calls.seen["spectral_linear"][7] is False
    assert calls.seen["spectral_linear_backward"][10] is False


@pytest.mark.parametrize("order, kept_for", [("delta", {"x"}), ("token", {"up", "coefficients", "gain"})])
def test_nothing_is_kept_or_made_that_nobody_wants(order: str, kept_for: set[str]) -> None:
    inputs = {**BY_NAME["delta"].inputs(torch.float32, CPU), "order": order}
    for name in ARGUMENTS:
        one = {**inputs, name: inputs[name].detach().clone().requires_grad_()}
        with Calls() as calls:
            spectral_linear(**one).sum().backward()
        assert calls.seen["spectral_linear"][8] == (name in kept_for)
        assert calls.seen["spectral_linear_backward"][11:] == tuple(other == name for other in ARGUMENTS)
    with torch.no_grad(), Calls() as calls:
        spectral_linear(**one)
    assert calls.seen["spectral_linear"][8] is False


@pytest.mark.parametrize("name", ["token", "delta"])
def test_a_gradient_alone_is_the_one_beside_the_others(name: str) -> None:
    """Which gradients are asked for changes what is computed, not what comes out."""
    case = BY_NAME[name]
    inputs = case.inputs(torch.float64, CPU)
    leaves = {key: inputs[key].detach().clone().requires_grad_() for key in case.differentiable}
    out = spectral_linear(**{**inputs, **leaves})
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    together = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
    for key in case.differentiable:
        alone = spectral_linear(**{**inputs, key: leaves[key]})
        (got,) = torch.autograd.grad(alone, leaves[key], grad)
        torch.testing.assert_close(got, together[key], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "name", ["token", "delta", "by-tokens", "swapped", "decode", "decode-some", "Delta", "delta_linear", "coefficients"]
)
def test_only_its_own_kernels_run(name: str) -> None:
    case: Case = BY_NAME[name]
    leaves = case.inputs(torch.float32, CPU)
    for key in case.differentiable:
        leaves[key] = leaves[key].detach().requires_grad_()
    with use_backend("cpp"):
        grad = torch.ones_like(case.function(**leaves))

        def call() -> None:
            out = case.function(**leaves)
            torch.autograd.grad(out, [leaves[key] for key in case.differentiable], grad)

        names = dispatched(call)
    assert_only(names, "cpp")
    op = {
        spectral_linear: "spectral_linear",
        spectral_delta: "spectral_delta",
        delta_linear: "delta_linear",
        spectral_coefficients: "spectral_coefficients",
    }[case.function]
    ours = [name for name in names if name.startswith("quaver::")]
    assert ours == [f"quaver::{op}", f"quaver::{op}_backward"]
