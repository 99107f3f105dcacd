"""window_attention's Triton kernels in Triton's interpreter: several tiles, ragged on every axis."""

from collections.abc import Iterator
from dataclasses import replace

import op_checks
import pytest
import torch
from op_checks import CPU
from torch import Tensor

from quaver.kernels import njx_attention, use_backend, window_attention, window_exchange
from quaver.kernels._cases import Case
from quaver.kernels.window_attention import cases, tuning

DRAWS = (3, 4)
DTYPES = (torch.float32, torch.bfloat16)
#: Ragged over several tiles of 16 rows: parts of windows with a summary, documents, windows of a part and a bit.
OWN = [
    cases._attention_case("parts", (1, 2, 95, 24), 40, key_heads=1, select=True, exchange_tokens=9),
    cases._attention_case("parts-causal", (1, 1, 75, 16), 37, causal=True, select=True, layout="heads"),
    cases._attention_case("documents-parts", (2, 2, 83, 16), 36, starts=[[0, 7, 50], [0, 33, 83]], causal=True),
    cases._njx_case("njx-parts", (1, 2, 86, 16), 35, key_heads=1, source="own", exchange_fraction=0.4),
    cases._exchange_case("exchange-parts", (1, 2, 37, 40), source="shared", causal=True),
]
#: Of more than two seconds in the interpreter, which takes 5 ms and more for a program.
LONG = {
    *("window-of-one", "ragged", "ragged-causal", "shared-heads", "strided", "long-window"),
    *("exchange-source", "njx-source", "njx-source-causal", "njx-many"),
}
#: In float64 and float16 too.
MORE = {"ragged", "documents-each", "exchange-causal", "njx"}


def _contiguous(case: Case) -> Case:
    """Results lie in memory as q does: the checks want them in order."""
    return replace(case, function=lambda **inputs: case.function(**inputs).contiguous())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKED = [
    pytest.param(
        _contiguous(case), dtype, id=f"{case}-{_name(dtype)}", marks=[pytest.mark.slow] if case.name in LONG else []
    )
    for case in cases.CASES
    for dtype in DTYPES
]
CHECKED += [
    pytest.param(_contiguous(case), dtype, id=f"{case}-{_name(dtype)}", marks=pytest.mark.slow)
    for case in cases.CASES
    for dtype in (torch.float64, torch.float16)
    if case.name in MORE
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "triton_tile", lambda *_: tuning.Tile(16, 16, 1, 1))
    monkeypatch.setattr(tuning, "TRITON_TOKENS", 16)
    monkeypatch.setattr(tuning, "triton_sources", lambda _: 16)


