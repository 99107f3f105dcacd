"""What the compiler made of the CPU loops, from their object files: one instruction set each, and no fused arithmetic.

The noise is defined by single roundings, which tests of values alone would show on the machines they run on; and a
function that two instruction sets' objects both define under one name would survive the linker as one copy, perhaps the
one that an older machine cannot run.
"""

import re
import subprocess
from itertools import combinations
from pathlib import Path

import pytest

from quaver.kernels import _native

ROOT = Path(__file__).resolve().parents[1]
LEVELS = tuple(_native.build_facts()["simd_levels"])
#: Products are sums of fused multiply-adds, where the level has them; noise is never made in these objects.
PRODUCTS = {f"{name}_loops.cpp.o" for name in ("gemm", "dot", "spectral", "factor", "window", "exchange")}
#: x86's vfmadd132ps, vfnmsub231ss, vfmaddsub.. and Arm's fmadd, fnmsub, fmla, fmls.
FUSED = re.compile(r"v?fn?m(add|sub|la|ls)")
INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\t(?P<text>(?P<name>\S+).*)$", re.MULTILINE)


def _objects(level: str) -> list[Path]:
    found = sorted(ROOT.glob(f"build/cmake-*/CMakeFiles/loops_{level}.dir/**/*.o"))
    assert found, f"there is no object of level {level} under {ROOT}/build: build with pip install -e . first"
    return found


def _instructions(path: Path) -> list[re.Match[str]]:
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = list(INSTRUCTION.finditer(listing))
    assert len(found) > 100, f"objdump shows {len(found)} instructions in {path}"
    return found


def _defined_symbols(path: Path) -> dict[str, str]:
    """The symbols that other objects see, weak and comdat ones too, and their types."""
    command = ["nm", "--extern-only", "--defined-only", "--format=posix", str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: kind for name, kind, *_ in (line.split() for line in lines)}


@pytest.mark.parametrize("level", LEVELS)
def test_noise_never_fuses_a_multiplication_with_an_addition(level):
    for path in _objects(level):
        fused = [match["text"] for match in _instructions(path) if FUSED.match(match["name"])]
        if path.name in PRODUCTS:
            assert bool(fused) == (level != "base"), path.name
        else:
            assert not fused, f"{path.name} at {level}: {fused[:3]}"


@pytest.mark.parametrize("level", LEVELS)
def test_objects_use_the_registers_of_their_level_and_no_wider(level):
    """v3 has ymm registers, v4 zmm; base neither, nor any AVX instruction: their names are those that begin with v."""
    for path in _objects(level):
        instructions = _instructions(path)
        used = {register for match in instructions for register in re.findall(r"[yz]mm", match["text"])}
        assert max(used, default="none") == {"base": "none", "v3": "ymm", "v4": "zmm"}[level], path.name
        avx = [match["text"] for match in instructions if match["name"].startswith("v")]
        assert bool(avx) == (level != "base"), f"{path.name} at {level}: {avx[:3]}"


def test_no_name_is_defined_at_two_levels():
    defined = {level: {name for path in _objects(level) for name in _defined_symbols(path)} for level in LEVELS}
    assert all(defined.values())  # each has at least its table of loops
    for first, second in combinations(LEVELS, 2):
        assert not defined[first] & defined[second]


@pytest.mark.parametrize("level", LEVELS)
def test_objects_define_no_weak_symbol(level):
    """W, V and u are weak or unique: what a later file of another level could come to share."""
    for path in _objects(level):
        weak = [name for name, kind in _defined_symbols(path).items() if kind in "WVu"]
        assert not weak, f"{path.name} at {level}: {weak}"
