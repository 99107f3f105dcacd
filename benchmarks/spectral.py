"""Where the two orders of spectral_linear cross, and what modulation costs a stack of layers that share a bank.

python benchmarks/spectral.py crossover [--plot FILE.png]
python benchmarks/spectral.py stack [--layers 10] [--batch 8] [--length 512]

`crossover`: milliseconds by tokens and by Delta against the number of tokens, R = 1536, and where the orders are
predicted to be equal. Backward: all gradients, each order forced, nothing kept by forward. `stack`: modulated layers
against unmodulated ones through torch's linear layer and through oneDNN, and against 1 + R / (m T). Medians of rounds
in which the calls take turns.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from quaver import spectral_linear, timing
from quaver.kernels._gemm import linear_of_onednn
from quaver.kernels.spectral_linear import schemas
from quaver.kernels.spectral_linear.orders import Sizes
from quaver.pymodels.files import write_atomically
from quaver.pymodels.layers import Modulation, SpectralBank, SpectralLinear

_FACTORS, _RANK = 128, 12
_COLUMNS = _FACTORS * _RANK
#: K, N
_WIDTHS = ((448, 448), (448, 1792))
app = typer.Typer(add_completion=False, help=__doc__)
console = Console()


class Crossing(NamedTuple):
    """Seconds of both orders at each number of tokens, and the number at which the counts are equal."""

    token: dict[int, float]
    delta: dict[int, float]
    predicted: float

    def measured(self) -> float | None:
        """The number of tokens at which the times are equal, by linear interpolation; None where they do not cross."""
        lengths = list(self.token)
        for before, after in pairwise(lengths):
            first, second = (self.token[at] - self.delta[at] for at in (before, after))
            if first <= 0 < second:
                return before + (after - before) * -first / (second - first)
        return None


def _crossing(inputs: int, outputs: int, batch: int, backward: bool) -> Crossing:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, depth: int = 1) -> Tensor:
        return torch.randn(shape, generator=generator) * depth**-0.5

    weight, bias, coefficients = normal(outputs, inputs, depth=inputs), normal(outputs), normal(batch, _FACTORS)
    down, up = normal(_FACTORS, _RANK, inputs, depth=inputs), normal(_FACTORS, outputs, _RANK, depth=_COLUMNS)
    gain = torch.ones(())
    gradient = schemas.overload("spectral_linear_backward", "cpp")
    # Of one token; backward with all gradients, nothing kept.
    sizes = Sizes.of(torch.empty(batch, 1, inputs), weight, down)
    predicted = sizes.through_delta(1, 1) / sizes.through_tokens(1, 1)
    if backward:
        predicted = (sizes.through_delta(2, 3) + sizes.through_delta(1, 1)) / sizes.through_tokens(2, 3)
    crossing = Crossing({}, {}, predicted)
    for length in sorted({int(predicted * part) // 8 * 8 for part in (0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.35, 1.6, 2)}):
        x, grad = normal(batch, length, inputs), normal(batch, length, outputs)

        def forward(order: str, x: Tensor = x) -> object:
            return spectral_linear(x, weight, bias, down, up, coefficients, gain=gain, order=order)

        def back(order: str, x: Tensor = x, grad: Tensor = grad) -> object:
            return gradient(
                *(grad, x, weight, bias, down, up, coefficients, gain, None, None, order == "delta"),
                *[True] * 7,
            )

        call = back if backward else forward
        with torch.no_grad():
            medians = timing.medians({order: partial(call, order) for order in ("token", "delta")})
        crossing.token[length], crossing.delta[length] = medians["token"], medians["delta"]
    return crossing


def _plot(crossings: dict[str, Crossing], title: str, path: Path) -> None:
    """A panel a size and pass, with the predicted crossing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, crossing) in zip(figure.subplots(2, 2).flat, crossings.items(), strict=True):
        for order, marker in (("token", "o"), ("delta", "s")):
            times = getattr(crossing, order)
            axes.plot(list(times), [seconds * 1e3 for seconds in times.values()], f"{marker}-", label=f"by {order}")
        axes.axvline(crossing.predicted, color="black", linestyle="--", label="equal counts")
        axes.set(xlabel="tokens of a sample", ylabel="ms", title=name, ylim=(0, None))
        axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


