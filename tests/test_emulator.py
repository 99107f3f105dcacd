"""The emulator itself: planted faults are reported with their line, correct kernels are clean and give right values."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from emulation import ORDERS, ROOT, Array, EmulationError, Emulator, load

# Fault numbers are the enums' in tests/faults/*.cu; the second entry is the kind in the report.
MEMORY_FAULTS = {
    "read_race": "race in shared memory",
    "write_race": "race in shared memory",
    "reuse_race": "race in shared memory",
    "warp_race": "race in shared memory",
    "shared_bounds": "out of bounds",
    "global_read_bounds": "out of bounds",
    "global_write_bounds": "out of bounds",
    "misaligned": "misaligned access",
    "shared_uninitialised": "uninitialised read",
    "static_uninitialised": "uninitialised read",
    "global_uninitialised": "uninitialised read",
    "input_write": "write to an input",
    "block_race": "race between blocks",
    "global_race": "race in global memory",
    "atomic_race": "race between blocks",
    "foreign_stack": "access to another thread's local memory",
}
WAITING_FAULTS = {
    "divergent_barrier": "divergent barrier",
    "early_exit": "exit before a barrier",
    "barrier_deadlock": "deadlock",
    "shuffle_deadlock": "deadlock",
    "exited_lane": "deadlock",
    "inactive_lane": "shuffle from an inactive lane",
    "not_in_own_mask": "wrong mask",
    "masks_differ": "wrong mask",
}
# Whether a thread of the order reads before another writes decides which of the two lines is named, or which check
# comes first.
ORDER_DEPENDENT = {"reuse_race": ("forward",), "global_race": ("forward",), "global_uninitialised": ("forward",)}

memory_cases = [
    pytest.param(number, name, order, id=f"{name}-{order}")
    for number, name in enumerate(MEMORY_FAULTS, start=1)
    for order in ORDER_DEPENDENT.get(name, ORDERS)
]
waiting_cases = [
    pytest.param(number, name, order, id=f"{name}-{order}")
    for number, name in enumerate(WAITING_FAULTS, start=1)
    for order in ORDERS
]
in_all_orders = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def faults() -> Emulator:
    return load("quaver_faults")


def line_of(file: str, name: str, mark: str = "FAULT") -> str:
    for number, line in enumerate((ROOT / file).read_text().splitlines(), start=1):
        if re.search(rf"// {mark}: {name}$", line):
            return f"{file}:{number}"
    raise LookupError(f"{file} has no line marked {mark}: {name}")


def expect_report(file: str, fault: str, kind: str, function: Callable[[], object]) -> None:
    with pytest.raises(EmulationError) as caught:
        function()
    place = line_of(file, fault)
    assert any(report.startswith(f"{place}: {kind}: ") for report in caught.value.reports), f"{place}: {caught.value}"


def apart(size: int) -> Array:
    """float32 zeros, far enough from any other array that no fault reaches one."""
    return np.zeros(size + 512, np.float32)[256:-256]


def sums(emulator: Emulator, order: str, fault: int = 0, n: int = 150, threads: int = 64) -> dict[str, Array]:
    blocks = -(-n // threads)
    x, out, total, slots = apart(n), apart(n), apart(1), apart(blocks)
    x[:] = np.arange(n)
    emulator.call_checked(order, "faults_sums", "iouo", x, out, total, slots, n, threads, fault)
    return {"x": x, "out": out, "total": total, "slots": slots}


def waiting(emulator: Emulator, order: str, fault: int = 0) -> Array:
    out = np.empty(128, np.int32)
    emulator.call_checked(order, "faults_waiting", "o", out, 2, 64, fault)
    return out


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, name, order", memory_cases)
def test_memory_fault_is_reported(faults: Emulator, number: int, name: str, order: str) -> None:
    expect_report("tests/faults/memory.cu", name, MEMORY_FAULTS[name], lambda: sums(faults, order, number))


@pytest.mark.parametrize("number, name, order", waiting_cases)
def test_waiting_fault_is_reported(faults: Emulator, number: int, name: str, order: str) -> None:
    expect_report("tests/faults/waiting.cu", name, WAITING_FAULTS[name], lambda: waiting(faults, order, number))


@pytest.mark.parametrize("name", list(ORDER_DEPENDENT))
@in_all_orders
def test_order_dependent_fault_is_reported_somewhere(faults: Emulator, name: str, order: str) -> None:
    with pytest.raises(EmulationError, match=r"tests/faults/memory\.cu:\d+: (race|uninitialised)"):
        sums(faults, order, list(MEMORY_FAULTS).index(name) + 1)


def test_a_report_names_the_line_that_inlined_it(faults: Emulator) -> None:
    inner, outer = (line_of("tests/faults/memory.cu", name) for name in ("helper", "helper_call"))
    with pytest.raises(EmulationError) as caught:
        sums(faults, "forward", len(MEMORY_FAULTS) + 1)
    assert caught.value.reports[0].startswith(f"{inner}, inlined into {outer}: out of bounds: ")


def test_without_addr2line_the_module_and_offset(faults: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmulationError, match=r"libquaver_faults\.so\+0x[0-9a-f]+: out of bounds: "):
        sums(faults, "forward", list(MEMORY_FAULTS).index("global_write_bounds") + 1)


def test_an_out_of_bounds_store_does_not_happen(faults: Emulator) -> None:
    n, threads = 65, 64
    x, memory, total, slots = apart(n), apart(2 * threads), apart(1), apart(2)
    fault = list(MEMORY_FAULTS).index("global_write_bounds") + 1
    with pytest.raises(EmulationError, match="out of bounds"):
        faults.call_checked("forward", "faults_sums", "iouo", x, memory[:n], total, slots, n, threads, fault)
    assert not memory[n:].any()


@pytest.mark.parametrize(
    "grid_x, grid_y, block_x, block_z, shared_bytes, allowed",
    [
        (1, 1, 1024, 1, 227 * 1024, True),
        (0, 1, 1024, 1, 0, True),
        (1, 65535, 1, 64, 0, True),
        (1, 1, 1025, 1, 0, False),
        (1, 1, 32, 64, 0, False),
        (1, 1, 1, 65, 0, False),
        (1, 65536, 1, 1, 0, False),
        (1, 1, 0, 1, 0, False),
        (1, 1, 1, 1, 227 * 1024 + 1, False),
    ],
)
def test_launch_limits(
    faults: Emulator, grid_x: int, grid_y: int, block_x: int, block_z: int, shared_bytes: int, allowed: bool
) -> None:
    with faults.checked():
        message = faults.call("faults_launch", grid_x, grid_y, block_x, block_z, shared_bytes)
    assert (message == "") == allowed
    assert allowed or "expected at most 1024 threads in a block" in message


# ---- correct kernels -------------------------------------------------------------------------------------------------


@in_all_orders
@pytest.mark.parametrize("n, threads", [(150, 64), (1, 32), (1000, 256)])
def test_correct_sums_are_clean(faults: Emulator, order: str, n: int, threads: int) -> None:
    result = sums(faults, order, n=n, threads=threads)
    x = result["x"]
    parts = np.add.reduceat(x, np.arange(0, n, threads))
    np.testing.assert_array_equal(result["slots"], parts)
    np.testing.assert_array_equal(result["out"], np.repeat(parts, threads)[:n] - x)
    assert result["total"][0] == x.sum()


@in_all_orders
def test_correct_waiting_is_clean(faults: Emulator, order: str) -> None:
    np.testing.assert_array_equal(waiting(faults, order), 64 + (np.arange(128) % 32 ^ 1))


def test_statistics_count_since_the_run_began(faults: Emulator) -> None:
    waiting(faults, "forward")
    statistics = faults.statistics()
    assert {name: statistics[name] for name in ("launches", "blocks", "barriers", "collectives")} == {
        "launches": 1,
        "blocks": 2,
        "barriers": 2,
        "collectives": 4,
    }
    assert statistics["accesses"] == 128


# ---- torch ops (csrc/cuda/gpu_tensor.h) ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schemas() -> torch.library.Library:
    library = torch.library.Library("quaver_emulated", "FRAGMENT")
    library.define("faults_copy(Tensor x, int fault) -> Tensor")
    library.define("faults_twice_(Tensor(a!) x) -> ()")
    return library


@pytest.fixture(scope="module")
def ops(schemas: torch.library.Library) -> Emulator:  # which live as long as their library does
    return load("quaver_torch_faults")


def copy(x: torch.Tensor, fault: int = 0) -> torch.Tensor:
    result: torch.Tensor = torch.ops.quaver_emulated.faults_copy(x, fault)
    return result


@in_all_orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_on_strided_rows(ops: Emulator, order: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 200).to(dtype)[:, 30:130]
    torch.testing.assert_close(ops.run(lambda: copy(x), order), x, rtol=0, atol=0)


def test_inputs_of_one_storage_keep_their_own_bounds(ops: Emulator) -> None:
    both = torch.randn(4, 6)
    left, right = both[:, :3], both[:, 3:]
    with ops.checked():
        torch.testing.assert_close(copy(left), left)
        torch.testing.assert_close(copy(right), right)
        torch.testing.assert_close(copy(left), left)


def test_updated_tensor(ops: Emulator) -> None:
    x = torch.randn(100)
    expected = 2 * x
    ops.run(lambda: torch.ops.quaver_emulated.faults_twice_(x))
    torch.testing.assert_close(x, expected)


def test_a_region_replaces_what_it_overlaps(ops: Emulator) -> None:
    x = torch.randn(100)
    with ops.checked():
        ops.region(x.data_ptr(), x.nbytes, "what was here before", "input")
        torch.ops.quaver_emulated.faults_twice_(x)
        assert ops.reports() == []


@pytest.mark.parametrize(
    "fault, name, kind",
    [(1, "gap", "out of bounds"), (2, "input_write", "write to an input"), (3, "uninitialised", "uninitialised read")],
)
def test_op_fault_is_reported(ops: Emulator, fault: int, name: str, kind: str) -> None:
    x = torch.randn(5, 200)[:, 30:130]
    expect_report("tests/faults/torch_op.cu", name, kind, lambda: ops.run(lambda: copy(x, fault)))


def test_an_output_is_poisoned(ops: Emulator) -> None:
    out = torch.zeros(4)
    ops.region(out.data_ptr(), out.nbytes, "out", "output")
    assert out.isnan().all()


def test_the_wrong_element_size_is_refused(ops: Emulator) -> None:
    with pytest.raises(RuntimeError, match="expected elements of 4 bytes, got 8"):
        copy(torch.zeros(2, 2, dtype=torch.float64))


def test_the_kernels_of_the_package_build() -> None:
    assert load("quaver_emulated").reports() == []
