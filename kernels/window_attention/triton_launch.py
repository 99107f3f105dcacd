"""How the host side of window attention's Triton kernels cuts rows into tiles, and runs attention and its gradients."""

import functools
from typing import Any, NamedTuple

import triton
from torch import Tensor

from .._seeds import compute_dtype
from .._triton import launch
from ..philox.triton_kernels import scalar_words
from . import tuning
from .triton_attention import attention_kernel
from .triton_gradients import key_gradient_kernel, query_gradient_kernel, window_gradient_kernel
from .triton_summary import document_bounds_kernel, sum_parts_kernel

# Nothing here is defined by single roundings, as noise is.
launch_fused = functools.partial(launch, enable_fp_fusion=True)


def with_rows(x: Tensor) -> Tensor:
    """x, or a copy whose rows lie in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """[B, H, T, d] as the kernels take it: with the strides of batches, heads and rows."""
    return x, x.stride(0), x.stride(1), x.stride(2)


def power_of_two(size: int, least: int) -> int:
    return max(least, int(triton.next_power_of_2(size)))


def document_bounds(starts: Tensor, length: int, window: int) -> Tensor:
    """[B or 1, 2, T]: where each token's window begins and ends."""
    starts = starts.contiguous()
    batch = starts.shape[0] if starts.dim() == 2 else 1
    bounds = starts.new_empty((batch, 2, length))
    grid = (triton.cdiv(length, 128), batch)
    documents = starts.shape[-1]
    launch_fused(document_bounds_kernel, grid, bounds, starts, documents, length, window, documents, BLOCK=128)
    return bounds


