"""Rows of the speed table of perturbed_linear: what a user would otherwise write, at the sizes of real layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._backends import use_backend
from .._cases import Row, values
from .._gemm import linear_of_onednn, onednn_multiplies
from ..perturb.op import perturb_, weight_scale
from .op import perturbed_linear

_INTENSITY = 0.02
_SIZES = ((96, 96), (448, 448), (768, 3072), (4096, 4096))
_BATCHES = (1, 16, 256, 2048)
#: The variants of a row.
_FORWARD = (
    "quaver",
    "quaver (sigma given)",
    "naive",
    "best eager",
    "torch.compile",
    "torch.compile (fallback_random)",
    "unperturbed (oneDNN)",
    "unperturbed (F.linear)",
    "noise alone",
)
_TRAINING = ("quaver", "naive", "torch.compile", "unperturbed (F.linear)")
_QUICK = ((1, (4096, 4096)), (16, (448, 448)), (256, (448, 448)))


def _naive(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Clone, add noise, use, restore: what is written most."""
    saved = []
    for parameter in (weight, bias):
        saved.append(parameter.clone())
        parameter.add_(torch.randn_like(parameter) * (_INTENSITY * parameter.std().item()))
    y = F.linear(x, weight, bias)
    for parameter, clone in zip((weight, bias), saved, strict=True):
        parameter.copy_(clone)
    return y


def _composed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same as a differentiable function, for torch.compile and for forward and backward."""
    noisy = weight + torch.randn_like(weight) * (_INTENSITY * weight.std())
    return F.linear(x, noisy, bias + torch.randn_like(bias) * (_INTENSITY * bias.std()))


def _ours(x: Tensor, weight: Tensor, bias: Tensor, sigma: Tensor | None = None) -> Tensor:
    if sigma is None:
        with torch.no_grad():
            sigma, bias_sigma = _INTENSITY * weight_scale(weight), _INTENSITY * weight_scale(bias)
    else:
        bias_sigma = sigma
    return perturbed_linear(x, weight, bias, sigma=sigma, bias_sigma=bias_sigma, seed=1)


class _Layers:
    """Enough layers of one shape that none of them is still in the cache, each used in turn."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        count = max(2, min(64, 2**25 // (shape[0] * shape[1])))
        base = values((min(shape[0] * shape[1], 2**16),), torch.float32, device)
        flat = base.repeat(-(-shape[0] * shape[1] // base.numel()))[: shape[0] * shape[1]]
        self.weights = [flat.to(dtype).reshape(shape).clone() for _ in range(count)]
        self.biases = [values(shape[:1], dtype, device) for _ in range(count)]
        self._next = 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        self._next = (self._next + 1) % len(self.weights)
        return self.weights[self._next], self.biases[self._next]


Call = Callable[[Tensor, Tensor, Tensor], Any]


def _forward_calls(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    noise, noise_of_bias = (torch.empty(size, dtype=dtype, device=device) for size in (shape, shape[:1]))
    sigma = torch.tensor(_INTENSITY)
    linear = linear_of_onednn if device.type == "cpu" and onednn_multiplies(dtype) else F.linear
    # Every row is a shape of its own: past eight of them torch.compile would run the function as it is.
    torch.compiler.reset()
    compiled = torch.compile(_composed, dynamic=False)

    def best(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        torch.add(weight, noise.normal_().mul_(weight.std() * _INTENSITY), out=noise)
        torch.add(bias, noise_of_bias.normal_().mul_(bias.std() * _INTENSITY), out=noise_of_bias)
        return linear(x, noise, noise_of_bias)

    def compiled_fallback(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch._inductor.config.patch(fallback_random=True):
            out: Tensor = compiled_with_fallback(x, weight, bias)
            return out

    compiled_with_fallback = torch.compile(lambda x, w, b: _composed(x, w, b), dynamic=False)
    calls: tuple[Call, ...] = (
        _ours,
        lambda x, w, b: _ours(x, w, b, sigma),
        _naive,
        best,
        compiled,
        compiled_fallback,
        linear,
        F.linear,
        lambda x, w, b: perturb_(w, 0.0, 1),
    )
    return dict(zip(_FORWARD, calls, strict=True))


def _trained(call: Call) -> Call:
    """Forward and backward, with the gradients of x, weight and bias."""

    def step(*tensors: Tensor) -> object:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            y = call(*leaves)
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return step


def _training_calls(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    torch.compiler.reset()
    calls: tuple[Call, ...] = (_ours, _composed, torch.compile(_composed, dynamic=False), F.linear)
    return {name: _trained(call) for name, call in zip(_TRAINING, calls, strict=True)}


def _check(shape: tuple[int, int], batch: int, dtype: torch.dtype) -> Callable[[torch.device], None]:
    def check(device: torch.device) -> None:
        # The reference needs 200 bytes a weight: a block of rows stands for all.
        rows = min(shape[0], max(1, 2**18 // shape[1]))
        weight = values((rows, shape[1]), dtype, device)
        bias, x = values((rows,), dtype, device, 1), values((batch, shape[1]), dtype, device, 2)
        got = perturbed_linear(x, weight, bias, sigma=0.1, bias_sigma=0.1, seed=1)
        with use_backend("reference"):
            expected = perturbed_linear(x.double(), weight.double(), bias.double(), sigma=0.1, bias_sigma=0.1, seed=1)
        roundings = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
        if (got.double() - expected).abs().max() > roundings * expected.abs().max():
            raise RuntimeError("perturbed_linear: the result differs from the reference")

    return check


def _row(batch: int, shape: tuple[int, int], dtype: torch.dtype, training: bool) -> Row:
    every = _TRAINING if training else _FORWARD
    names = tuple(name for name in every if "oneDNN" not in name or onednn_multiplies(dtype))

    def variants(device: torch.device) -> dict[str, Callable[[], object]]:
        calls = (_training_calls if training else _forward_calls)(shape, dtype, device)
        layers, x = _Layers(shape, dtype, device), values((batch, shape[1]), dtype, device)

        def use(call: Call) -> Callable[[], object]:
            return lambda: call(x, *layers())

        return {name: use(calls[name]) for name in names}

    count = shape[0] * shape[1]
    return Row(
        f"perturbed_linear{', training' if training else ''}{'' if dtype == torch.float32 else ', bf16'}",
        f"{batch} x {shape[0]} x {shape[1]}",
        names,
        variants,
        _check(shape, batch, dtype),
        dtype.itemsize * count,
        count,
        quick=not training and dtype == torch.float32 and (batch, shape) in _QUICK,
        slow=tuple(name for name in names if "compile" in name),
    )


ROWS = [
    _row(batch, shape, dtype, training)
    for training in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in _SIZES
    for batch in _BATCHES
]
