"""The CUDA C++ of window_attention, window_exchange and njx_attention, compiled by g++ and run by csrc/emulator."""

from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import emulation
import op_checks
import pytest
import torch
from op_checks import CPU, DTYPES
from torch import Tensor

from quaver.kernels import _backends, njx_attention, window_attention, window_exchange
from quaver.kernels._cases import Case, values
from quaver.kernels.window_attention import cases as shared
from quaver.kernels.window_attention import op as op_module
from quaver.kernels.window_attention.cases import CASES
from quaver.kernels.window_attention.tuning import cuda_width

Run = Callable[..., Any]

#: Beside the shared cases: several tiles (64 rows for 16-bit types, 32 for float32, 16 for float64), ragged on every
#: axis, and each width of the kernels.
OWN = [
    shared._attention_case("tiles", (2, 1, 150, 24), 64, select=True),
    shared._attention_case("tiles-uneven", (1, 2, 140, 48), 48, key_heads=1, causal=True, select=True),
    shared._attention_case("tiles-of-small", (1, 1, 100, 7), 3, select=True, exchange_tokens=2),
    shared._attention_case("parts", (1, 4, 140, 70), 90, key_heads=2, select=True, exchange_tokens=50),
    shared._attention_case("parts-causal", (1, 1, 170, 100), 150, causal=True, select=True, layout="heads"),
    shared._attention_case("documents-tiles", (2, 2, 150, 16), 30, starts=[[0, 41, 42, 130], [0, 0, 64, 150]]),
    shared._exchange_case("exchange-tiles", (1, 2, 140, 96), source="own", causal=True),
    shared._njx_case("njx-tiles", (2, 2, 150, 40), 2, source="shared", exchange_fraction=0.5),
]


def fits(case: Case, dtype: torch.dtype) -> bool:
    """Whether the CUDA kernels take heads as wide as the case's."""
    inputs = case.inputs(dtype, CPU)
    return bool(inputs.get("q", inputs.get("summary")).shape[-1] <= cuda_width(dtype))


#: float32 and bfloat16 always, float64 and float16 as slow tests but for a few: a minute of the emulator.
COMBINATIONS = [
    pytest.param(case, dtype, id=f"{case}-{dtype}".replace("torch.", ""), marks=() if common else pytest.mark.slow)
    for case, dtype in product([*CASES, *OWN], DTYPES)
    if fits(case, dtype)
    for common in (dtype in (torch.float32, torch.bfloat16) or case.name in ("ragged-causal", "parts", "njx-source"),)
]
combinations = pytest.mark.parametrize("case, dtype", COMBINATIONS)


