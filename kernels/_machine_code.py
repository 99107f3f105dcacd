"""Reads what the compilers made: registers, instructions and contractions in SASS, PTX, LLVM IR and AMD assembly.

The noise is defined by single float32 roundings, and neither an emulator nor Triton's interpreter can see that a
compiler fused a multiplication into an addition. Three checks together can:

- PTX. ptxas never fuses an operation with an explicit rounding (`mul.rn.f32`) and may fuse one without (`mul.f32`), for
  any architecture and in the driver too. So PTX is sound when it has no fma or mad and no bare add, sub or mul.
- SASS, for the architectures whose PTX is not kept. There sqrt.rn.f32 is itself made of FFMA: two beside each
  MUFU.RSQ, and three beside the one in the subroutine for tiny arguments, which first scales by 2^64. Any other
  number means a contraction (or a float division or approximate rsqrt, which a kernel of noise has no need of either).
- AMD. Fusion is decided in the code generator, so the LLVM IR must not permit it (no contract, fast or afn flag, no
  fma) and the assembly must have exactly the two v_fma_f32 that LLVM makes for each correctly rounded v_sqrt_f32.
"""

import os
import re
import subprocess
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import triton

# They come with Triton's wheel and read what nvcc made as well.
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# Philox's first multiplier as PTX, LLVM IR, SASS and AMD assembly print it, signed or unsigned.
_PHILOX = re.compile(r"-766435501|3528531795|0x0*d2511f53|-0x2daee0ad", re.IGNORECASE)
_PTX_FUNCTION = re.compile(r"^(?=(?:\.visible |\.weak |\.extern )*\.(?:entry|func)\b)", re.MULTILINE)
_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", re.MULTILINE)
_ROUNDINGS = {"rn", "rz", "rm", "rp", "rna"}
_AMD_LINE = re.compile(r"^\t((?:v|s|ds|global|buffer|flat|scratch)_\w+)", re.MULTILINE)
_AMD_FUSED = re.compile(r"v_(pk_)?(fma|fmac|fmaak|fmamk|mac|mad|fma_mix|fma_mixlo|fma_mixhi)(_f16|_f32|_f64)")
_LLVM_FUSED = re.compile(
    r"= (?:tail )?(?:f\w+|call) (?:\w+ )*(?:contract|fast|afn|reassoc) |@llvm\.(?:fma|fmuladd|amdgcn\.sqrt)\b|"
    r"@llvm\.sqrt\.f32\(.*!fpmath"
)


def philox_rounds(instructions: Iterable[tuple[str, str]]) -> int:
    """How many rounds of Philox the code has: each multiplies by the first multiplier once."""
    return sum(_PHILOX.search(operands) is not None for _, operands in instructions)


@dataclass
class Function:
    """One compiled kernel: its resources, its instructions (opcode, operands), and its PTX when there is one."""

    symbol: str
    target: str
    resources: dict[str, int] = field(default_factory=dict)
    instructions: list[tuple[str, str]] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)  # of the instructions, in NVIDIA's code
    ptx: str = ""

    def count(self, *prefixes: str, containing: str = "") -> int:
        """How many instructions start with one of `prefixes` and have `containing` in the opcode."""
        return sum(opcode.startswith(prefixes) and containing in opcode for opcode, _ in self.instructions)

    def noise_loop(self) -> list[tuple[str, str]]:
        """The instructions of the shortest loop that has all the Philox that any loop has; [] where none has any."""
        best: list[tuple[str, str]] = []
        for end, (opcode, operands) in zip(self.addresses, self.instructions, strict=True):
            target = re.search(r"\b0x([0-9a-f]+)\s*$", operands)
            if not opcode.startswith("BRA") or target is None or int(target[1], 16) >= end:
                continue
            start, stop = bisect_left(self.addresses, int(target[1], 16)), bisect_right(self.addresses, end)
            loop = self.instructions[start:stop]
            order = (-philox_rounds(loop), len(loop))
            if philox_rounds(loop) and (not best or order < (-philox_rounds(best), len(best))):
                best = loop
        return best

    def slow_square_roots(self) -> int:
        """The subroutines for the square roots of tiny arguments: each scales by 2^64 and has a MUFU.RSQ of its own."""
        if not self.count("MUFU.RSQ"):
            return 0  # a subroutine for divisions scales by 2^64 too
        return sum("1.84467440737095516160e+19" in operands for _, operands in self.instructions)


