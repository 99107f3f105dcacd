"""What the emulator counts: bytes, sectors of global memory and passes through the banks of shared memory."""

import numpy as np
import pytest
from emulation import Array, Emulator, Traffic, load
from test_emulator import line_of

FILE = "tests/faults/traffic.cu"


@pytest.fixture(scope="module")
def faults() -> Emulator:
    return load("quaver_faults")


def aligned(values: Array) -> Array:
    """A copy whose memory begins with a line of the cache, far from others'."""
    memory = np.zeros(values.nbytes + 4096, np.uint8)
    start = 2048 + -(memory.ctypes.data + 2048) % 128
    out: Array = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    out[...] = values
    return out


def counts(emulator: Emulator, name: str, space: str, touch: str) -> Traffic:
    place = line_of(FILE, name, "COUNT")
    (found,) = [t for t in emulator.traffic() if (t.place, t.space, t.touch) == (place, space, touch)]
    return found


def numbers(traffic: Traffic) -> tuple[int, int, int, int]:
    return traffic.instructions, traffic.bytes, traffic.moves, traffic.least


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("padded", [0, 1])
def test_a_column_of_unpadded_rows_takes_a_pass_a_lane(faults: Emulator, padded: int, order: str) -> None:
    x = aligned(np.arange(1024, dtype=np.float32).reshape(32, 32))
    out = aligned(np.zeros((32, 32), np.float32))
    with faults.counting():
        faults.call_checked(order, "traffic_transpose", "oi", out, x, padded)
    np.testing.assert_array_equal(out, x.T)
    assert numbers(counts(faults, "rows_in", "global", "read")) == (32, 4096, 128, 128)
    assert numbers(counts(faults, "rows_in", "shared", "write")) == (32, 4096, 32, 32)
    assert numbers(counts(faults, "columns_out", "shared", "read")) == (32, 4096, 32 if padded else 1024, 32)
    assert faults.moved(x) == (4096, 0)
    assert faults.moved(out) == (0, 4096)


@pytest.mark.parametrize("stride, sectors", [(1, 4), (2, 8), (3, 12), (8, 32), (9, 32)])
def test_sectors_of_a_stride(faults: Emulator, stride: int, sectors: int) -> None:
    x, out = aligned(np.ones(32 * stride, np.float32)), aligned(np.zeros(33, np.float32))
    with faults.counting():
        faults.call_checked("forward", "traffic_strided", "ui", out, x, stride)
    assert numbers(counts(faults, "strided", "global", "read")) == (1, 128, sectors, 4)
    assert numbers(counts(faults, "broadcast", "global", "read")) == (1, 128, 1, 1)
    assert numbers(counts(faults, "shifted", "global", "write")) == (1, 128, 5, 4)
    assert faults.moved(x) == (256, 0)
    assert faults.moved(out) == (128, 256)


@pytest.mark.parametrize("stride, passes", [(1, 4), (2, 8), (3, 4), (4, 16), (8, 32)])
def test_sixteen_bytes_a_lane(faults: Emulator, stride: int, passes: int) -> None:
    """Eight lanes share a pass at best; lanes that leave a loop early leave the others' last round alone."""
    out = aligned(np.zeros((32, 4), np.float32))
    with faults.counting():
        faults.call_checked("forward", "traffic_quads", "u", out, stride)
    assert numbers(counts(faults, "quads", "shared", "write")) == (1, 512, passes, 4)
    uneven = counts(faults, "uneven", "shared", "read")
    assert (uneven.instructions, uneven.bytes, uneven.least) == (2, 768, 8)
    assert faults.moved(out) == (0, 768)


@pytest.mark.parametrize("line, passes", [(8, 4), (16, 8), (24, 4), (64, 32)])
def test_a_matrix_is_a_pass(faults: Emulator, line: int, passes: int) -> None:
    x, out = aligned(np.zeros((32, 8), np.uint16)), aligned(np.zeros((32, 4), np.uint32))
    with faults.counting():
        faults.call_checked("forward", "traffic_matrices", "oi", out, x, line)
    assert numbers(counts(faults, "matrices", "shared", "read")) == (1, 512, passes, 4)
    assert numbers(counts(faults, "copied", "shared", "write")) == (1, 512, passes, 4)
    assert numbers(counts(faults, "copied", "global", "read")) == (1, 512, 16, 16)


def test_nothing_is_counted_unasked(faults: Emulator) -> None:
    x, out = aligned(np.ones(32, np.float32)), aligned(np.zeros(33, np.float32))
    with faults.counting():
        faults.call_checked("forward", "traffic_strided", "ui", out, x, 1)
    before = faults.traffic()
    assert faults.moved(x) == (256, 0)
    faults.call_checked("forward", "traffic_strided", "ui", out, x, 1)
    assert faults.traffic() == before != []
    assert faults.moved(x) == (256, 0)
    with faults.counting():
        pass
    assert faults.traffic() == []
    assert faults.moved(x) == (0, 0)
