"""Peak memory of a training step.

python benchmarks/memory.py perturbed [--layers 12] [--width 448] [--batch 256]
python benchmarks/memory.py spectral [--layers 10] [--width 448] [--batch 8] [--length 512]

`perturbed`: an MLP with noise in its weights against the naive forms and the unperturbed model. `spectral`: linear
layers that share a bank's factors (64 directions, rank 12) against the naive loop over them, a weight made for each
sample, and no modulation. Each model runs in a process of its own: the peak of the resident memory over its first
step, gradients included, above what was resident before it (Linux: VmHWM, which /proc/self/clear_refs resets),
quaver's workspaces with it. A step of a plain linear layer before has loaded the libraries, and the allocator
returns memory at once.
"""

import multiprocessing
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from quaver import PerturbedLinear
from quaver.pymodels.layers import Modulation, SpectralBank, SpectralLinear

_INTENSITY = 0.02
_COORDINATES, _DIRECTIONS, _RANK = 1024, 64, 12
app = typer.Typer(add_completion=False, help=__doc__)


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


PERTURBED: dict[str, Callable[[int, int], nn.Module]] = {
    "unperturbed (nn.Linear)": nn.Linear,
    "quaver (PerturbedLinear)": lambda inputs, outputs: PerturbedLinear(inputs, outputs, intensity=_INTENSITY, seed=1),
    "naive (clone, noise, restore)": CloneNoiseRestore,
    "naive (W + sigma * randn)": Composed,
}


def _unmodulated(layer: SpectralLinear, x: Tensor, modulation: Modulation) -> Tensor:
    return layer(x)


def _modulated(layer: SpectralLinear, x: Tensor, modulation: Modulation) -> Tensor:
    return layer(x, modulation)


def _loop(layer: SpectralLinear, x: Tensor, modulation: Modulation) -> Tensor:
    """A pass over the tokens for each factor."""
    out = layer(x)
    for i in range(modulation.down.shape[0]):
        projected = (x @ modulation.down[i].t()) @ modulation.up[i].t()
        out = out + layer.gain * modulation.coefficients[:, i, None, None] * projected
    return out


def _effective(layer: SpectralLinear, x: Tensor, modulation: Modulation) -> Tensor:
    """Each sample's weight, made for each layer."""
    up = modulation.coefficients[:, :, None, None] * modulation.up
    delta = up.transpose(1, 2).flatten(2) @ modulation.down.flatten(0, 1)
    return torch.baddbmm(layer.bias, x, (layer.weight + layer.gain * delta).transpose(1, 2))


#: How a layer is applied, and whether Delta is made once for all.
SPECTRAL: dict[str, tuple[Callable[[SpectralLinear, Tensor, Modulation], Tensor], bool]] = {
    "unmodulated": (_unmodulated, False),
    "quaver, Delta shared": (_modulated, True),
    "quaver, each layer for itself": (_modulated, False),
    "naive (loop over factors)": (_loop, False),
    "naive (W of each sample)": (_effective, False),
}


class SpectralStack(nn.Module):
    """Layers one after the other that share a bank."""

    def __init__(self, name: str, layers: int, width: int) -> None:
        super().__init__()
        self.apply_layer, self.by_delta = SPECTRAL[name]
        self.bank = SpectralBank(_COORDINATES, _DIRECTIONS, _RANK, width, width)
        self.layers = nn.ModuleList(SpectralLinear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width], the same shape."""
        modulation = self.bank(torch.ones(x.shape[0], _COORDINATES), by_delta=self.by_delta)
        for layer in self.layers:
            x = self.apply_layer(layer, x, modulation)
        return x


def _kibibytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1])


def _step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def _perturbed(name: str, layers: int, width: int) -> nn.Module:
    return nn.Sequential(*(module for _ in range(layers) for module in (PERTURBED[name](width, width), nn.GELU())))


def _peak(
    make: Callable[[str, int, int], nn.Module],
    name: str,
    layers: int,
    shape: tuple[int, ...],
    results: "multiprocessing.SimpleQueue[float]",
) -> None:
    torch.manual_seed(0)
    x, width = torch.randn(shape), shape[-1]
    for warm in (nn.Linear(width, width), nn.GELU()):
        _step(nn.Sequential(nn.Linear(width, width), warm), x)
    model = make(name, layers, width)
    before = _kibibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    _step(model, x)
    results.put((_kibibytes("VmHWM") - before) / 1024)


def _table(
    make: Callable[[str, int, int], nn.Module], names: Iterable[str], layers: int, shape: tuple[int, ...], repeats: int
) -> None:
    """Print the table: the least of several runs, as what else a process does only adds."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc: larger blocks are given back when they are freed
    os.environ["OMP_NUM_THREADS"] = "2"
    table = Table("model", "peak of a step, MiB", title=f"{layers} layers, inputs {list(shape)}")
    context = multiprocessing.get_context("spawn")
    for name in names:
        peaks = []
        for _ in range(repeats):
            results = context.SimpleQueue()
            process = context.Process(target=_peak, args=(make, name, layers, shape, results))
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{name}: the process ended with {process.exitcode}")
            peaks.append(results.get())
        table.add_row(name, f"{min(peaks):.1f}")
    Console().print(table)


@app.command()
def perturbed(layers: int = 12, width: int = 448, batch: int = 256, repeats: int = 3) -> None:
    """An MLP with noise in its weights."""
    _table(_perturbed, PERTURBED, layers, (batch, width), repeats)


@app.command()
def spectral(layers: int = 10, width: int = 448, batch: int = 8, length: int = 512, repeats: int = 3) -> None:
    """Layers that share a bank."""
    _table(SpectralStack, SPECTRAL, layers, (batch, length, width), repeats)


if __name__ == "__main__":
    app()