def _cuobjdump(option: str, binary: Path) -> str:
    # The same output in every locale: it is parsed.
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run([_CUOBJDUMP, option, binary], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} {binary} failed: {done.stderr.strip()}")
    return done.stdout


def nvidia_functions(binary: Path) -> list[Function]:
    """Every kernel of every architecture in a cubin, or in a shared library made by nvcc."""
    functions: dict[tuple[str, str], Function] = {}
    target = ""
    for line in _cuobjdump("-sass", binary).splitlines():
        if found := re.match(r"\s*code for (sm_\d+)", line):
            target = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            current = functions.setdefault((target, found[1]), Function(found[1], target))
        elif (found := _SASS_LINE.match(line)) and found[2] != "NOP":
            current.addresses.append(int(found[1], 16))
            current.instructions.append((found[2], found[3]))
    usage = _cuobjdump("-res-usage", binary)
    for found in re.finditer(r"arch = (sm_\d+)|Function (\S+):\s+((?:\w+(?:\[\d+\])?:\d+ ?)+)", usage):
        if found[1]:
            target = found[1]
        else:
            pairs = (pair.split(":") for pair in found[3].split())
            functions[target, found[2]].resources.update({name: int(value) for name, value in pairs})
    return list(functions.values())


def ptx_of_kernels(library: Path) -> dict[tuple[str, str], str]:
    """(target, symbol) -> PTX of each kernel in a shared library. What a kernel may call is read as part of it."""
    texts: dict[tuple[str, str], str] = {}
    modules = re.split(r"^\.version ", _cuobjdump("-ptx", library), flags=re.MULTILINE)[1:]
    for module in modules:
        target = re.findall(r"^\.target (sm_\d+)", module, re.MULTILINE)[0]
        bodies: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for body in _PTX_FUNCTION.split(module)[1:]:
            kind, symbol = re.findall(r"\.(entry|func)\b\s*(?:\([^)]*\)\s*)?(\w+)", body)[0]
            bodies[kind].append((symbol, body))
        called = "".join(body for _, body in bodies["func"])
        texts.update({(target, symbol): body + called for symbol, body in bodies["entry"]})
    return texts


def makes_noise(*texts: str) -> bool:
    """Whether Philox's multiplier is in the code: then it makes noise, and must not be contracted."""
    return any(_PHILOX.search(text) for text in texts)


def contracted(ptx: str) -> list[str]:
    """The lines of PTX that break the noise: fused, free to be fused by ptxas, approximate or flushing denormals."""
    lines = []
    for line in re.split(r"[\n;]", ptx):
        found = re.match(r"[\s{]*(?:@!?%\w+\s+)?(fma|mad|add|sub|mul|sqrt)\.([\w.]+)\s", line)
        if found is None:
            continue
        operation, modifiers = found[1], found[2].split(".")
        floating = modifiers[-1].startswith(("f16", "f32", "f64", "bf16"))
        if floating and (operation in ("fma", "mad") or "ftz" in modifiers or not _ROUNDINGS.intersection(modifiers)):
            lines.append(line.strip(" \t{"))
    return lines


def contracted_sass(function: Function) -> list[str]:
    """One line when the SASS has another number of FFMA than its square roots are made of, else none."""
    fused = function.count("FFMA", "FMAD")
    expected = 2 * function.count("MUFU.RSQ") + function.slow_square_roots()
    return [] if fused == expected else [f"{fused} FFMA, where the square roots are made of {expected}"]


def amd_function(assembly: str, target: str) -> Function:
    """The kernel in AMD assembly."""
    names = "vgpr_count|agpr_count|sgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    resources = {name: int(value) for name, value in re.findall(rf"\.({names}):\s+(\d+)", assembly)}
    return Function("", target, resources, [(opcode, "") for opcode in _AMD_LINE.findall(assembly)])


def contracted_amd(ir: str, function: Function) -> list[str]:
    """The lines of LLVM IR that permit contraction, and one more when the assembly has fused multiply-adds."""
    lines = [line.strip() for line in ir.splitlines() if _LLVM_FUSED.search(line) and not line.startswith("declare")]
    fused = sum(_AMD_FUSED.match(opcode) is not None for opcode, _ in function.instructions)
    expected = 2 * function.count("v_sqrt_f32")
    if fused != expected:
        lines.append(f"{fused} fused multiply-adds, where the square roots are made of {expected}")
    return lines
