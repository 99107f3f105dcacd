"""The report of CUDA C++ kernels, on a library that nvcc builds here: numbers, names, and contraction."""

import shutil
import subprocess
from pathlib import Path

import pytest

from quaver.kernels._machine_code import contracted, makes_noise, nvidia_functions, philox_rounds
from quaver.kernels._resources import KernelReport, cuda_kernels

ROUNDED, FREE = "perturb<Rounded, 2>", "perturb<Free, 2>"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/sample.cu, built as quaver's CUDA library is."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc, as the CUDA library itself does")
    library = tmp_path_factory.mktemp("cuda") / "sample.so"
    source = Path(__file__).with_name("sample.cu")
    targets = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    subprocess.run(["nvcc", "-shared", "-Xcompiler=-fPIC", "-O3", *targets, "-o", library, source], check=True)
    return library


@pytest.fixture(scope="module")
def reports(library: Path) -> dict[tuple[str, str], KernelReport]:
    """(name, target) -> report."""
    return {(report.name, report.target): report for report in cuda_kernels(library)}


def test_every_kernel_is_reported_for_every_architecture(reports: dict[tuple[str, str], KernelReport]) -> None:
    names = {ROUNDED, FREE, "crowded", "looped"}
    assert set(reports) == {(name, target) for name in names for target in ("sm_80", "sm_90")}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_numbers(reports: dict[tuple[str, str], KernelReport], target: str) -> None:
    rounded, crowded = reports[ROUNDED, target], reports["crowded", target]
    assert (rounded.loads, rounded.vector_loads, rounded.stores, rounded.vector_stores) == (1, 1, 1, 1)
    assert (rounded.square_roots, rounded.spills, rounded.stack, rounded.shared, rounded.barriers) == (4, 0, 0, 0, 0)
    assert 10 <= rounded.registers <= 32
    assert 50 < rounded.instructions < 300
    assert crowded.spills > 0
    assert crowded.stack > 0
    assert crowded.shared == (4096 if target == "sm_80" else 4096 + 1024)  # Hopper's system takes 1 KiB
    assert crowded.barriers == 1
    assert crowded.vector_loads == 0
    assert crowded.loads >= 64
    assert crowded.shared_accesses == 2


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_contraction_is_seen_in_ptx_and_in_sass(reports: dict[tuple[str, str], KernelReport], target: str) -> None:
    assert reports[ROUNDED, target].noise
    assert reports[ROUNDED, target].contracted == ()
    assert reports[FREE, target].contracted[-1] == "19 FFMA, where the square roots are made of 11"
    # Only the PTX for sm_90 is in the library: 4 x (add, fma, fma).
    assert len(reports[FREE, target].contracted) == (13 if target == "sm_90" else 1)


def test_the_loop_that_makes_noise(library: Path) -> None:
    """The inner of two loops around it, without the loop after them."""
    for function in nvidia_functions(library):
        loop = function.noise_loop()
        if "looped" not in function.symbol:
            assert loop == []
            continue
        opcodes = [opcode for opcode, _ in loop]
        assert philox_rounds(loop) == 3
        assert sum(opcode.startswith("STG") for opcode in opcodes) == 1
        assert not any(opcode.startswith("LDG") for opcode in opcodes)
        assert opcodes[-1].startswith("BRA")
        assert len(loop) < len(function.instructions) / 2


def test_only_noise_must_not_be_contracted(reports: dict[tuple[str, str], KernelReport]) -> None:
    assert not reports["crowded", "sm_90"].noise
    assert reports["crowded", "sm_90"].contracted == ()


@pytest.mark.parametrize(
    "line",
    [
        "fma.rn.f32 %f1, %f2, %f3, %f4;",
        "@%p1 fma.rn.ftz.f32 %f1, %f2, %f3, %f4;",
        "mad.rn.f32 %f1, %f2, %f3, %f4;",
        "{ fma.rn.bf16x2 %r1, %r2, %r3, %r4; }",
        "fma.rn.f32x2 %rd1, %rd2, %rd3, %rd4;",
        "mul.f32 %f1, %f2, %f3;",
        "sub.f32 %f1, %f2, %f3;",
        "add.sat.f32 %f1, %f2, %f3;",
        "add.rn.ftz.f32 %f1, %f2, %f3;",
        "sqrt.approx.f32 %f1, %f2;",
        "sqrt.approx.ftz.f32 %f1, %f2;",
    ],
)
def test_lines_that_break_the_noise(line: str) -> None:
    assert len(contracted(f"\tmov.u32 %r1, 7;\n\t{line}\n\tret;\n")) == 1


@pytest.mark.parametrize(
    "line",
    [
        "mul.rn.f32 %f1, %f2, %f3;",
        "add.rn.f32 %f1, %f2, %f3;",
        "sqrt.rn.f32 %f1, %f2;",
        "mad.lo.s32 %r1, %r2, %r3, %r4;",
        "mul.wide.u32 %rd1, %r2, -766435501;",
        "add.s64 %rd1, %rd2, %rd3;",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f2};",
        "cvt.rn.bf16x2.f32 %r1, %f1, %f2;",
        "atom.global.add.f32 %f1, [%rd1], %f2;",
    ],
)
def test_lines_that_are_fine(line: str) -> None:
    assert contracted(f"\t{line}\n") == []


@pytest.mark.parametrize("text", ["mul.wide.u32 %rd1, %r1, -766435501;", "R2, -0x2daee0ad, RZ", "s7, 0xd2511f53"])
def test_philox_is_recognized(text: str) -> None:
    assert makes_noise("", text)
    assert not makes_noise("mul.lo.u32 %r1, %r2, 12345;")