class Emulated:
    """The family of ops of one backend, as op.py has it, run by the emulator with every fault that it sees raised."""

    def __init__(self, emulator: emulation.Emulator) -> None:
        self.emulator = emulator
        self.how: dict[str, str] = {}
        family = op_module._Family
        self.attention_gradient = self.op("window_attention_backward", None, None)
        self.exchange_gradient = self.op("window_exchange_backward", None, None)
        self.njx_gradient = self.op("njx_attention_backward", None, None)
        self.attention = self.op("window_attention", family._save_attention, family._attention_backward)
        self.exchange = self.op("window_exchange", family._save_exchange, family._exchange_backward)
        self.njx = self.op("njx_attention", family._save_njx, family._njx_backward)

    def op(self, name: str, save: Any, backward: Any) -> Run:
        def call(*inputs: Any) -> Any:
            bare = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
            return self.emulator.run(lambda: getattr(torch.ops.quaver_emulated, name)(*bare), seed=1, **self.how)

        if save is None:
            return call
        emulated = self

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = call(*inputs)
                save(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward(emulated, ctx, *grads)

        return Direct.apply


@pytest.fixture(scope="module")
def loaded() -> Iterator[Emulated]:
    with emulation.ops("window_", "njx_") as emulator:
        yield Emulated(emulator)


@pytest.fixture
def emulated(loaded: Emulated, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """Calls that no backend is forced for run emulated."""
    loaded.how = {}
    monkeypatch.setattr(op_module, "_family", lambda like: None if _reference_is_forced() else loaded)
    return loaded


def _reference_is_forced() -> bool:
    return _backends._forced[-1:] == ["reference"]


@combinations
def test_result_is_as_accurate_as_eager(emulated: Emulated, case: Case, dtype: torch.dtype) -> None:
    packed = Case(case.name, lambda **inputs: case.function(**inputs).contiguous(), case.inputs, exact=False)
    op_checks.assert_result_as_accurate_as_eager(packed, dtype)


@combinations
def test_gradients_are_as_accurate_as_eager(emulated: Emulated, case: Case, dtype: torch.dtype) -> None:
    op_checks.assert_gradients_as_accurate_as_eager(case, dtype, draws=range(3, 5))


#: An order and copies other than an ordinary run's, which they are compared with; as slow tests all of them.
OTHER_ORDERS = [
    pytest.param(*both, marks=() if both in (("reverse", "late"), ("random", "random")) else pytest.mark.slow)
    for both in product(emulation.ORDERS, emulation.COPIES)
    if both != ("forward", "early")
]
ORDERED_NAMES = ("tiles-uneven", "documents-tiles", "njx-tiles", "long-window", "exchange-alone")
ORDERED = [case for case in (*CASES, *OWN) if case.name in ORDERED_NAMES]


@pytest.mark.parametrize("order, copies", OTHER_ORDERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_same_bits_in_any_order(emulated: Emulated, case: Case, dtype: torch.dtype, order: str, copies: str) -> None:
    results = []
    for how in ({}, {"order": order, "copies": copies}):
        emulated.how = how
        results.append([op_checks.run(case, dtype), *op_checks.gradients(case, dtype, "cpp")])
    for first, other in zip(*results, strict=True):
        assert torch.equal(first, other), case


def _heads(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> Tensor:
    batch, heads, length, width = shape
    return values((batch, length, heads, width), dtype, CPU, seed).transpose(1, 2)


def _misaligned(x: Tensor) -> Tensor:
    """A copy with the same strides, one element past a 16-byte boundary."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return storage.view(x.transpose(1, 2).shape).transpose(1, 2).copy_(x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_rows_off_their_boundaries_have_the_same_bits(emulated: Emulated, dtype: torch.dtype) -> None:
    """Such rows are not copied 16 bytes at a time."""
    q, k, v = (_heads((1, 2, 70, 32), dtype, seed).requires_grad_() for seed in (1, 2, 3))
    select, gate = values((1, 2, 70), dtype, CPU, 4), values((2,), dtype, CPU, 5)
    found = []
    for tensors in ((q, k, v), [_misaligned(x.detach()).requires_grad_() for x in (q, k, v)]):
        out = njx_attention(*tensors, select, 16, gate=gate)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_a_source_out_of_range_gives_nan_in_its_row(emulated: Emulated, dtype: torch.dtype, causal: bool) -> None:
    z = values((2, 2, 70, 20), dtype, CPU, 1)
    source = torch.arange(70).sub(1).clamp(min=0) if causal else torch.arange(70)
    good = window_exchange(z, source, causal=causal)
    for wrong in (-1, 70, 2**40) + ((5,) if causal else ()):
        broken = source.clone()
        broken[5] = wrong
        e = window_exchange(z, broken, causal=causal)
        assert e[:, :, 5].isnan().all()
        rest = torch.arange(70) != 5
        assert torch.equal(e[:, :, rest], good[:, :, rest])


@pytest.mark.parametrize("name", ("q", "k"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_not_a_number_stays_where_it_is_attended_to(emulated: Emulated, dtype: torch.dtype, name: str) -> None:
    inputs = {key: _heads((1, 2, 70, 32), dtype, seed) for seed, key in enumerate("qkv")}
    for window, causal in ((8, False), (8, True), (70, True)):
        clean = window_attention(**inputs, window=window, causal=causal)
        spoiled = {key: x.clone() for key, x in inputs.items()}
        spoiled[name][0, 1, 42, 3] = torch.nan
        out = window_attention(**spoiled, window=window, causal=causal)
        token = torch.arange(70)
        reached = token == 42
        if name == "k":
            reached = (token // window == 42 // window) & ((token >= 42) | (not causal))
        assert out[0, 1, reached].isnan().any(-1).all()
        assert torch.equal(out[0, 1, ~reached], clean[0, 1, ~reached])
        assert torch.equal(out[0, 0], clean[0, 0])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_a_value_that_is_no_number_spoils_no_gradient_of_other_windows(emulated: Emulated, dtype: torch.dtype) -> None:
    q, k, v = (_heads((1, 1, 70, 16), dtype, seed) for seed in (1, 2, 3))
    spoiled = v.clone()
    spoiled[0, 0, 42, 3] = torch.nan
    other = torch.arange(70) // 8 != 42 // 8  # windows that share a tile with the spoiled one
    found = []
    for of_values in (v, spoiled):
        leaves = [q.clone(), k.clone(), values((1, 1, 70), dtype, CPU, 4)]
        for leaf in leaves:
            leaf.requires_grad_()
        _, summary = window_attention(*leaves[:2], of_values, 8, select=leaves[2])
        found.append(torch.autograd.grad(summary.sum(), leaves))
    assert found[1][2][0, 0, ~other].isnan().any()
    for clean, broken in zip(*found, strict=True):
        assert torch.equal(clean[0, 0, other], broken[0, 0, other])


def test_too_wide_heads_say_so(emulated: Emulated) -> None:
    for width, dtype in ((130, torch.float32), (33, torch.float64)):
        q, k, v = (_heads((1, 1, 4, width), dtype, seed) for seed in (1, 2, 3))
        with pytest.raises(RuntimeError, match=f"up to {cuda_width(dtype)} elements in this dtype, got {width}"):
            window_attention(q, k, v, 2)


@pytest.mark.parametrize(
    "width, dtype", ((128, torch.float32), (129, torch.bfloat16), (32, torch.float64), (33, torch.float64))
)
def test_a_gpu_chooses_cuda_for_heads_that_fit(monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype) -> None:
    orders = []

    def choose(device: torch.device, order: tuple[str, ...]) -> str:
        orders.append(order)
        return "reference"

    monkeypatch.setattr(op_module, "choose", choose)
    monkeypatch.setattr(op_module, "CUDA_ORDER", ("cuda", "other"))
    op_module._family(SimpleNamespace(device=torch.device("cuda"), shape=(1, 1, 1, width), dtype=dtype))
    assert orders == [("cuda", "other") if width <= cuda_width(dtype) else ("other",)]