class Tiling(NamedTuple):
    """How rows are cut: a window has `parts` tiles and begins `window` rows after the one before it."""

    tile: tuning.Tile
    window: int
    parts: int
    tiles: int

    @staticmethod
    def of(q: Tensor, window: int, backward: bool, documents: bool) -> "Tiling":
        length = q.shape[2]
        window = min(window, length)
        tile = tuning.triton_tile(q.dtype, power_of_two(q.shape[3], 16), backward, length if documents else window)
        if documents:  # their windows lie across tiles
            window = tile.rows
        parts = triton.cdiv(window, tile.rows)
        return Tiling(tile, window, parts, length // window * parts + triton.cdiv(length % window, tile.rows))


class Call(NamedTuple):
    """One call of attention: that of windows, or the exchange, whose rows are windows and whose q, k and v are one."""

    q: Tensor
    k: Tensor
    v: Tensor
    source: Tensor | None
    bounds: Tensor | None
    window: int
    causal: bool
    scale: float
    exchange: bool
    tiling: Tiling

    @staticmethod
    def of_windows(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, window: int, causal: bool, scale: float, backward: bool
    ) -> "Call":
        q, k, v = map(with_rows, (q, k, v))
        window = min(window, q.shape[2])
        tiling = Tiling.of(q, window, backward, starts is not None)
        bounds = None if starts is None else document_bounds(starts, q.shape[2], window)
        return Call(q, k, v, None, bounds, window, causal, scale, False, tiling)

    @staticmethod
    def of_exchange(z: Tensor, source: Tensor | None, causal: bool, scale: float, backward: bool) -> "Call":
        z = with_rows(z)
        source = None if source is None else source.contiguous()
        tiling = Tiling.of(z, z.shape[2], backward, False)
        return Call(z, z, z, source, None, z.shape[2], causal, scale, True, tiling)

    @property
    def key_heads(self) -> int:
        return self.k.shape[1]

    def windows(self) -> int:
        return int(triton.cdiv(self.q.shape[2], self.window))

    def rows_of(self) -> tuple[Any, ...]:
        """The kernels' parameters from source to bounds_batch."""
        source_batch = 0 if self.source is None or self.source.dim() == 1 else self.source.stride(0)
        bounds_batch = 0 if self.bounds is None or self.bounds.shape[0] == 1 else self.bounds.stride(0)
        return self.source, source_batch, self.bounds, bounds_batch

    def sizes(self) -> tuple[int, ...]:
        """The kernels' parameters from scale_low to window."""
        return *scalar_words(self.scale, self.q.dtype), self.q.shape[2], self.q.shape[3], self.window

    def constants(self) -> dict[str, Any]:
        columns = power_of_two(self.q.shape[3], 16)
        return {
            "CAUSAL": self.causal,
            "EVEN": self.q.shape[3] == columns,
            "BLOCK": self.tiling.tile.rows,
            "D": columns,
            "num_warps": self.tiling.tile.warps,
            "num_stages": self.tiling.tile.stages,
        }

    def run(self, out: Tensor, weights: Tensor | None, summary: Tensor | None) -> None:
        """out, and with weights the summary."""
        batch, heads, _, width = self.q.shape
        _, window, parts, tiles = self.tiling
        sums = summary
        if summary is not None and parts > 1:
            sums = summary.new_empty((batch, heads, tiles, width), dtype=compute_dtype(summary.dtype))
        inputs = (*heads_of(self.q), *heads_of(self.k), *heads_of(self.v), *self.rows_of())
        counts = (window, parts, tiles, heads, heads // self.key_heads)
        constants = {**self.constants(), "EXCHANGE": self.exchange}
        grid = (tiles * heads * batch,)
        launch_fused(
            attention_kernel, grid, *heads_of(out), *inputs, weights, sums, *self.sizes(), *counts, **constants
        )
        if summary is not None and parts > 1:
            windows = summary.shape[2]
            grid = (windows * heads * batch,)
            launch_fused(
                sum_parts_kernel,
                grid,
                summary,
                sums,
                width,
                windows,
                parts,
                tiles,
                D=power_of_two(width, 16),
                num_warps=1,
            )

    def gradients(
        self,
        grad: Tensor | None,
        of_q: Tensor,
        of_k: Tensor,
        of_v: Tensor,
        weights: Tensor | None,
        of_summary: Tensor | None,
        of_weights: Tensor | None,
    ) -> Tensor | None:
        """Writes of_q, of_k and of_v, and with weights, those of the summary, of_weights. Of the exchange of_k is of
        keys and values together. Returns the mean, under each row's softmax, of the gradients of its probabilities,
        where that is made."""
        batch, heads, length, _ = self.q.shape
        _, window, parts, tiles = self.tiling
        grads: tuple[Any, ...] = (None, 0, 0, 0) if grad is None else heads_of(with_rows(grad))
        inputs: tuple[Any, ...] = (*grads, *heads_of(self.q), *heads_of(self.k), *heads_of(self.v))
        group, constants = heads // self.key_heads, self.constants()
        of_keys = {**constants, "ROWS": self.tiling.tile.queries}
        key_grid = (tiles * self.key_heads * batch,)
        if parts == 1 and self.bounds is None and not self.exchange:
            outputs = (*heads_of(of_q), *heads_of(of_k), *heads_of(of_v))
            inputs = (*inputs, weights, of_summary, of_weights, *self.sizes(), tiles, self.key_heads, group)
            launch_fused(window_gradient_kernel, key_grid, *outputs, *inputs, **of_keys)
            return None
        softmax = self.q.new_empty((3, batch, heads, length), dtype=compute_dtype(self.q.dtype)).unbind()
        inputs = (*softmax, *inputs, *self.rows_of(), weights, of_summary)
        cut = (*self.sizes(), window, parts, self.windows(), tiles)
        constants["EXCHANGE"] = of_keys["EXCHANGE"] = self.exchange
        grid, counts = (tiles * heads * batch,), (*cut, heads, group)
        launch_fused(query_gradient_kernel, grid, *heads_of(of_q), *inputs, of_weights, *counts, **constants)
        counts = (*cut, self.key_heads, group)
        launch_fused(key_gradient_kernel, key_grid, *heads_of(of_k), *heads_of(of_v), *inputs, *counts, **of_keys)
        return softmax[2]
