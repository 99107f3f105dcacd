"""The ahead-of-time report: registers, spills, shared memory, matrix instructions, wide loads and contractions of every
Triton and CUDA kernel, compiled and read on a machine without a GPU.

`python -m quaver.kernels._resources` prints it, with --json for programs.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from quaver.kernels import _machine_code as machine_code
from quaver.kernels._triton import Launch, recording

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_FOLDER = Path(__file__).parent
_NAMESPACES = re.compile(r"(quaver|gpu|\(anonymous namespace\))::")


@dataclass(frozen=True)
class KernelReport:
    """What one kernel needs on one target. Instructions are counted as they stand in the code, not as they run."""

    name: str  #: "op.kernel(element types, constexprs, options)" for Triton, "kernel<template arguments>" for CUDA C++
    target: str  #: "sm_80", "sm_90" or "gfx942"
    registers: int  #: per thread
    spills: int  #: accesses to a thread's local memory; AMD: spilled registers and accesses to scratch
    stack: int  #: bytes per thread
    shared: int  #: bytes per block; CUDA C++: static only, and with the 1 KiB that sm_90 adds when there is any
    instructions: int
    mma: int  #: matrix instructions
    loads: int  #: from global memory, with the asynchronous ones
    vector_loads: int  #: of them 128 bits wide, or made by the tensor memory accelerator
    stores: int
    vector_stores: int
    shared_accesses: int  #: 0 in an elementwise kernel: no value changes its thread
    shuffles: int
    barriers: int
    noise: bool  #: Philox is in it
    square_roots: int  #: correctly rounded ones
    contracted: tuple[str, ...]  #: what breaks the definition of the noise (empty unless `noise`): see _machine_code


def _nvidia_report(name: str, target: str, function: machine_code.Function, shared: int) -> KernelReport:
    count = function.count
    roots = function.ptx.count("sqrt.rn.f32") if function.ptx else count("MUFU.RSQ") - function.slow_square_roots()
    operands = "\n".join(rest for _, rest in function.instructions)
    noise = machine_code.makes_noise(operands, function.ptx)
    offending: list[str] = []
    if noise:
        offending = machine_code.contracted(function.ptx) + machine_code.contracted_sass(function)
    loads, stores = ("LDG.", "LDGSTS"), ("STG.",)  # LDGSTS is cp.async; LDGDEPBAR loads nothing
    bulk_loads, bulk_stores = count("UTMALDG", "UBLKCP.S.G"), count("UTMASTG", "UBLKCP.G.S")
    return KernelReport(
        name=name,
        target=target,
        registers=function.resources["REG"],
        spills=count("STL", "LDL"),
        stack=function.resources["STACK"],
        shared=shared,
        instructions=len(function.instructions),
        mma=count("HMMA", "HGMMA", "IMMA", "IGMMA", "DMMA", "QGMMA"),
        loads=count(*loads) + bulk_loads,
        vector_loads=count(*loads, containing=".128") + bulk_loads,
        stores=count(*stores) + bulk_stores,
        vector_stores=count(*stores, containing=".128") + bulk_stores,
        shared_accesses=count("LDS", "STS"),
        shuffles=count("SHFL"),
        barriers=count("BAR"),
        noise=noise,
        square_roots=roots,
        contracted=tuple(offending),
    )


def _amd_report(name: str, target: str, assembly: str, ir: str, shared: int) -> KernelReport:
    function = machine_code.amd_function(assembly, target)
    count, resources = function.count, function.resources
    noise = machine_code.makes_noise(assembly, ir)
    return KernelReport(
        name=name,
        target=target,
        registers=resources["vgpr_count"],  # with the accumulation registers
        spills=resources["vgpr_spill_count"] + resources["sgpr_spill_count"] + count("scratch_"),
        stack=resources["private_segment_fixed_size"],
        shared=shared,
        instructions=len(function.instructions),
        mma=count("v_mfma", "v_smfmac"),
        loads=count("global_load", "buffer_load"),
        vector_loads=count("global_load", "buffer_load", containing="dwordx4"),
        stores=count("global_store", "buffer_store"),
        vector_stores=count("global_store", "buffer_store", containing="dwordx4"),
        shared_accesses=count("ds_read", "ds_write", "ds_load", "ds_store"),
        shuffles=count("ds_bpermute", "ds_permute", "ds_swizzle", "v_permlane", "v_mov_b32_dpp"),
        barriers=count("s_barrier"),
        noise=noise,
        square_roots=count("v_sqrt_f32"),
        contracted=tuple(machine_code.contracted_amd(ir, function)) if noise else (),
    )


def _name(launch: Launch, source: Any) -> str:
    kernel = launch.kernel
    pointers = {kind.lstrip("*k") for kind in source.signature.values() if str(kind).startswith("*")}
    constexprs = [parameter for parameter in kernel.params if parameter.is_constexpr]
    constants = [f"{parameter.name}={source.constants[(parameter.num,)]}" for parameter in constexprs]
    options = [f"{key}={launch.keywords[key]}" for key in ("num_warps", "num_stages") if key in launch.keywords]
    op = re.sub(r"^quaver\.kernels\.|\.triton_\w+$", "", kernel.module)
    return f"{op}.{kernel.__name__}({', '.join(sorted(pointers) + constants + options)})"


@contextmanager
def _compiled(launch: Launch, target: str) -> Iterator[tuple[str, Any]]:
    """The name of a launch's kernel and what Triton makes of it, with a cache of its own: nothing is taken from the
    user's or left there. One at a time in a process."""
    source, options = launch.bind(TARGETS[target])
    name = _name(launch, source)
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        try:
            compiled = triton.compile(source, target=TARGETS[target], options=options)
        except Exception as error:
            # A new error, of one string: Triton's own don't survive the way back from a worker process.
            raise RuntimeError(f"{name} does not compile for {target}: {error}") from None
        yield name, compiled


