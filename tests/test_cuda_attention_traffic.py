"""What the CUDA kernels of window attention move: each input once, each output once, in whole sectors."""

from collections.abc import Iterator
from typing import Any

import emulation
import pytest
import torch
from emulation import Emulator
from test_cuda_traffic import CPU, aligned, source
from torch import Tensor

#: Of global memory, sectors moved for each that the bytes need, at most; all other lines are 1.
SECTORS = {
    # One number of each row, in the first of the four lanes that share it.
    "gradients.of_weights[": 8.0,
    "result.weights.data[": 8.0,
}
floating = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with emulation.ops("window_", "njx_") as loaded:
        yield loaded


def run(emulator: Emulator, name: str, *arguments: Any) -> Any:
    return emulator.run(lambda: getattr(torch.ops.quaver_emulated, name)(*arguments))


def heads(batch: int, heads: int, length: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return aligned((batch, length, heads, width), dtype, seed).transpose(1, 2)


def assert_no_waste(emulator: Emulator) -> None:
    for traffic in emulator.traffic():
        if traffic.space == "global":
            allowed = max([1.0, *(ratio for name, ratio in SECTORS.items() if name in source(traffic))])
            assert traffic.moves <= allowed * traffic.least, f"{traffic} of\n{source(traffic)}"


@floating
@pytest.mark.parametrize("window", (8, 16, 32))
def test_windows_of_a_tile_move_each_byte_once(emulator: Emulator, dtype: torch.dtype, window: int) -> None:
    q, k, v, grad = (heads(2, 2, 128, 32, dtype, seed) for seed in range(4))
    select = aligned((2, 2, 128), torch.float32, 5)
    place = (window, window, False, 0.2)
    with emulator.counting():
        out, summary = run(emulator, "window_attention", q, k, v, select, None, *place)
        for tensor in (q, k, v):
            assert emulator.moved(tensor) == (tensor.nbytes, 0)
        assert emulator.moved(out) == (0, out.nbytes)
        assert emulator.moved(summary) == (0, summary.nbytes)
        assert_no_waste(emulator)
    with emulator.counting():
        grads = run(emulator, "window_attention_backward", grad, None, q, k, v, select, None, *place)
        for tensor in (q, k, v, grad):
            assert emulator.moved(tensor) == (tensor.nbytes, 0)
        for tensor in grads[:3]:
            assert emulator.moved(tensor) == (0, tensor.nbytes)
        assert_no_waste(emulator)


@floating
def test_shared_keys_are_read_once_backward(emulator: Emulator, dtype: torch.dtype) -> None:
    q, grad = heads(1, 4, 64, 32, dtype, 1), heads(1, 4, 64, 32, dtype, 2)
    k, v = heads(1, 2, 64, 32, dtype, 3), heads(1, 2, 64, 32, dtype, 4)
    with emulator.counting():
        run(emulator, "window_attention_backward", grad, None, q, k, v, None, None, 16, 16, True, 0.2)
        for tensor in (q, k, v, grad):
            assert emulator.moved(tensor) == (tensor.nbytes, 0)


@floating
def test_njx_reads_and_writes_its_outputs_once_more(emulator: Emulator, dtype: torch.dtype) -> None:
    q, k, v = (heads(1, 2, 128, 32, dtype, seed) for seed in range(3))
    select, gate = aligned((1, 2, 128), torch.float32, 5), torch.ones(2, device=CPU)
    with emulator.counting():
        out, _ = run(emulator, "njx_attention", q, k, v, select, None, gate, 16, 16, True, 0.2)
        for tensor in (q, k, v):
            assert emulator.moved(tensor) == (tensor.nbytes, 0)
        assert emulator.moved(out) == (out.nbytes, 2 * out.nbytes)


@floating
@pytest.mark.parametrize("windows", (64, 128))
def test_the_exchange_reads_a_tile_of_keys_once_a_tile_of_queries(
    emulator: Emulator, dtype: torch.dtype, windows: int
) -> None:
    z = aligned((1, 2, windows, 32), dtype, 1)
    tiles = windows // (64 if dtype == torch.bfloat16 else 32)
    with emulator.counting():
        e = run(emulator, "window_exchange", z, None, False, 0.2)
        assert emulator.moved(z) == ((1 + tiles) * z.nbytes, 0)
        assert emulator.moved(e) == (0, e.nbytes)
        assert_no_waste(emulator)
