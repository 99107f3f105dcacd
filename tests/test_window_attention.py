"""window_attention, window_exchange and njx_attention on the CPU against their references and the libraries."""

import itertools
import random
from typing import Any

import pytest
import torch
from op_checks import (
    CPU,
    DTYPES,
    LEVELS,
    assert_gradients,
    assert_gradients_as_accurate_as_eager,
    assert_only,
    assert_result_as_accurate_as_eager,
    dispatched,
    gradients,
    poisoned_memory,
    run,
)
from torch import Tensor
from torch.nn import functional as F

from quaver import timing
from quaver.kernels import _library, njx_attention, use_backend, window_attention, window_exchange
from quaver.kernels._cases import Case, values
from quaver.kernels.window_attention.cases import CASES

BY_NAME = {case.name: case for case in CASES}
SOME = [
    BY_NAME[name] for name in ("ragged-causal", "shared-heads", "documents", "exchange-source", "njx-source-causal")
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_is_as_accurate_as_eager(case: Case, dtype: torch.dtype) -> None:
    with poisoned_memory():
        got, eager = run(case, dtype), run(case, dtype, "reference")
    assert got.shape == eager.shape
    assert got.dtype == eager.dtype
    assert not got.isnan().any()
    if got.is_contiguous():
        assert_result_as_accurate_as_eager(case, dtype)
    else:
        # As [B, T, H, d] in memory, as q is.
        assert got.transpose(1, 2).is_contiguous()
        packed = Case(case.name, lambda **inputs: case.function(**inputs).contiguous(), case.inputs, exact=False)
        assert_result_as_accurate_as_eager(packed, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_as_accurate_as_eager(case: Case, dtype: torch.dtype) -> None:
    with poisoned_memory():
        assert_gradients_as_accurate_as_eager(case, dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_every_instruction_set(case: Case, level: str) -> None:
    with _library.capped_simd(level):
        got, of = run(case, torch.float32), gradients(case, torch.float32, "cpp")
    torch.testing.assert_close(got, run(case, torch.float32, "reference"))
    for ours, theirs in zip(of, gradients(case, torch.float32, "reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


SMALL = [
    case for case in CASES if case.name in ("ragged-causal", "documents-each", "exchange-one", "exchange-causal", "njx")
]


@pytest.mark.parametrize("case", [*SMALL, BY_NAME["window-of-one"], BY_NAME["njx-source"]], ids=str)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    assert_gradients(case, "cpp")


@pytest.mark.parametrize("case", SOME, ids=str)
def test_only_its_own_kernels_run(case: Case) -> None:
    leaves = case.inputs(torch.float32, torch.device("cpu"))
    for name in case.differentiable:
        leaves[name] = leaves[name].detach().requires_grad_()
    with use_backend("cpp"):
        names = dispatched(lambda: case.function(**leaves))
    assert_only(names, "cpp", "aten::cat")


@pytest.mark.parametrize("case", [*SOME, BY_NAME["njx-many"], BY_NAME["long-window"]], ids=str)
def test_bits_do_not_depend_on_threads(case: Case) -> None:
    found = []
    for threads in (1, 2, 5):
        with timing.pinned_threads(threads):
            found.append([run(case, torch.float32), *gradients(case, torch.float32, "cpp")])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_probabilities_are_rounded_to_nearest_for_products_of_bf16() -> None:
    """Of values that are all 1 the outputs are 1 on average; probabilities cut off make them 0.2 % less."""
    q, k = (values((8, 8, 512, 64), torch.bfloat16, torch.device("cpu"), seed) for seed in (1, 2))
    for window in (32, 64):
        out = window_attention(q, k, torch.ones_like(q), window)
        assert (out.double().mean() - 1).abs() < 2e-4


def windows_mask(length: int, window: int, causal: bool) -> Tensor:
    index = torch.arange(length)
    same = index[:, None] // window == index // window
    return same & (index <= index[:, None]) if causal else same


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length, window", [(1, 1), (40, 7), (256, 64), (300, 256)])
def test_agrees_with_sdpa_under_the_mask_of_windows(length: int, window: int, causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, length, 32, dtype=torch.float64) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=windows_mask(length, window, causal))
    torch.testing.assert_close(window_attention(q, k, v, window, causal=causal), expected)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_the_package_local_attention(causal: bool) -> None:
    package = pytest.importorskip("local_attention.local_attention")
    q, k, v = (torch.randn(2, 3, 48, 32) for _ in range(3))
    module = package.LocalAttention(
        window_size=8, causal=causal, look_backward=0, look_forward=0, use_rotary_pos_emb=False
    )
    torch.testing.assert_close(window_attention(q, k, v, 8, causal=causal), module(q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_documents_are_as_if_alone(causal: bool) -> None:
    q, k, v = (torch.randn(2, 2, 50, 16) for _ in range(3))
    starts = [0, 3, 20, 21, 50]
    packed = window_attention(q, k, v, 8, causal=causal, document_starts=torch.tensor(starts, dtype=torch.int32))
    for first, end in itertools.pairwise(starts):
        alone = window_attention(*(x[:, :, first:end] for x in (q, k, v)), 8, causal=causal)
        assert torch.equal(packed[:, :, first:end], alone)


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_the_future_changes_no_bit(fraction: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 60, 16) for _ in range(3))
    select, gate = torch.randn(2, 2, 60), torch.randn(2)

    def njx() -> Tensor:
        return njx_attention(q, k, v, select, 8, gate=gate, causal=True, exchange_fraction=fraction)

    before = njx()
    for at in (1, 7, 8, 30, 59):
        for x in (q, k, v, select):
            x[:, :, at:].add_(1).mul_(3)
        assert torch.equal(njx()[:, :, :at], before[:, :, :at])
        before = njx()


def test_not_a_number_stays_in_its_window_and_head() -> None:
    for name in "qkv":
        inputs = {x: torch.randn(1, 2, 40, 16) for x in "qkv"}
        clean = window_attention(**inputs, window=8)
        inputs[name][0, 1, 17, 3] = torch.nan
        got = window_attention(**inputs, window=8)
        assert got[0, 1, 17].isnan().any()
        touched = slice(17, 18) if name == "q" else slice(16, 24)
        kept = torch.ones(1, 2, 40, dtype=torch.bool)
        kept[0, 1, touched] = False
        assert torch.equal(got[kept], clean[kept])


def test_ties_of_select_go_to_the_lowest_index() -> None:
    q, k, v = (torch.randn(1, 2, 22, 16) for _ in range(3))
    select = torch.zeros(1, 2, 22)
    select[:, :, 6] = 1
    out, summary = window_attention(q, k, v, 8, select=select, exchange_tokens=3)
    weight = torch.tensor([1.0]).exp()
    first = (out[:, :, 0] + out[:, :, 1] + weight * out[:, :, 6]) / (2 + weight)
    torch.testing.assert_close(summary[:, :, 0], first)
    torch.testing.assert_close(summary[:, :, 1], out[:, :, 8:11].mean(2))
    torch.testing.assert_close(summary[:, :, 2], out[:, :, 16:19].mean(2))


def test_the_first_window_has_no_exchange_whatever_the_others_are() -> None:
    summary = torch.randn(1, 2, 5, 8)
    summary[:, :, 0] = torch.nan
    e = window_exchange(summary, causal=True)
    assert torch.equal(e[:, :, 0], torch.zeros(1, 2, 8))
    assert e[:, :, 1:].isnan().any()


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize(
    "dtype", [dtype if dtype.itemsize > 2 else pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES]
)
def test_random_njx_calls_are_as_accurate_as_eager(seed: int, dtype: torch.dtype) -> None:
    draw = random.Random(seed)
    group, key_heads, batch = draw.choice((1, 2, 3)), draw.choice((1, 2)), draw.choice((1, 2, 3))
    length, window = draw.randint(1, 90), draw.choice((1, 2, 5, 8, 16, 17, 31, 64))
    width, causal = draw.choice((1, 7, 16, 33, 64, 100, 128)), draw.random() < 0.5
    windows, heads = -(-length // window), group * key_heads
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (normal(batch, length, h, width).transpose(1, 2) for h in (heads, key_heads, key_heads))
    made = {"q": q, "k": k, "v": v, "select": normal(batch, heads, length), "gate": normal(heads)}
    most = torch.arange(windows).clamp(min=1) if causal else torch.full((windows,), windows)
    source = (torch.rand(batch, windows, generator=generator, dtype=torch.float64) * most).long()
    constants = {
        "window": window,
        "causal": causal,
        "exchange_fraction": draw.choice((1.0, 0.5, 0.1)),
        "source": draw.choice((None, source, source[0])),
    }

    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        return {**{name: x.to(device, dtype) for name, x in made.items()}, **constants}

    def njx(**arguments: Any) -> Tensor:
        return njx_attention(**arguments).contiguous()

    case = Case(f"njx-{seed}", njx, inputs, tuple(made), exact=False)
    assert_result_as_accurate_as_eager(case, dtype)
    assert_gradients_as_accurate_as_eager(case, dtype)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize(
    "length", [pytest.param(3200, id="two-heads-then-one"), pytest.param(6000, id="each-stage-of-the-whole")]
)
def test_njx_of_many_tokens_is_that_of_each_head(length: int, threads: int) -> None:
    """How many heads go through the stages together depends on how many outputs the caches hold (2 MiB)."""
    q, k, v, grad = (values((2, length, 3, 64), torch.float32, CPU, seed).transpose(1, 2) for seed in range(4))
    select, gate = values((2, 3, length), torch.float32, CPU, 4), values((3,), torch.float32, CPU, 5)

    def njx_of(batches: slice, heads: slice) -> list[Tensor]:
        inputs = [x[batches, heads].detach().clone().requires_grad_() for x in (q, k, v, select)]
        out = njx_attention(*inputs, 64, gate=gate[heads], causal=True)
        return [out, *torch.autograd.grad(out, inputs, grad[batches, heads])]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = njx_of(slice(None), slice(None))
        for b, h in itertools.product(range(2), range(3)):
            for whole, part in zip(together, njx_of(slice(b, b + 1), slice(h, h + 1)), strict=True):
                assert torch.equal(whole[b : b + 1, h : h + 1], part)
    finally:
        torch.set_num_threads(before)


def test_memory_is_linear_in_the_number_of_tokens() -> None:
    def extra(length: int) -> int:
        q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
        select, gate = torch.randn(1, 1, length, requires_grad=True), torch.ones(1, requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            njx_attention(q, k, v, select, 16, gate=gate).sum().backward()
        return sum(max(0, event.cpu_memory_usage) for event in profile.events())

    short, long = extra(2048), extra(16384)
    assert long < 8.5 * short
    # Everything allocated, freed or not, in tensors of the size of q: a T x T matrix would be 1,024.
    assert long < 30 * 16384 * 16 * 4


def test_jacobian_penalty_through_two_layers() -> None:
    """A penalty on gradients differentiates the backward ops: it equals the reference's."""

    def penalty(backend: str) -> list[Tensor]:
        torch.manual_seed(0)
        x = torch.randn(2, 24, 2, 8, dtype=torch.float64, requires_grad=True)
        weights = [torch.randn(8, 25, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        gate = torch.full((2,), 0.7, dtype=torch.float64, requires_grad=True)
        hidden = x
        with use_backend(backend):
            for weight in weights:
                q, k, v, select = (hidden @ weight).transpose(1, 2).split((8, 8, 8, 1), -1)
                out = njx_attention(q, k, v, select.squeeze(-1), 6, gate=gate, causal=True, exchange_fraction=0.5)
                hidden = hidden + out.transpose(1, 2)
        signs = torch.randint(0, 2, hidden.shape).double() * 2 - 1
        (of_x,) = torch.autograd.grad((hidden * signs).sum(), x, create_graph=True)
        return list(torch.autograd.grad(of_x.square().sum(), (x, *weights, gate)))

    for ours, theirs in zip(penalty("cpp"), penalty("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_third_derivatives() -> None:
    """With a graph asked for, the derivative of a backward op has one too."""

    def third(backend: str) -> Tensor:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
        select = torch.randn(1, 2, 9, dtype=torch.float64, requires_grad=True)
        gate = torch.ones(2, dtype=torch.float64, requires_grad=True)
        with use_backend(backend):
            total = njx_attention(q, k, v, select, 4, gate=gate, causal=True).square().sum()
            for _ in range(3):
                (of_q,) = torch.autograd.grad(total, q, create_graph=True)
                total = of_q.square().sum()
        return of_q

    torch.testing.assert_close(third("cpp"), third("reference"), rtol=1e-8, atol=1e-10)


Q, S, G = torch.zeros(2, 4, 9, 8), torch.zeros(2, 4, 9), torch.zeros(4)


def njx(**changes: Any) -> Any:
    return njx_attention(**{"q": Q, "k": Q, "v": Q, "select": S, "window": 4, "gate": G, **changes})


def attention(**changes: Any) -> Any:
    return window_attention(**{"q": Q, "k": Q, "v": Q, "window": 4, **changes})


BAD = [
    (lambda: attention(q=[1.0]), TypeError, "q: expected a tensor, got list"),
    (lambda: attention(q=Q[0]), ValueError, "q: expected [B, H, T, d], got shape [4, 9, 8]"),
    (lambda: attention(q=Q.long()), TypeError, "q: expected float64, float32, bfloat16 or float16, got torch.int64"),
    (lambda: attention(k=Q.double()), TypeError, "k: expected torch.float32, as q has, got torch.float64"),
    (lambda: attention(v=Q.to("meta")), ValueError, "v: expected a tensor on cpu, as q is, got one on meta"),
    (lambda: attention(k=Q[:, :, :8]), ValueError, "k: expected [2, H, 9, 8] for q [2, 4, 9, 8], got [2, 4, 8, 8]"),
    (lambda: attention(v=Q[:, :2]), ValueError, "v: expected 4 heads, as k has, got 2"),
    (
        lambda: attention(k=Q[:, :3], v=Q[:, :3]),
        ValueError,
        "k: expected a number of heads that divides q's 4, got 3",
    ),
    (lambda: attention(q=Q[..., :0], k=Q[..., :0], v=Q[..., :0]), ValueError, "q: expected a head width of at least 1"),
    (lambda: attention(window=0), ValueError, "window: expected at least 1, got 0"),
    (lambda: attention(window=2.0), TypeError, "window: expected an int, got float"),
    (lambda: attention(causal=1), TypeError, "causal: expected True or False, got int"),
    (lambda: attention(scale="x"), TypeError, "scale: expected a float or None, got str"),
    (lambda: attention(scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
    (lambda: attention(exchange_tokens=2), ValueError, "exchange_tokens: needs select, got None"),
    (lambda: attention(select=S, exchange_tokens=5), ValueError, "exchange_tokens: expected 1 to 4, the window, got 5"),
    (lambda: attention(select=S[:, :2]), ValueError, "select: expected [B, H, T] [2, 4, 9] for q [2, 4, 9, 8], got [2"),
    (lambda: attention(select=S.half()), TypeError, "select: expected torch.float32 with a q of torch.float32, got"),
    (
        lambda: attention(select=S, document_starts=torch.zeros(1, dtype=torch.int32)),
        ValueError,
        "select: there is no summary of windows that depend on document_starts",
    ),
    (
        lambda: attention(document_starts=torch.zeros(1, dtype=torch.int64)),
        TypeError,
        "document_starts: expected an int32 tensor, got torch.int64",
    ),
    (
        lambda: attention(document_starts=torch.zeros((3, 1), dtype=torch.int32)),
        ValueError,
        "document_starts: expected [n] or [2, n], n at least 1, got [3, 1]",
    ),
    (lambda: njx(gate=torch.zeros(3)), ValueError, "gate: expected [H] [4] for q [2, 4, 9, 8], got [3]"),
    (lambda: njx(exchange_fraction=0.0), ValueError, "exchange_fraction: expected a number in (0, 1], got 0.0"),
    (lambda: njx(exchange_fraction=1.1), ValueError, "exchange_fraction: expected a number in (0, 1], got 1.1"),
    (lambda: njx(exchange_fraction="x"), TypeError, "exchange_fraction: expected a float, got str"),
    (lambda: njx(source=torch.zeros(2, dtype=torch.int64)), ValueError, "source: expected [3] or [2, 3], got [2]"),
    (lambda: njx(source=torch.zeros(3)), TypeError, "source: expected an int64 tensor, got torch.float32"),
    (lambda: window_exchange(Q[0]), ValueError, "summary: expected [B, H, W, d], d at least 1, got [4, 9, 8]"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_input_is_named(number: int, compiled: bool) -> None:
    call, error, message = BAD[number]
    if not compiled:
        with pytest.raises(error) as raised:
            call()
    else:
        with pytest.raises(Exception) as raised:
            torch.compile(call, backend="eager", fullgraph=True)()
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "source, causal, message",
    [
        ([0, 3, 0], False, "source: expected a window in [0, 2] for window 1, got 3"),
        ([0, -1, 0], False, "source: expected a window in [0, 2] for window 1, got -1"),
        ([9, 0, 2], True, "source: expected a window in [0, 1] for window 2, got 2"),
    ],
)
def test_a_source_out_of_range_is_refused(source: list[int], causal: bool, message: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        njx(source=torch.tensor(source), causal=causal)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "starts, message", [([1], "the first to be 0, got 1"), ([0, 7, 5], "got 7 before 5"), ([0, 10], "up to 9")]
)
def test_documents_out_of_order_are_refused(starts: list[int], message: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        attention(document_starts=torch.tensor(starts, dtype=torch.int32))
    assert message in str(raised.value)
