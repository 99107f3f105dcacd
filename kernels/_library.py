"""Loads the compiled libraries, and says what they are or why they are not there."""

import ctypes
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
SIMD_LEVELS = ("base", "v3", "v4", "amx")


@dataclass(frozen=True)
class LoadedLibrary:
    """One compiled library: its path, and '' or why it could not be loaded."""

    path: Path
    error: str

    @property
    def loaded(self) -> bool:
        return not self.error


def _load(name: str) -> LoadedLibrary:
    path = _HERE / "_lib" / f"lib{name}.so"
    if not path.exists():
        return LoadedLibrary(path, f"not built: there is no {path}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return LoadedLibrary(path, f"does not load: {error.__cause__ or error}")
    return LoadedLibrary(path, "")


def _check_simd_variable() -> None:
    level = os.environ.get("QUAVER_SIMD")
    if level is not None and level not in SIMD_LEVELS:
        raise ValueError(f"QUAVER_SIMD={level!r}: expected one of {', '.join(SIMD_LEVELS)}")


_check_simd_variable()
CPU = _load("quaver_cpu")
# A torch without CUDA cannot load a library that needs its CUDA half.
CUDA = (
    _load("quaver_cuda")
    if torch.version.cuda
    else LoadedLibrary(_HERE / "_lib" / "libquaver_cuda.so", f"torch {torch.__version__} is built without CUDA")
)


def _exports() -> ctypes.CDLL:
    if not CPU.loaded:
        raise RuntimeError(f"the compiled CPU library is needed, and {CPU.error}")
    library = ctypes.CDLL(str(CPU.path))
    library.quaver_current_simd.restype = ctypes.c_char_p
    library.quaver_cap_simd.argtypes = [ctypes.c_char_p]
    library.quaver_cap_simd.restype = ctypes.c_bool
    library.quaver_has_bf16.restype = ctypes.c_bool
    return library


def current_simd() -> str:
    """The instruction set that the CPU kernels run with now: base, v3, v4 or amx (v4 with tiles of bf16)."""
    level: bytes = _exports().quaver_current_simd()
    return level.decode()


def has_bf16() -> bool:
    """Whether products of bfloat16 run on the processor's own instructions (AVX512-BF16), and are not widened."""
    return bool(_exports().quaver_has_bf16())


@contextmanager
def capped_simd(level: str) -> Iterator[None]:
    """Runs the CPU kernels at `level` or below, for the whole process."""
    if level not in SIMD_LEVELS:
        raise ValueError(f"level {level!r}: expected one of {', '.join(SIMD_LEVELS)}")
    before = current_simd()
    _exports().quaver_cap_simd(level.encode())
    try:
        yield
    finally:
        _exports().quaver_cap_simd(before.encode())


def build_info() -> dict[str, Any]:
    """Facts about the compiled parts; `{}` where the module that knows them was not built."""
    try:
        native = importlib.import_module("quaver.kernels._native")
    except ImportError:
        return {}
    return {**native.build_facts(), "detected_simd": native.detected_simd()}
