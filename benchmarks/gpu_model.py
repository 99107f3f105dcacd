"""Instructions a weight of the kernels that make normals, from their machine code, and what an H100 would need.

.venv/bin/python benchmarks/gpu_model.py [--target sm_90]

A model: rates as NVIDIA gives them for one H100 SXM (132 SMs at 1.755 GHz, 3.35 TB/s, of which 92 % are reached), every
instruction of the loop over weights executed once a turn (the code for rows that begin inside groups too), no latency.
What a card took is in docs/gpu.md.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

import quaver.kernels
from quaver.kernels._machine_code import Function
from quaver.kernels._resources import collect, cuda_functions, triton_function

#: Lanes of a pipe of an SM that start an instruction in a clock (CUDA C++ Programming Guide, Arithmetic Instructions).
RATES = {"issue": 128, "fma": 128, "imad": 64, "alu": 64, "special": 16, "memory": 32, "tensor": 16}
PIPES = {
    "fma": ("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"),
    "imad": ("IMAD", "UIMAD"),
    "special": ("MUFU", "I2F.", "F2F", "F2I"),
    "memory": ("LDG", "STG", "LDS", "STS", "LDSM", "ATOM", "RED", "SHFL", "LDGSTS"),
    "tensor": ("HMMA", "HGMMA"),
}
CLOCKS = 132 * 1.755e9
BYTES = 0.92 * 3.35e12
#: Kernels by the start of their name, with bytes moved a weight (weights read, and written where the op returns them).
KERNELS = {
    "perturb_kernel<bfloat16, bfloat16, Normals": 4,
    "perturb_kernel<float, float, Normals": 8,
    "few_rows_kernel<bfloat16, bfloat16, Normals": 2,
    "few_rows_input_gradient_kernel<bfloat16, bfloat16, Normals": 2,
}
TRITON = {"perturb.perturb_kernel(bf16": 4, "perturb.perturb_kernel(fp32": 8, "perturbed_linear.product_kernel(bf16": 2}
SHAPES = ((448, 448), (768, 3072), (4096, 4096))


def pipe_of(opcode: str) -> str:
    """The pipe of an opcode; what is not listed is the integer ALU's (or the branch unit's, which is no narrower)."""
    return next((pipe for pipe, starts in PIPES.items() if opcode.startswith(starts)), "alu")


def costs(function: Function) -> dict[str, float] | None:
    """Instructions a weight, in all ("issue") and by pipe; None where no normals are made."""
    loop = function.noise_loop() or function.instructions  # Triton's kernels for a tile have no loop
    weights = 2 * sum(opcode == "MUFU.RSQ" for opcode, _ in loop)  # a square root makes two normals
    if weights == 0:
        return None
    counts = Counter(pipe_of(opcode) for opcode, _ in loop)
    return {"issue": len(loop) / weights, **{pipe: counts[pipe] / weights for pipe in RATES if pipe != "issue"}}


def seconds(cost: dict[str, float], bytes_of_weight: int) -> float:
    """A weight's time on the whole card: that of the busiest pipe, or of memory."""
    return max(*(cost[pipe] / rate / CLOCKS for pipe, rate in RATES.items()), bytes_of_weight / BYTES)


def cpp_functions(target: str) -> Iterator[tuple[str, Function, int]]:
    folder = Path(quaver.kernels.__file__).parent / "_lib"
    for library in sorted(folder.glob("*quaver_cuda*.so")):
        for name, function in cuda_functions(library):
            for start, bytes_of_weight in KERNELS.items():
                if function.target == target and name.startswith(start):
                    yield f"CUDA C++: {start}>", function, bytes_of_weight


def triton_functions(target: str) -> Iterator[tuple[str, Function, int]]:
    for launch, _ in collect(("perturb", "perturbed_linear"), (target,)):
        name, function = triton_function(launch, target)
        for start, bytes_of_weight in TRITON.items():
            if name.startswith(start):
                yield f"Triton: {name}", function, bytes_of_weight


def table(rows: Iterable[tuple[str, Function, int]]) -> Iterator[str]:
    """Markdown: instructions a weight, G weights/s, microseconds for SHAPES."""
    heads = ["kernel", *RATES, "bound by", "G weights/s", *(f"{n} x {k}" for n, k in SHAPES)]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for name, function, bytes_of_weight in rows:
        cost = costs(function)
        if cost is None:
            continue
        of_weight = seconds(cost, bytes_of_weight)
        times = {pipe: cost[pipe] / rate / CLOCKS for pipe, rate in RATES.items()} | {"bytes": bytes_of_weight / BYTES}
        cells = [name, *(f"{cost[pipe]:.1f}" for pipe in RATES), max(times, key=lambda pipe: times[pipe])]
        cells += [f"{1e-9 / of_weight:.0f}", *(f"{1e6 * n * k * of_weight:.1f}" for n, k in SHAPES)]
        yield "| " + " | ".join(cells) + " |"


def main(target: Annotated[str, typer.Option(help="sm_80 or sm_90")] = "sm_90") -> None:
    """Print the table."""
    for line in table([*cpp_functions(target), *triton_functions(target)]):
        typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
