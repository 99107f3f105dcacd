"""Where ops are defined: one schema, an op for the compiled kernels and one for Triton's.

`torch.ops.quaver.<name>` has the C++ kernel on the CPU key and the CUDA C++ kernel on the CUDA key, from the compiled
libraries; `torch.ops.quaver.<name>_triton` has the Triton kernel, from Python. Which of the two a call takes is decided
once, by its public function.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "quaver"
library = torch.library.Library(NAMESPACE, "FRAGMENT")

#: Every schema defined here, without a namespace: "perturb(Tensor weight, ..) -> Tensor".
schemas: list[str] = []


def suffix(backend: str) -> str:
    """What an op's name ends in on `backend`."""
    return "_triton" if backend == "triton" else ""


def define(schema: str, fake: Callable[..., Any], triton_kernels: str | None) -> None:
    """Define an op and its `_triton` twin with one fake.

    Args:
        schema: "name(arguments) -> results".
        fake: makes outputs of the right shape, dtype, device and strides from fake inputs.
        triton_kernels: the module that holds a function of the op's name for Triton; imported at the first call. None
            where there is none: then the op has no twin.
    """
    name, arguments = schema.split("(", 1)
    schemas.append(schema)

    for op in (name,) if triton_kernels is None else (name, f"{name}_triton"):
        library.define(f"{op}({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=library)
    if triton_kernels is None:
        return
    module = triton_kernels

    def on_triton(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    library.impl(f"{name}_triton", on_triton, "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        library.impl(f"{name}_triton", on_triton, "CPU")


def overload(name: str, backend: str) -> Any:
    """The overload that implements op `name` on `backend`."""
    return getattr(torch.ops.quaver, name + suffix(backend)).default