@app.command()
def crossover(
    plot_file: Annotated[Path | None, typer.Option("--plot", help="write a plot here")] = None,
    batch: int = 8,
    threads: int = 1,
) -> None:
    """Measured against predicted."""
    crossings = {}
    table = Table("pass", "predicted T*", "measured", "measured / predicted")
    with timing.pinned_threads(threads):
        for inputs, outputs in _WIDTHS:
            for backward in (False, True):
                crossing = _crossing(inputs, outputs, batch, backward)
                name = f"{inputs} -> {outputs}, {'backward' if backward else 'forward'}"
                crossings[name] = crossing
                at = crossing.measured()
                cells = ("none in range", "") if at is None else (f"{at:.0f}", f"{at / crossing.predicted:.2f}")
                table.add_row(name, f"{crossing.predicted:.0f}", *cells)
    console.print(table)
    if plot_file is not None:
        _plot(crossings, f"spectral_linear, B {batch}, R {_COLUMNS}, float32, {threads} thread(s)", plot_file)


class _LinearOfOneDNN(torch.autograd.Function):
    """F.linear with all three products by oneDNN: the best unmodulated layer on some processors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_of_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows, of_rows = grad.flatten(0, 1), x.flatten(0, 1)
        of_x, of_weight = linear_of_onednn(grad, weight.t()), linear_of_onednn(rows.t(), of_rows.t())
        return of_x, of_weight, rows.sum(0)


@app.command()
def stack(layers: int = 10, width: int = 448, batch: int = 8, length: int = 512) -> None:
    """What modulation costs layers that share a bank."""
    torch.manual_seed(0)
    bank = SpectralBank(1024, _FACTORS // 2, _RANK, width, width)
    linears = [SpectralLinear(width, width) for _ in range(layers)]
    with torch.no_grad():
        bank.up.normal_(std=_COLUMNS**-0.5)
        for layer in linears:
            layer.weight.normal_(std=width**-0.5)
    theta, x = torch.randn(batch, 1024), torch.randn(batch, length, width)
    parameters = [parameter for layer in linears for parameter in (layer.weight, layer.bias)]

    def modulated(x: Tensor) -> Tensor:
        modulation: Modulation = bank(theta)
        for layer in linears:
            x = layer(x, modulation) * 0.5
        return x

    def of_torch(x: Tensor) -> Tensor:
        for layer in linears:
            x = F.linear(x, layer.weight, layer.bias) * 0.5
        return x

    def of_onednn(x: Tensor) -> Tensor:
        for layer in linears:
            x = _LinearOfOneDNN.apply(x, layer.weight, layer.bias) * 0.5
        return x

    def training(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        modules = [*bank.parameters(), *(layer.gain for layer in linears)] if function is modulated else []
        return lambda: torch.autograd.grad(function(x).sum(), [*parameters, *modules])

    def inference(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return function(x)

        return call

    bound = 1 + _COLUMNS / (layers * length) + 0.08
    table = Table(
        *("pass", "threads", "modulated, ms", "/ F.linear", "/ oneDNN", f"goal {bound:.2f}"),
        title=f"{layers} layers of {width}, x {list(x.shape)}, R {_COLUMNS}",
    )
    for name, make in (("forward", inference), ("forward and backward", training)):
        for threads in (1, 2):
            with timing.pinned_threads(threads):
                functions = {"modulated": modulated, "torch": of_torch, "oneDNN": of_onednn}
                medians = timing.medians({key: make(function) for key, function in functions.items()})
            ratios = [medians["modulated"] / medians[key] for key in ("torch", "oneDNN")]
            cells = [f"{ratio:.2f}" for ratio in ratios]
            met = "met" if max(ratios) <= bound else "met against F.linear" if ratios[0] <= bound else "missed"
            table.add_row(name, str(threads), f"{medians['modulated'] * 1e3:.1f}", *cells, met)
    console.print(table)


if __name__ == "__main__":
    app()
