"""Calls of window_attention, window_exchange and njx_attention that every check shares, and the rows of the table."""

from typing import Any

import torch
from torch import Tensor

from .._cases import Case, values
from .op import njx_attention, window_attention, window_exchange
from .rows import ROWS

__all__ = ["CASES", "ROWS"]


def _out(**arguments: Any) -> Tensor:
    out = window_attention(**arguments)
    assert isinstance(out, Tensor)
    return out


def _out_and_summary(**arguments: Any) -> Tensor:
    """Both results as one tensor: a case has one."""
    out, summary = window_attention(**arguments)
    return torch.cat((out.flatten(), summary.flatten()))


def _heads(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, seed: int, layout: str
) -> Tensor:
    batch, heads, length, width = shape
    if layout == "tokens":  # as a projection makes it
        return values((batch, length, heads, width), dtype, device, seed).transpose(1, 2)
    if layout == "strided":  # not even a row's elements lie side by side
        return values((batch, heads, length, 2 * width + 3), dtype, device, seed)[..., 3::2]
    if layout == "large":
        return values(shape, dtype, device, seed) * 30
    return values(shape, dtype, device, seed)


def _attention_case(
    name: str,
    shape: tuple[int, int, int, int],
    window: int,
    *,
    key_heads: int | None = None,
    layout: str = "tokens",
    select: bool = False,
    starts: list[Any] | None = None,
    **arguments: Any,
) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        batch, heads, length, width = shape
        keys = (batch, heads if key_heads is None else key_heads, length, width)
        made: dict[str, Any] = {
            "q": _heads(shape, dtype, device, 1, layout),
            "k": _heads(keys, dtype, device, 2, layout),
            "v": _heads(keys, dtype, device, 3, layout),
            "window": window,
        }
        if select:
            made["select"] = values(shape[:3], dtype, device, 4)
        if starts is not None:
            made["document_starts"] = torch.tensor(starts, dtype=torch.int32, device=device)
        return {**made, **arguments}

    names = ("q", "k", "v", *(("select",) if select else ()))
    return Case(name, _out_and_summary if select else _out, inputs, names, exact=False)


def _exchange_case(
    name: str, shape: tuple[int, int, int, int], *, source: str | None = None, causal: bool = False
) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        return {
            "summary": values(shape, dtype, device, 1),
            "source": _source(source, shape[0], shape[2], causal, device),
            "causal": causal,
        }

    return Case(name, window_exchange, inputs, ("summary",), exact=False)


def _source(kind: str | None, batch: int, windows: int, causal: bool, device: torch.device) -> Tensor | None:
    """Windows drawn with repeats: one list for all sequences ("shared"), or one for each ("own")."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(5)
    shape = (windows,) if kind == "shared" else (batch, windows)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    most = torch.arange(windows).clamp(min=1) if causal else torch.full((windows,), windows)
    return (drawn * most).long().to(device)


def _njx_case(
    name: str,
    shape: tuple[int, int, int, int],
    window: int,
    *,
    key_heads: int | None = None,
    layout: str = "tokens",
    source: str | None = None,
    causal: bool = False,
    **arguments: Any,
) -> Case:
    def inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        batch, heads, length, width = shape
        keys = (batch, heads if key_heads is None else key_heads, length, width)
        return {
            "q": _heads(shape, dtype, device, 1, layout),
            "k": _heads(keys, dtype, device, 2, layout),
            "v": _heads(keys, dtype, device, 3, layout),
            "select": values(shape[:3], dtype, device, 4),
            "window": window,
            "source": _source(source, batch, -(-length // window), causal, device),
            "gate": values((heads,), dtype, device, 6),
            "causal": causal,
            **arguments,
        }

    return Case(name, njx_attention, inputs, ("q", "k", "v", "select", "gate"), exact=False)


CASES = [
    _attention_case("one", (1, 1, 1, 1), 1),
    _attention_case("no-tokens", (2, 2, 0, 8), 4),
    _attention_case("no-batch", (0, 2, 9, 8), 4, select=True),
    _attention_case("no-heads", (2, 0, 9, 8), 4, select=True),
    _attention_case("window-of-one", (2, 3, 7, 5), 1, select=True),
    _attention_case("ragged", (2, 2, 37, 16), 8, select=True),
    _attention_case("ragged-causal", (2, 2, 37, 16), 8, select=True, causal=True, exchange_tokens=3),
    _attention_case("one-window", (1, 2, 11, 32), 64, causal=True, scale=0.3),
    _attention_case("negative-scale", (1, 2, 37, 16), 20, causal=True, select=True, scale=-8.0),
    _attention_case("no-scale", (1, 2, 21, 16), 8, causal=True, scale=0.0),
    _attention_case("odd-width", (1, 2, 41, 19), 20, layout="heads", select=True, exchange_tokens=7),
    _attention_case("shared-heads", (2, 6, 35, 32), 16, key_heads=2, causal=True, select=True),
    _attention_case("one-key-head", (1, 4, 50, 24), 17, key_heads=1),
    _attention_case("strided", (2, 2, 21, 12), 6, layout="strided", select=True),
    _attention_case("large", (1, 2, 40, 16), 16, layout="large", causal=True),
    _attention_case("long-window", (1, 1, 210, 24), 100, causal=True, select=True, exchange_tokens=30),
    _attention_case("whole-long-windows", (1, 2, 192, 16), 96, select=True),
    _attention_case("wide", (1, 2, 40, 128), 33, select=True),
    _attention_case("documents", (2, 2, 37, 16), 8, starts=[0, 5, 5, 20, 37]),
    _attention_case("documents-each", (2, 2, 23, 8), 4, starts=[[0, 9, 10], [0, 1, 23]], causal=True),
    _exchange_case("exchange-one", (1, 1, 1, 3), causal=True),
    _exchange_case("exchange-alone", (2, 2, 1, 16), causal=True),
    _exchange_case("exchange-none", (2, 2, 0, 8)),
    _exchange_case("exchange", (2, 2, 21, 16)),
    _exchange_case("exchange-causal", (2, 2, 21, 16), causal=True),
    _exchange_case("exchange-source", (2, 2, 70, 20), source="own"),
    _exchange_case("exchange-source-causal", (2, 1, 70, 20), source="shared", causal=True),
    _exchange_case("exchange-many", (1, 1, 150, 8), source="own"),
    _exchange_case("exchange-many-causal", (1, 1, 150, 8), source="own", causal=True),
    _njx_case("njx", (2, 2, 37, 16), 8),
    _njx_case("njx-causal", (2, 2, 37, 16), 8, causal=True, exchange_fraction=0.3),
    _njx_case("njx-source", (2, 4, 50, 20), 4, key_heads=2, source="own", layout="heads"),
    _njx_case("njx-source-causal", (3, 2, 66, 32), 5, source="shared", causal=True, exchange_fraction=0.5),
    _njx_case("njx-many", (1, 1, 270, 8), 2, causal=True, scale=0.7),
    _njx_case("njx-no-tokens", (2, 2, 0, 8), 4),
]
