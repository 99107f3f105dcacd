"""Builds the CUDA kernels for the emulator (csrc/emulator) and runs them on the CPU with every access checked."""

import ctypes
import fcntl
import functools
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from quaver.kernels import _ops

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "emulator"
ORDERS = ("forward", "reverse", "random")
#: When asynchronous copies happen between their start and the wait for them.
COPIES = ("early", "late", "random")
USES = ("input", "output", "updated")
STATISTICS = ("launches", "blocks", "switches", "barriers", "collectives", "accesses")

Result = TypeVar("Result")
Array = np.ndarray[Any, np.dtype[Any]]


class EmulationError(Exception):
    """What the emulator found: `reports` holds one line a fault, "file:line: kind: details"."""

    def __init__(self, reports: list[str]) -> None:
        super().__init__("\n".join(reports))
        self.reports = reports


@dataclass(frozen=True)
class Traffic:
    """What the accesses of one kind at one line of source cost.

    Attributes:
        place: "file:line", and what it was inlined into.
        space: "global" or "shared".
        touch: "read", "write" or "atomic".
        instructions: of warps.
        bytes: that their lanes asked for.
        moves: sectors of 32 bytes of global memory; passes through the 32 banks of shared memory.
        least: the fewest moves that these bytes could have taken.
    """

    place: str
    space: str
    touch: str
    instructions: int
    bytes: int
    moves: int
    least: int


class Emulator:
    """One library of kernels with its emulator."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.quaver_emulator_configure.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
        self.library.quaver_emulator_region.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_char_p,
            ctypes.c_int,
        ]
        self.library.quaver_emulator_errors.restype = ctypes.c_char_p
        self.library.quaver_emulator_moved.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
        self.library.quaver_emulator_traffic.restype = ctypes.c_char_p

    def region(self, address: int, nbytes: int, name: str, use: str) -> None:
        """Lets kernels touch global memory that no tensor of an op covers; an "output" is filled with 0xff."""
        self.library.quaver_emulator_region(address, nbytes, name.encode(), USES.index(use))

    def reports(self) -> list[str]:
        text: bytes = self.library.quaver_emulator_errors()
        return text.decode().splitlines()

    def statistics(self) -> dict[str, int]:
        """Counts since the last run began."""
        values = (ctypes.c_uint64 * len(STATISTICS))()
        self.library.quaver_emulator_statistics(values)
        return dict(zip(STATISTICS, values, strict=True))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is moved inside, for `moved` and `traffic`. It makes runs several times slower."""
        self.library.quaver_emulator_count(1)
        try:
            yield
        finally:
            self.library.quaver_emulator_count(0)

    def moved(self, tensor: torch.Tensor | Array) -> tuple[int, int]:
        """The bytes of a tensor or array that kernels have read and written, each as often as a lane asked for it."""
        address = tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.data_ptr()
        out = (ctypes.c_uint64 * 2)()
        self.library.quaver_emulator_moved(address, tensor.nbytes, out)
        return out[0], out[1]

    def traffic(self) -> list[Traffic]:
        text: bytes = self.library.quaver_emulator_traffic()
        rows = [line.split("\t") for line in text.decode().splitlines()]
        return [Traffic(*row[:3], *map(int, row[3:])) for row in rows]

    @contextmanager
    def checked(self, order: str = "forward", seed: int = 0, copies: str = "early") -> Iterator[None]:
        """Starts afresh with threads in `order` and raises EmulationError at the end when there are reports."""
        self.library.quaver_emulator_configure(ORDERS.index(order), COPIES.index(copies), seed)
        self.library.quaver_emulator_reset()
        try:
            yield
        except Exception as error:
            if reports := self.reports():
                raise EmulationError(reports) from error
            raise
        if reports := self.reports():
            raise EmulationError(reports)

    def call(self, function: str, *arguments: Array | int) -> str:
        """Calls a C function of the library, arrays as pointers; returns the message of a refused launch, or ""."""
        entry = getattr(self.library, function)
        entry.restype = ctypes.c_char_p
        message: bytes = entry(*(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments))
        return message.decode()

    def call_checked(
        self, order: str, function: str, uses: str, *arguments: Array | int, seed: int = 3, copies: str = "early"
    ) -> None:
        """`call` under `checked`; the i-th letter of `uses` is the i-th array's: i(nput), o(utput) or u(pdated)."""
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        with self.checked(order, seed, copies):
            for number, (array, use) in enumerate(zip(arrays, uses, strict=True)):
                name = next(name for name in USES if name.startswith(use))
                self.region(array.ctypes.data, array.nbytes, f"argument {number}", name)
            if message := self.call(function, *arguments):
                raise RuntimeError(message)

    def run(
        self, function: Callable[[], Result], order: str = "forward", seed: int = 0, copies: str = "early"
    ) -> Result:
        """The value of function(), run under `checked`."""
        with self.checked(order, seed, copies):
            return function()


def _tool(name: str) -> str:
    """cmake and ninja of this Python's environment, which need not be on PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"the emulator's tests need {name}: pip install cmake ninja")
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")


@functools.cache
def build(target: str) -> Path:
    """Builds a library of csrc/emulator/CMakeLists.txt, as far as it is out of date, and returns its path."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        # Processes that test at the same time build one after the other.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILD / "build.ninja").exists():
            source = str(ROOT / "csrc" / "emulator")
            paths = (f"-DPython3_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}")
            _run(_tool("cmake"), "-G", "Ninja", "-S", source, "-B", str(BUILD), *paths)
        _run(_tool("cmake"), "--build", str(BUILD), "--target", target)
    return BUILD / f"lib{target}.so"


@functools.cache
def load(target: str = "quaver_emulated") -> Emulator:
    """The emulator of a library whose ops, if it has any, are then in torch.ops.quaver_emulated."""
    path = build(target)
    torch.ops.load_library(path)
    return Emulator(path)


@contextmanager
def ops(*prefixes: str) -> Iterator[Emulator]:
    """The emulator of the CUDA library while the ops whose names begin so (all without one) are in torch.ops."""
    library = torch.library.Library("quaver_emulated", "FRAGMENT")
    for schema in _ops.schemas:
        if not prefixes or schema.startswith(prefixes):
            library.define(schema)
    yield load()
    library._destroy()
