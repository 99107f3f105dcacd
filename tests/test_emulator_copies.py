"""The emulator's asynchronous copies and matrix instructions: values, and planted faults reported with their line."""

from typing import Any

import numpy as np
import pytest
import torch
from emulation import COPIES, ORDERS, Array, EmulationError, Emulator, load
from test_emulator import apart, expect_report

# Numbers are the enum's in tests/faults/copies.cu; then the marked line and the kind in the report.
FAULTS = {
    "not_awaited": ("row", "copy not awaited"),
    "group_short": ("row", "copy not awaited"),
    "open_group": ("row", "copy not awaited"),
    "own_copy": ("own_copy", "copy not awaited"),
    "overwritten": ("overwritten", "copy not awaited"),
    "no_barrier": ("row", "race in shared memory"),
    "reused": ("source", "race in shared memory"),
    "source_bounds": ("source", "out of bounds"),
    "source_tail": ("source_tail", "out of bounds"),
    "target_bounds": ("target_bounds", "out of bounds"),
    "source_misaligned": ("source", "misaligned access"),
    "half_misaligned": ("half", "misaligned access"),
    "half_bounds": ("half", "out of bounds"),
    "target_misaligned": ("target_misaligned", "misaligned access"),
    "row_misaligned": ("row", "misaligned access"),
    "row_bounds": ("row", "out of bounds"),
    "row_uninitialised": ("row_uninitialised", "uninitialised read"),
    "divergent_load": ("divergent_load", "deadlock"),
    "divergent_product": ("divergent_product", "deadlock"),
}
FILE = "tests/faults/copies.cu"
in_all_orders = pytest.mark.parametrize("order", ORDERS)
at_all_moments = pytest.mark.parametrize("copies", COPIES)


@pytest.fixture(scope="module")
def faults() -> Emulator:
    return load("quaver_faults")


def bits(values: Array) -> Array:
    """The bits of bfloat16 numbers, far from any other array and at a multiple of 16 bytes."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    memory: Array = np.zeros(values.size + 1024, np.uint16)
    start = 512 + (-(memory.ctypes.data + 1024) % 16) // 2
    out = memory[start : start + values.size].reshape(values.shape)
    out[...] = tensor.view(torch.int16).numpy().view(np.uint16)
    return out


def products(
    emulator: Emulator, order: str, copies: str, fault: int = 0, depth: int = 40, by_depth: bool = False
) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    a, b = random.integers(-9, 9, (32, depth)).astype(np.float32), random.integers(-9, 9, (8, depth)).astype(np.float32)
    c = apart(32 * 8)
    right = b.T if by_depth else b
    arguments: tuple[Any, ...] = (c, bits(a), bits(right), depth, int(by_depth), fault)
    emulator.call_checked(order, "faults_products", "oii", *arguments, copies=copies)
    return c.reshape(32, 8), a @ b.T


@in_all_orders
@at_all_moments
@pytest.mark.parametrize("by_depth", [False, True])
def test_correct_products_are_clean(faults: Emulator, order: str, copies: str, by_depth: bool) -> None:
    for depth in (8, 16, 72):
        got, expected = products(faults, order, copies, 0, depth, by_depth)
        np.testing.assert_array_equal(got, expected)


@in_all_orders
@at_all_moments
@pytest.mark.parametrize("number, name", list(enumerate(FAULTS, start=1)), ids=list(FAULTS))
def test_fault_is_reported(faults: Emulator, number: int, name: str, order: str, copies: str) -> None:
    line, kind = FAULTS[name]
    expect_report(FILE, line, kind, lambda: products(faults, order, copies, number))


def test_part_of_a_warp_has_no_matrices(faults: Emulator) -> None:
    def run() -> None:
        faults.call_checked("forward", "faults_part_of_a_warp", "o", np.zeros(40, np.float32), 40)

    expect_report(FILE, "part_of_a_warp", "wrong mask", run)


def test_late_copies_are_late_and_early_ones_early(faults: Emulator) -> None:
    """What a thread finds where it has not waited: shared memory as it was, or the copy."""
    found = {}
    for copies in ("early", "late"):
        c = apart(32 * 8)
        a = bits(np.ones((32, 16), np.float32))
        with pytest.raises(EmulationError):
            faults.call_checked(
                "forward", "faults_products", "oii", c, a, a[:8].copy(), 16, 0, 1 + list(FAULTS).index("not_awaited"),
                copies=copies,
            )  # fmt: skip
        found[copies] = c.copy()
    assert np.isnan(found["late"]).all()
    np.testing.assert_array_equal(found["early"], np.full(256, 16, np.float32))


def test_float16_product(faults: Emulator) -> None:
    """The layout of registers of the PTX ISA, lane by lane."""
    random = np.random.default_rng(1)
    a, b, c = (random.standard_normal(shape).astype(np.float16) for shape in ((16, 16), (16, 8), (16, 8)))
    in_a, in_b = np.zeros((32, 4, 2), np.float16), np.zeros((32, 2, 2), np.float16)
    in_c = np.zeros((32, 4), np.float32)

    def place(lane: int, i: int) -> tuple[int, int]:
        return lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2

    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(8):
            row, column = group + (i // 2 % 2) * 8, thread * 2 + i % 2 + i // 4 * 8
            in_a[lane, i // 2, i % 2] = a[row, column]
        for i in range(4):
            in_b[lane, i // 2, i % 2] = b[thread * 2 + i % 2 + i // 2 * 8, group]
            in_c[lane, i] = c[place(lane, i)]
    faults.call_checked("random", "values_float16_product", "uii", in_c, in_a.view(np.uint32), in_b.view(np.uint32))
    exact = a.astype(np.float64) @ b.astype(np.float64) + c.astype(np.float64)
    for lane in range(32):
        for i in range(4):
            assert in_c[lane, i] == np.float32(exact[place(lane, i)])
