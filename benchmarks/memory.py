"""Peak memory of a training step of a perturbed MLP, against the naive form and the unperturbed model.

python benchmarks/memory.py [--layers 12] [--width 448] [--batch 256]

Each model runs in a process of its own: the peak of the resident memory over its first step, gradients included, above
what was resident before it (Linux: VmHWM, which /proc/self/clear_refs resets), quaver's workspaces with it. A step of a
plain linear layer before has loaded the libraries, and the allocator returns memory at once.
"""

import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from quaver import PerturbedLinear

_INTENSITY = 0.02


class CloneNoiseRestore(nn.Linear):
    """The form that is written most: clone, add noise, use, restore. Its gradients are those of the clean weights."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            saved = [parameter.clone() for parameter in self.parameters()]
            for parameter in self.parameters():
                parameter.data.add_(torch.randn_like(parameter) * (_INTENSITY * parameter.std().item()))
        y = F.linear(x, self.weight, self.bias)
        with torch.no_grad():
            for parameter, clone in zip(self.parameters(), saved, strict=True):
                parameter.data.copy_(clone)
        return y


class Composed(nn.Linear):
    """The differentiable form: W + sigma * randn is made, and saved for backward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + torch.randn_like(self.weight) * (_INTENSITY * self.weight.std().detach())
        bias = self.bias + torch.randn_like(self.bias) * (_INTENSITY * self.bias.std().detach())
        return F.linear(x, weight, bias)


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "unperturbed (nn.Linear)": nn.Linear,
    "quaver (PerturbedLinear)": lambda inputs, outputs: PerturbedLinear(inputs, outputs, intensity=_INTENSITY, seed=1),
    "naive (clone, noise, restore)": CloneNoiseRestore,
    "naive (W + sigma * randn)": Composed,
}


def _kibibytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1])


def _step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def _peak(name: str, layers: int, width: int, batch: int, results: "multiprocessing.SimpleQueue[float]") -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, width)
    for warm in (nn.Linear(width, width), nn.GELU()):
        _step(nn.Sequential(nn.Linear(width, width), warm), x)
    model = nn.Sequential(*(module for _ in range(layers) for module in (LAYERS[name](width, width), nn.GELU())))
    before = _kibibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    _step(model, x)
    results.put((_kibibytes("VmHWM") - before) / 1024)


def main(layers: int = 12, width: int = 448, batch: int = 256, repeats: int = 3) -> None:
    """Print the table: the least of several runs, as what else a process does only adds."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc: larger blocks are given back when they are freed
    os.environ["OMP_NUM_THREADS"] = "2"
    table = Table("model", "peak of a step, MiB", title=f"{layers} layers of {width}, batch {batch}")
    context = multiprocessing.get_context("spawn")
    for name in LAYERS:
        peaks = []
        for _ in range(repeats):
            results = context.SimpleQueue()
            process = context.Process(target=_peak, args=(name, layers, width, batch, results))
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{name}: the process ended with {process.exitcode}")
            peaks.append(results.get())
        table.add_row(name, f"{min(peaks):.1f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