@pytest.fixture
def with_triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("case, dtype", CHECKED)
def test_results_and_gradients_are_as_accurate_as_eager(case: Case, dtype: torch.dtype) -> None:
    with op_checks.poisoned_memory():
        op_checks.assert_result_as_accurate_as_eager(case, dtype, "triton")
        op_checks.assert_gradients_as_accurate_as_eager(case, dtype, "triton", draws=DRAWS)


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("case", [_contiguous(case) for case in OWN], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_several_tiles_of_a_window(case: Case, dtype: torch.dtype) -> None:
    with op_checks.poisoned_memory():
        op_checks.assert_result_as_accurate_as_eager(case, dtype, "triton")
        op_checks.assert_gradients_as_accurate_as_eager(case, dtype, "triton", draws=DRAWS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("with_triton")
def test_results_lie_as_q_does_and_have_the_same_bits_again(causal: bool) -> None:
    q, k, v = (torch.randn(1, 20, 2, 16).transpose(1, 2).requires_grad_() for _ in range(3))

    def call() -> tuple[Tensor, ...]:
        out = window_attention(q, k, v, 8, causal=causal)
        assert isinstance(out, Tensor)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones(1, 2, 20, 16))

    found = call()
    assert all(x.transpose(1, 2).is_contiguous() for x in found)
    assert all(map(torch.equal, found, call()))


@pytest.mark.parametrize("name", list("qkv"))
@pytest.mark.usefixtures("with_triton")
def test_not_a_number_stays_in_its_window_and_head(name: str) -> None:
    inputs = {x: torch.randn(1, 2, 40, 16) for x in "qkv"}
    clean = window_attention(**inputs, window=8)
    inputs[name][0, 1, 17, 3] = torch.nan
    got = window_attention(**inputs, window=8)
    assert isinstance(clean, Tensor)
    assert isinstance(got, Tensor)
    assert got[0, 1, 17].isnan().any()
    kept = torch.ones(1, 2, 40, dtype=torch.bool)
    kept[0, 1, slice(17, 18) if name == "q" else slice(16, 24)] = False
    assert torch.equal(got[kept], clean[kept])


@pytest.mark.usefixtures("with_triton")
def test_ties_of_select_go_to_the_lowest_index() -> None:
    q, k, v = (torch.randn(1, 2, 22, 16) for _ in range(3))
    select = torch.zeros(1, 2, 22)
    select[:, :, 6] = 1
    out, summary = window_attention(q, k, v, 8, select=select, exchange_tokens=3)
    weight = torch.tensor([1.0]).exp()
    first = (out[:, :, 0] + out[:, :, 1] + weight * out[:, :, 6]) / (2 + weight)
    torch.testing.assert_close(summary[:, :, 0], first)
    torch.testing.assert_close(summary[:, :, 1], out[:, :, 8:11].mean(2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.usefixtures("with_triton")
def test_a_source_out_of_range_gives_nan_in_its_row(dtype: torch.dtype, causal: bool) -> None:
    summary = torch.randn(1, 2, 20, 16, dtype=dtype)
    sources = torch.arange(20) - int(causal)
    clean = window_exchange(summary, sources, causal=causal)
    bad = {3: -1, 11: 2**40, 17: 17 if causal else 20}
    for window, source in bad.items():
        sources[window] = source
    got = window_exchange(summary, sources, causal=causal)
    rows = torch.zeros(20, dtype=torch.bool)
    rows[list(bad)] = True
    assert got[:, :, rows].isnan().all()
    assert torch.equal(got[:, :, ~rows], clean[:, :, ~rows])


@pytest.mark.usefixtures("with_triton")
def test_the_first_window_has_no_exchange_whatever_the_others_are() -> None:
    summary = torch.randn(1, 2, 5, 8)
    summary[:, :, 0] = torch.nan
    e = window_exchange(summary, causal=True)
    assert torch.equal(e[:, :, 0], torch.zeros(1, 2, 8))
    assert e[:, :, 1:].isnan().all()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("attention", "exchange", "njx")]
)
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    small = {
        "attention": cases._attention_case(name, (1, 2, 5, 3), 3, key_heads=1, select=True, causal=True),
        "exchange": cases._exchange_case(name, (1, 1, 4, 3), source="own", causal=True),
        "njx": cases._njx_case(name, (1, 1, 5, 2), 2),
    }
    op_checks.assert_gradients(small[name], "triton")


def test_only_the_chosen_kernels_run() -> None:
    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
    select, gate = torch.randn(1, 2, 20, requires_grad=True), torch.randn(2, requires_grad=True)

    def call() -> None:
        with use_backend("triton"):
            out = njx_attention(q, k, v, select, 8, gate=gate, exchange_fraction=0.5)
            torch.autograd.grad(out, (q, k, v, select, gate), torch.ones(1, 2, 20, 16))

    names = op_checks.dispatched(call)
    # set_ is the interpreter's, ones this test's own.
    op_checks.assert_only(names, "triton", "aten::ones", "aten::set_")
    ours = [name for name in names if name.startswith("quaver::")]
    assert ours == ["quaver::njx_attention_triton", "quaver::njx_attention_backward_triton"]


@pytest.mark.usefixtures("with_triton")
def test_heads_without_queries_have_gradients_of_zero() -> None:
    q, k = torch.randn(1, 0, 9, 8, requires_grad=True), torch.randn(1, 2, 9, 8, requires_grad=True)
    out = window_attention(q, k, k, 4)
    assert isinstance(out, Tensor)
    (of_k,) = torch.autograd.grad(out.sum(), k)
    assert torch.equal(of_k, torch.zeros(1, 2, 9, 8, device=CPU))
