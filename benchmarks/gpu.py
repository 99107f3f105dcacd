"""Device times of perturbed_linear on a GPU against what one would otherwise write, as a markdown table.

python benchmarks/gpu.py [--json FILE] [--match TEXT]..

Each variant is captured in a CUDA graph that goes once through enough layers that their weights come from memory, and
the graph is replayed: what Python and the launches cost is left out, for all alike (`quaver bench --device cuda` has it
in). Before it is timed, quaver's result is compared with the reference's.
"""

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

import quaver
from quaver.kernels import use_backend
from quaver.kernels._cases import values

GPU = torch.device("cuda", 0)
SHAPES = ((96, 96), (448, 448), (768, 3072), (4096, 4096))
BATCHES = (1, 16, 256, 2048)
INTENSITY = 0.02
#: Bytes of weights that a graph goes through at least: more than any L2 cache, H200's 60 MB among them.
COLD = 2**28
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Noise of torch, added out of place, without noise on the bias."""
    return F.linear(x, weight + torch.randn_like(weight) * INTENSITY, bias)


def on(backend: str, distribution: str = "normal") -> Call:
    """perturbed_linear on one backend."""

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with use_backend(backend):
            return quaver.perturbed_linear(x, weight, bias, sigma=SIGMA[0], seed=SEED[0], distribution=distribution)

    return call


# Made by main, on the device: a float or an int would be copied there at every call.
SIGMA: list[Tensor] = []
SEED: list[Tensor] = []


def noise_on(backend: str) -> Call:
    """The perturbed weight alone, written."""

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with use_backend(backend):
            return quaver.perturb(weight, SIGMA[0], SEED[0])

    return call


def trained(call: Call) -> Callable[[Tensor, Tensor, Tensor], object]:
    """Forward and backward, with the gradients of x, weight and bias."""

    def step(*tensors: Tensor) -> object:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            y = call(*leaves)
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return step


def seconds(call: Callable[[], object], calls: int) -> float:
    """Median device time of one of the `calls` calls that one `call` makes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    found = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(found)


def check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise RuntimeError where a backend's result differs from the reference's in float64."""
    with use_backend("reference"):
        exact = quaver.perturbed_linear(
            x.double(), weight.double(), bias.double(), sigma=SIGMA[0].double(), seed=SEED[0]
        )
    for backend in ("cuda", "triton"):
        error = (on(backend)(x, weight, bias).double() - exact).abs().max() / exact.abs().max()
        if error > {torch.float32: 3e-6, torch.bfloat16: 2e-2}[x.dtype]:
            raise RuntimeError(f"{backend}: an error of {error:.2g} at {tuple(x.shape)}, {tuple(weight.shape)}")


def measure(batch: int, shape: tuple[int, int], dtype: torch.dtype, training: bool) -> dict[str, float]:
    """Seconds a call of each variant."""
    count = max(2, min(64, COLD // (shape[0] * shape[1] * dtype.itemsize)))
    base = values((min(shape[0] * shape[1], 2**16),), dtype, GPU) * 0.05
    flat = base.repeat(-(-shape[0] * shape[1] // base.numel()))[: shape[0] * shape[1]]
    weights = [flat.reshape(shape).clone() for _ in range(count)]
    bias, x = values(shape[:1], dtype, GPU, 1), values((batch, shape[1]), dtype, GPU, 2)
    check(x, weights[0][:256], bias[:256])
    calls: dict[str, Call] = {"cuda": on("cuda"), "triton": on("triton"), "naive": naive, "unperturbed": F.linear}
    if not training:
        calls |= {"noise alone": noise_on("cuda"), "noise alone, triton": noise_on("triton")}
        calls |= {"cuda, signs": on("cuda", "rademacher")}
        calls |= {"triton, signs": on("triton", "rademacher")}
        if shape in ((448, 448), (4096, 4096)) and batch in (1, 256):
            torch.compiler.reset()
            calls["torch.compile"] = torch.compile(naive, dynamic=False)
    found = {}
    for name, call in calls.items():
        step = trained(call) if training else call

        def every(step: Callable[..., object] = step) -> None:
            for weight in weights:
                step(x, weight, bias)

        with torch.no_grad():
            found[name] = seconds(every, count)
    return found


def main(
    match: Annotated[list[str] | None, typer.Option(help="only rows that contain all of these")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the seconds to this file")] = None,
) -> None:
    """Print the table."""
    SIGMA.append(torch.tensor(INTENSITY, device=GPU))
    SEED.append(torch.tensor(1, device=GPU))
    rows = []
    typer.echo(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}; microseconds a call\n")
    for training in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            for shape in SHAPES:
                for batch in BATCHES:
                    kind = f"{'training' if training else 'forward'}, {str(dtype).removeprefix('torch.')}"
                    name = f"{kind}, {batch} x {shape[0]} x {shape[1]}"
                    if not all(text in name for text in match or ()):
                        continue
                    found = measure(batch, shape, dtype, training)
                    rows.append({"row": name, "seconds": found})
                    typer.echo(f"{name}: " + ", ".join(f"{key} {value * 1e6:.1f}" for key, value in found.items()))
                    if json_file is not None:
                        content = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "rows": rows}
                        partial = json_file.with_suffix(".partial")
                        partial.write_text(json.dumps(content, indent=1))
                        os.replace(partial, json_file)


if __name__ == "__main__":
    typer.run(main)
