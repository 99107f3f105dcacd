"""What the CUDA kernels move, counted by the emulator: what an op must move and no more, in whole sectors, without bank
conflicts. What costs more is listed with its reason."""

from collections.abc import Callable, Iterator
from typing import Any

import emulation
import pytest
import torch
from emulation import Emulator, Traffic
from test_cuda_perturbed_linear import _SEEDS, arguments_of, case_of, output_gradient
from torch import Tensor

from quaver.kernels._cases import values

Op = Callable[..., Any]
CPU = torch.device("cpu")
#: Of global memory, sectors moved for each that the bytes need, at most; all other lines are 1.
SECTORS = {
    # The layout of mma gives eight lanes 16 bytes of a row of the result: half a sector. The result is small beside W.
    "store_pair": 2.0,
    "store(int64_t split, int64_t members": 8.0,
    # Four columns of a lane's sums, in float64.
    "column_sums_kernel": 4.0,
    "bias_gradient_kernel": 4.0,
    # One sum of a row of a tile by each half warp, in lines of as many as there are chunks.
    "sigma.partial[": 2.0,
}
#: float64 is for gradcheck: a lane's group of four is two accesses of 16 bytes, and its tiles are laid out for float32.
FLOAT64 = 2.0


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with emulation.ops() as loaded:
        yield loaded


@pytest.fixture
def run(emulator: Emulator) -> Op:
    """run(op, *arguments): the emulated op, counted."""

    def call(name: str, *arguments: Any, **how: str) -> Any:
        return emulator.run(lambda: getattr(torch.ops.quaver_emulated, name)(*arguments), **how)

    return call


def source(traffic: Traffic) -> str:
    """The lines of source of a place and the names of the functions that they are in."""
    text = []
    for place in traffic.place.split(", inlined into "):
        file, number = place.rsplit(":", 1)
        lines = (emulation.ROOT / file).read_text().splitlines()[: int(number)]
        text.append(lines[-1])
        text.append(next(line for line in reversed(lines) if "__device__" in line or "_kernel(" in line))
    return "\n".join(text)


def assert_no_waste(emulator: Emulator, dtype: torch.dtype = torch.float32) -> None:
    for traffic in emulator.traffic():
        allowed = FLOAT64 if dtype == torch.float64 else 1.0
        if traffic.space == "global":
            allowed = max([allowed, *(ratio for name, ratio in SECTORS.items() if name in source(traffic))])
        assert traffic.moves <= allowed * traffic.least, f"{traffic} of\n{source(traffic)}"


def aligned(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normals whose memory begins with a sector."""
    memory = torch.empty(torch.Size(shape).numel() * dtype.itemsize + 32, dtype=torch.uint8)
    start = -memory.data_ptr() % 32
    out = memory[start : start + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
    return out.copy_(values(shape, dtype, CPU, seed))


floating = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


@floating
def test_philox_writes_once(emulator: Emulator, run: Op, dtype: torch.dtype) -> None:
    out = aligned((4096,), dtype)
    with emulator.counting():
        run("philox_fill_", out, torch.tensor(7), 0, 1, 0)
    assert emulator.moved(out) == (0, out.nbytes)
    assert_no_waste(emulator, dtype)


@floating
def test_dropout_reads_once_and_writes_once(emulator: Emulator, run: Op, dtype: torch.dtype) -> None:
    x = aligned((4096,), dtype)
    with emulator.counting():
        out = run("dropout", x, torch.tensor(7), 0.3, 0, 0)
    assert emulator.moved(x) == (x.nbytes, 0)
    assert emulator.moved(out) == (0, out.nbytes)
    assert_no_waste(emulator, dtype)


@floating
@pytest.mark.parametrize("members", [1, 3])
def test_perturb_reads_once_for_two_members_and_writes_each(
    emulator: Emulator, run: Op, dtype: torch.dtype, members: int
) -> None:
    weight, seed = aligned((32, 128), dtype), torch.tensor(7 if members == 1 else [7, 7, 9])
    with emulator.counting():
        out = run(
            "perturb", weight, torch.tensor(0.1, dtype=torch.promote_types(dtype, torch.float32)), seed, 0, 0, 0, 0, 128
        )
    assert emulator.moved(weight) == (-(-members // 2) * weight.nbytes, 0)
    assert emulator.moved(out) == (0, members * weight.nbytes)
    assert_no_waste(emulator, dtype)


@pytest.mark.parametrize("members", [1, 5])
@pytest.mark.parametrize("rows", [1, 16])
def test_few_rows_read_each_weight_once_for_two_members(emulator: Emulator, run: Op, rows: int, members: int) -> None:
    arguments = arguments_of(case_of("few", (rows,), (64, 512), seed=_SEEDS if members > 1 else 7), torch.bfloat16)
    pairs = -(-members // 2)
    with emulator.counting():
        out = run("perturbed_linear", *arguments)
    assert emulator.moved(arguments.weight) == (pairs * arguments.weight.nbytes, 0)
    assert emulator.moved(out) == (0, out.nbytes)
    assert_no_waste(emulator)

    grad = output_gradient(arguments)
    with emulator.counting():
        run("perturbed_linear_input_gradient", grad, arguments.weight, arguments.sigma, arguments.seed, *arguments[6:])
    assert emulator.moved(arguments.weight) == (pairs * arguments.weight.nbytes, 0)
    assert_no_waste(emulator)


@floating
def test_many_rows_write_the_perturbed_weight_once(emulator: Emulator, run: Op, dtype: torch.dtype) -> None:
    arguments = arguments_of(case_of("many", (96,), (64, 256), bias=False), dtype)
    with emulator.counting():
        run("perturbed_linear", *arguments)
    assert emulator.moved(arguments.weight) == (arguments.weight.nbytes, 0)
    # The product is cuBLAS's: what is counted is the making of W'.
    total = {touch: sum(t.bytes for t in emulator.traffic() if t.touch == touch) for touch in ("read", "write")}
    assert total == {"read": arguments.weight.nbytes, "write": arguments.weight.nbytes}
    assert_no_waste(emulator, dtype)


@pytest.mark.parametrize("sigma", [(), (64, 1), (64, 256)], ids=str)
@floating
def test_gradients_are_written_once(emulator: Emulator, run: Op, dtype: torch.dtype, sigma: tuple[int, ...]) -> None:
    arguments = arguments_of(case_of("gradients", (40,), (64, 256), sigma, (64,)), dtype)
    grad, (x, weight, bias, scale, bias_scale, seed, *place) = output_gradient(arguments), arguments
    with emulator.counting():
        tensors = (grad, x, weight, bias, scale, bias_scale, seed, *[True] * 4, *place)
        found = run("perturbed_linear_parameter_gradient", *tensors)
    for number, tensor in enumerate(found):
        assert emulator.moved(tensor) == (0, tensor.nbytes), number
    assert_no_waste(emulator, dtype)


def test_a_line_that_wastes_is_found(emulator: Emulator, run: Op) -> None:
    """Rows that begin inside groups of 16 bytes are read by the element."""
    weight = aligned((4, 131), torch.float32)
    with emulator.counting():
        run("perturb", weight, torch.tensor(0.1), torch.tensor(7), 0, 0, 0, 0, 1000)
    with pytest.raises(AssertionError, match="csrc/cuda/"):
        assert_no_waste(emulator)
