"""Every collective, atomic function and intrinsic of the emulator gives the values that CUDA defines."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulation import ORDERS, Array, Emulator, load

in_all_orders = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def library() -> Emulator:
    return load("quaver_faults")


@in_all_orders
@pytest.mark.parametrize("width", [32, 8])
def test_collectives(library: Emulator, order: str, width: int) -> None:
    blocks, threads = 2, 64
    t = np.arange(threads)
    first = t & ~(width - 1)

    def by_warp(function: Callable[[Array], Any], values: Array, size: int = 32) -> Array:
        return np.repeat([function(group) for group in values.reshape(-1, size)], size)

    def pick(source: Array, inside: Array) -> Array:
        return np.where(inside, source, t)

    unsigned = (t - 20).astype(np.uint32)
    rows = [
        first + 5,
        first + (t + 3) % width,
        pick(t - 3, t - 3 >= first),
        pick(t + 3, t + 3 < first + width),
        t ^ 5,
        t ^ 1,
        t ^ 1,
        by_warp(lambda g: sum(1 << int(v % 32) for v in g if v % 3 == 0), t),
        t >= 32,
        by_warp(lambda g: (g < 40).all(), t),
        by_warp(np.sum, t - 20),
        by_warp(lambda g: sum(int(v) << 26 for v in g) % 2**32, t),
        by_warp(np.min, t - 20),
        by_warp(np.max, t - 40),
        by_warp(np.min, unsigned),
        by_warp(np.max, unsigned),
        by_warp(np.bitwise_and.reduce, t | 8),
        by_warp(np.bitwise_or.reduce, t),
        by_warp(np.bitwise_xor.reduce, 1 << t % 31),
        np.full(threads, 1),
        np.full(threads, 0),
        np.full(threads, 0),
        np.full(threads, 1),
        np.full(threads, 13),
        by_warp(np.sum, t, 16),
    ]
    out = np.empty((len(rows) + 1, blocks, threads), np.int32)
    library.call_checked(order, "values_collectives", "o", out, width)
    for number, row in enumerate(rows):
        expected = np.asarray(row).astype(np.int64).astype(np.uint32).view(np.int32)
        np.testing.assert_array_equal(out[number], np.stack([expected] * blocks), err_msg=f"row {number}")
    indices = (t % 16) * 100 + t // 16 * 10 + np.arange(blocks)[:, None]
    np.testing.assert_array_equal(out[-1], indices)


@in_all_orders
@pytest.mark.parametrize("kind, dtype", [(0, np.int32), (1, np.uint32), (2, np.uint64)])
def test_integer_atomics(library: Emulator, order: str, kind: int, dtype: type) -> None:
    i = np.arange(1, 65)
    cells: Array = np.array([100, 50, 3, -1, 0, 0, 5, 0]).astype(dtype)
    old: Array = np.empty(64, dtype)
    library.call_checked(order, "values_integer_atomics", "uo", cells, old, kind)
    cleared = np.bitwise_or.reduce(1 << i % 31)
    expected: Array = np.array([100 + i.sum(), 1, 64, ~cleared, cleared, np.bitwise_xor.reduce(i), 7]).astype(dtype)
    np.testing.assert_array_equal(cells[:7], expected)
    assert cells[7] in i  # the first to come
    # The sums that atomicAdd returned are the partial sums in some order of the threads.
    order_of_adds = np.argsort(old)
    np.testing.assert_array_equal(old[order_of_adds], 100 + np.cumsum(i[order_of_adds]) - i[order_of_adds])


def test_floating_atomics(library: Emulator) -> None:
    single, double = np.ones(1, np.float32), np.ones(1)
    cell, old = np.full(1, 5, np.float32), np.empty(1, np.float32)
    library.call_checked("random", "values_floating_atomics", "uuuo", single, double, cell, old)
    assert single[0] == double[0] == 1 + 3 * np.arange(64).sum() / 2
    assert (cell[0], old[0]) == (2, 5)


def test_float_intrinsics(library: Emulator) -> None:
    random = np.random.default_rng(0)
    n = 64
    a, b, c = (random.uniform(low, 3, n).astype(np.float32) for low in (0.1, -3, -3))
    one = np.float32(1)
    exact = a.astype(np.float64) * b + c  # of float32 factors: rounded once in float64, then to float32
    # The value, and the number of units in the last place by which libm may differ from numpy.
    rows: list[tuple[Array, int]] = [
        (a + b, 0),
        (a - b, 0),
        (a * b, 0),
        (a / b, 0),
        (one / a, 0),
        (np.sqrt(a), 0),
        (exact.astype(np.float32), 0),
        (a * b + c, 0),
        (one / np.sqrt(a), 0),
        (np.exp(b), 4),
        (np.log(a), 4),
        (np.log2(a), 4),
        (np.sin(a), 4),
        (np.cos(a), 4),
        (np.power(a, np.float32(1.5)), 4),
        (a / b, 0),
        (np.clip(b, 0, 1), 0),
        (np.maximum(a, b), 0),
        (np.minimum(a, b), 0),
        (np.maximum(a, b), 0),
        (np.sin(a), 4),
        (np.cos(a), 4),
        (np.rint(10 * b), 0),
        (np.trunc(10 * b), 0),
        (np.arange(n, dtype=np.float32), 0),
    ]
    out = np.empty((len(rows) + 1, n), np.float32)
    library.call_checked("forward", "values_float_intrinsics", "oiii", out, a, b, c, n)
    for number, (expected, ulps) in enumerate(rows):
        np.testing.assert_array_max_ulp(out[number], expected.astype(np.float32), maxulp=ulps)
    assert np.abs(out[-1]).max() < 1e-15  # __fma_rn differs from two roundings by a unit of float64


def test_integer_intrinsics(library: Emulator) -> None:
    n = 64
    a, b = np.random.default_rng(0).integers(0, 2**32, (2, n), dtype=np.uint64)
    a[0] = 0
    a >>= np.arange(n, dtype=np.uint64) % 30

    def signed(x: int) -> int:
        return x - 2**32 if x >= 2**31 else x

    def trailing(x: int) -> int:
        return (x & -x).bit_length()

    def permuted(x: int, y: int) -> int:
        picked = (x | y << 32).to_bytes(8, "little")
        return int.from_bytes([picked[5], picked[1], picked[7], picked[3]], "little")

    functions: list[Callable[[int, int], int]] = [
        lambda x, y: x * y >> 32,
        lambda x, y: signed(x) * signed(y) >> 32,
        lambda x, y: (x << 32 | y) ** 2 >> 96,
        lambda x, y: x.bit_count(),
        lambda x, y: x.bit_count() + y.bit_count(),
        lambda x, y: 32 - x.bit_length(),
        lambda x, y: 64 - (x << 32 | y).bit_length(),
        lambda x, y: trailing(x),
        lambda x, y: trailing(x << 32 | y),
        lambda x, y: int(f"{x:032b}"[::-1], 2),
        permuted,
        lambda x, y: (y << 32 | x) << 9 >> 32,
        lambda x, y: (y << 32 | x) >> 9,
        lambda x, y: x,
        lambda x, y: x,
        lambda x, y: y,
    ]
    out = np.empty((len(functions), n), np.uint32)
    left, right = a.astype(np.uint32), b.astype(np.uint32)
    library.call_checked("forward", "values_integer_intrinsics", "oii", out, left, right, n)
    for number, function in enumerate(functions):
        expected = [function(int(x), int(y)) % 2**32 for x, y in zip(a, b, strict=True)]
        np.testing.assert_array_equal(out[number], expected, err_msg=f"row {number}")


def test_a_random_order_repeats_with_its_seed(library: Emulator) -> None:
    def old_values(seed: int) -> list[int]:
        cells, old = np.zeros(8, np.int32), np.empty(64, np.int32)
        library.call_checked("random", "values_integer_atomics", "uo", cells, old, 0, seed=seed)
        return [int(value) for value in old]

    assert old_values(1) == old_values(1) != old_values(2)