def _nvidia_function(compiled: Any) -> machine_code.Function:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        [function] = machine_code.nvidia_functions(Path(binary.name))
    function.ptx = compiled.asm["ptx"]
    return function


def triton_function(launch: Launch, target: str) -> tuple[str, machine_code.Function]:
    """The name and the machine code of one recorded launch, for "sm_80" or "sm_90"."""
    with _compiled(launch, target) as (name, compiled):
        return name, _nvidia_function(compiled)


def compile_triton(launch: Launch, target: str) -> KernelReport:
    """Compiles one recorded launch for `target` ("sm_80", "sm_90" or "gfx942") and reads the result."""
    with _compiled(launch, target) as (name, compiled):
        code, shared = compiled.asm, compiled.metadata.shared
        if target.startswith("gfx"):
            return _amd_report(name, target, code["amdgcn"], code["llir"], shared)
        return _nvidia_report(name, target, _nvidia_function(compiled), shared)


def cuda_functions(library: Path) -> list[tuple[str, machine_code.Function]]:
    """(name, machine code) of every kernel of every architecture in the shared library that nvcc built; needs c++filt,
    as g++ does."""
    functions = machine_code.nvidia_functions(library)
    symbols = "\n".join(function.symbol for function in functions)
    names = subprocess.run(["c++filt", "-p"], input=symbols, capture_output=True, text=True, check=True).stdout
    return [(_NAMESPACES.sub("", name), function) for name, function in zip(names.splitlines(), functions, strict=True)]


def cuda_kernels(library: Path) -> list[KernelReport]:
    """The reports of `cuda_functions`."""
    texts = machine_code.ptx_of_kernels(library)
    reports = []
    for name, function in cuda_functions(library):
        function.ptx = texts.get((function.target, function.symbol), "")
        reports.append(_nvidia_report(name, function.target, function, function.resources["SHARED"]))
    return reports


def collect(ops: Iterable[str], targets: Iterable[str] = TARGETS) -> list[tuple[Launch, str]]:
    """(launch, target) for everything that the ops launch, each compilation once."""
    launches: list[Launch] = []
    for op in ops:
        module = importlib.import_module(f"quaver.kernels.{op}.triton_kernels")
        with recording() as recorded:
            module.report_launches()
        if not recorded:
            raise RuntimeError(f"quaver.kernels.{op}.triton_kernels.report_launches() launched nothing")
        launches += recorded
    work: dict[tuple[str, str, str], tuple[Launch, str]] = {}
    for launch in launches:
        for target in targets:
            source, options = launch.bind(TARGETS[target])
            work.setdefault((target, source.hash(), str(options)), (launch, target))
    return list(work.values())


_work: Sequence[tuple[Launch, str]] = ()


def _adopt(work: Sequence[tuple[Launch, str]]) -> None:
    global _work
    _work = work


def _compile(index: int) -> KernelReport:
    return compile_triton(*_work[index])


def resource_report(
    ops: Sequence[str] | None = None, library: Path | None = None, targets: Sequence[str] = tuple(TARGETS)
) -> list[KernelReport]:
    """The report of every Triton kernel of `ops` (default: all) and of every CUDA kernel in `library` (default: the
    installed one, when quaver was built with CUDA) on `targets`, sorted by name and target."""
    if ops is None:
        ops = sorted(path.parent.name for path in _FOLDER.glob("*/triton_kernels.py"))
    libraries = [library] if library else sorted((_FOLDER / "_lib").glob("*quaver_cuda*.so"))
    work = collect(ops, targets)
    # Forked: a worker inherits the kernels, which can't be sent to it (they don't pickle).
    workers = min(len(work), len(os.sched_getaffinity(0)))
    reports: list[KernelReport] = []
    if work:
        with multiprocessing.get_context("fork").Pool(workers, _adopt, (work,)) as pool:
            reports = pool.map(_compile, range(len(work)), chunksize=1)
    for path in libraries:
        reports += [report for report in cuda_kernels(path) if report.target in targets]
    return sorted(reports, key=lambda report: astuple(report)[:2])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m quaver.kernels._resources", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the reports as a JSON list")
    parser.add_argument("--library", type=Path, help="the CUDA library to read instead of the installed one")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="repeatable (default: all)")
    parser.add_argument("ops", nargs="*", help="the ops whose Triton kernels to compile (default: all)")
    chosen = parser.parse_args(arguments)
    reports = resource_report(chosen.ops or None, chosen.library, chosen.target or tuple(TARGETS))
    if chosen.json:
        sys.stdout.write(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
        return
    columns = [field.name for field in fields(KernelReport) if field.name not in ("name", "contracted")]
    for report in reports:
        numbers = ", ".join(f"{column} {getattr(report, column)}" for column in columns)
        sys.stdout.write("\n  ".join([report.name, numbers, *report.contracted]) + "\n")


if __name__ == "__main__":
    main()
