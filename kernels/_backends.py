"""Which implementation an op runs on: reference, cpp, cuda or triton."""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.autograd import forward_ad

from . import _library

BACKENDS = ("reference", "cpp", "cuda", "triton")

_forced: list[str] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend; calls that it cannot do raise, with the reason.

    Args:
        name: "reference", "cpp", "cuda" or "triton".
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: expected one of {', '.join(BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


# Looked up once, here: torch.compile traces `why_not`, and no further than it can.
_TRITON_ERROR = "" if importlib.util.find_spec("triton") else "Triton is not installed"


def why_not(backend: str, device: torch.device) -> str:
    """'' when `backend` can run an op on tensors of `device`, else the reason why it cannot."""
    if backend == "cpp":
        if device.type != "cpu":
            return f"the C++ kernels run on the CPU, the tensors are on {device}"
        return "" if _library.CPU.loaded else f"the C++ library is {_library.CPU.error}"
    if backend == "cuda":
        if not _library.CUDA.loaded:
            return f"the CUDA library: {_library.CUDA.error}"
        return "" if device.type == "cuda" else f"the CUDA kernels run on a GPU, the tensors are on {device}"
    if backend == "triton":
        if _TRITON_ERROR:
            return _TRITON_ERROR
        if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return ""
        return f"the Triton kernels run on a GPU (or interpreted, TRITON_INTERPRET=1), the tensors are on {device}"
    return ""


@cache
def _warn_of_reference(reason: str) -> None:
    warnings.warn(f"quaver runs on its eager references, many times slower: {reason}", stacklevel=4)


def choose(device: torch.device, cuda_order: tuple[str, ...]) -> str:
    """The backend for a call on `device`: the forced one, or the first that can do it.

    Args:
        device: where the tensors are.
        cuda_order: the op's order on a GPU, from its tuning.py.
    """
    if _forced:
        reason = why_not(_forced[-1], device)
        if reason:
            raise RuntimeError(f"backend {_forced[-1]!r} cannot run this call: {reason}")
        return _forced[-1]
    if device.type == "cpu" and not _library.CPU.error:
        return "cpp"  # as below; its steps take 0.35 us, with cold caches 5
    reasons = []
    for backend in cuda_order if device.type == "cuda" else ("cpp",):
        reason = why_not(backend, device)
        if not reason:
            return backend
        reasons.append(reason)
    if not torch.compiler.is_compiling():
        _warn_of_reference("; ".join(reasons))
    return "reference"


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work.

    `register_autograd` supports neither: forward mode would lose the tangent without a word, vmap of grad would raise.
    The public functions take the reference there.
    """
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0
