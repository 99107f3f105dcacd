"""Run by test_triton_resources.py without TRITON_INTERPRET: compiles launches that the checks must tell apart."""

import dataclasses
import json
import sys
import tempfile

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from quaver.kernels._resources import TARGETS, collect, compile_triton
from quaver.kernels._triton import Launch, launch, recording
from quaver.kernels.perturb.triton_kernels import perturb
from quaver.kernels.philox.triton_kernels import four_elements


@triton.jit
def approximate_root(out, seed: tl.uint64, BLOCK: tl.constexpr):
    block = tl.arange(0, BLOCK).to(tl.uint64)
    a, b, c, d = four_elements(block, 0, 0, (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32), 0)
    tl.store(out + tl.arange(0, BLOCK), tl.sqrt(a * a) + b + c + d)


@triton.jit
def narrow(source, out, count, one, seed, scale, BLOCK: tl.constexpr, ODD: tl.constexpr = 3):
    index = tl.arange(0, BLOCK)
    mask = index < count + one + seed
    tl.store(out + index, tl.load(source + ODD * index, mask=mask) * scale, mask=mask)


@triton.jit
def product(a, b, out, inner, N: tl.constexpr):
    row = tl.arange(0, N)
    total = tl.zeros((N, N), tl.float32)
    for start in range(0, inner, N):
        left = tl.load(a + row[:, None] * inner + (start + row)[None, :])
        right = tl.load(b + row[:, None] * inner + (start + row)[None, :])
        total = tl.dot(left, tl.trans(right), total)
    tl.store(out + row[:, None] * N + row[None, :], total)


def described(recorded: Launch, target: str) -> dict[str, object]:
    """What Triton would compile, in words."""
    source, options = recorded.bind(TARGETS[target])
    names = list(source.signature)
    attributes = {names[path[0]]: [name for name, _ in values] for path, values in source.attrs.items() if values}
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    kept = {key: options[key] for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    return {"signature": source.signature, "constants": constants, "attributes": attributes, "options": kept}


class Machine:
    """A driver for a GPU that isn't there: as much as Triton's JIT asks for before it launches."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # the key of a kernel's cache: every target has its own

    def get_current_stream(self, device: str) -> int:
        return 0


def as_triton_would(recorded: Launch, target: str) -> bool:
    """Whether Triton's own JIT, on a driver for `target`, compiles the same source with the same options."""
    source, options = recorded.bind(TARGETS[target])
    driver.set_active(Machine(TARGETS[target]))
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        compiled = recorded.kernel.run(*recorded.args, grid=(1,), warmup=True, **recorded.keywords)
    wanted = json.loads(json.dumps(options, default=vars))
    used = json.loads(json.dumps(compiled.metadata._asdict(), default=vars))
    return bool(compiled.src.hash() == source.hash()) and wanted == {key: used[key] for key in wanted}


def main() -> None:
    """Prints the JSON."""
    with recording() as plain:
        perturb(torch.empty(64, 64), torch.tensor(0.1), torch.tensor(5), 0, 0, 0, 0, 64)
    fused = [Launch(made.kernel, made.args, made.keywords | {"enable_fp_fusion": True}) for made in plain]
    values = torch.empty(65, dtype=torch.bfloat16)
    with recording() as bad:
        launch(approximate_root, (1,), torch.empty(128), 5, BLOCK=128)
    with recording() as bound:
        launch(narrow, (1,), values, torch.empty(64), 48, 1, 1 << 40, 0.5, BLOCK=64, num_warps=2)
        launch(narrow, (1,), values[1:], torch.empty(64), 49, 2, 7, 0.5, BLOCK=64, ODD=1, enable_fp_fusion=True)
    with recording() as matrix:
        factor = torch.empty(64, 128, dtype=torch.bfloat16)
        launch(product, (1,), factor, factor, torch.empty(64, 64), 128, N=64)
    report = {
        "matrix": [dataclasses.asdict(compile_triton(made, target)) for made in matrix for target in TARGETS],
        "fused": [dataclasses.asdict(compile_triton(made, target)) for made in fused for target in TARGETS],
        "approximate": [dataclasses.asdict(compile_triton(made, target)) for made in bad for target in TARGETS],
        "bound": {target: [described(made, target) for made in bound] for target in TARGETS},
        "compilations": [len(collect(["dropout"])), len(collect(["dropout", "dropout"]))],
        "driver_untouched": driver._active is None and driver._default is None,
    }
    report["as_triton_would"] = [as_triton_would(made, target) for made in [*plain, *bound] for target in TARGETS]
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
