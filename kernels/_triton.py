"""How quaver launches Triton kernels: every launch goes through `launch`, so that one list of launches can be compiled
ahead of time exactly as a GPU would compile it, on a machine that has none."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclass(frozen=True)
class Launch:
    """One call of `launch`: the kernel, positional arguments, and keywords (constexprs and compiler options)."""

    kernel: JITFunction
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def bind(self, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
        """The specialized source and the complete compiler options that Triton's own JIT would compile for `target`.

        These are the steps of `JITFunction.run` up to the compilation, with `target` in place of the active driver's.
        Triton's binder finds the types, the multiples of 16 and the ones, so a signature is never written by hand.
        """
        if not isinstance(self.kernel, JITFunction):
            raise RuntimeError(f"{self.kernel} was made by Triton's interpreter; unset TRITON_INTERPRET to compile it")
        backend = make_backend(target)
        keywords = self.keywords | {
            "debug": self.keywords.get("debug", self.kernel.debug) or knobs.runtime.debug,
            "instrumentation_mode": knobs.compilation.instrumentation_mode,
        }
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = binder(*self.args, **keywords)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, keywords, bound, specialization, options
        )
        return ASTSource(self.kernel, signature, constants, attributes), options.__dict__


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside, in order; none of them runs."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def interpreting() -> bool:
    """Whether Triton kernels defined now run in Triton's interpreter, on CPU tensors."""
    return bool(knobs.runtime.interpret)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **keywords: Any) -> None:
    """Runs `kernel` on `grid`, on the device of its first tensor; inside `recording` only takes note of it.

    `keywords` are the kernel's constexprs and Triton's options (num_warps, num_stages, ..). enable_fp_fusion is False
    unless given: the noise is defined by single roundings, and a fused multiply-add would change its bits.
    """
    keywords.setdefault("enable_fp_fusion", False)
    launches = _recorded.get()
    if launches is not None:
        launches.append(Launch(kernel, args, keywords))
        return
    tensor = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
    if tensor is None:
        raise TypeError(f"launch of {kernel}: expected a tensor among the positional arguments, got none")
    # Triton launches on the current device and its current stream. For a CPU tensor (interpreter) this does nothing.
    with torch.cuda.device_of(tensor):
        kernel[grid](*args, **keywords)
