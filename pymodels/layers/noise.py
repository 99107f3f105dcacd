"""Modules with noise of a step's seed, and the keys that give it to them."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.kernels import PerturbedLinear, dropout, perturb, perturbed_linear, seed_for

#: Of the noise in biases; that in weights is stream 0 of the same seed.
_BIAS_STREAM = 1


@runtime_checkable
class Noisy(Protocol):
    """A module with noise: `key` is made by `NoiseKeys` from the run's seed and the module's path."""

    def set_noise(self, key: int, step: int, row: int) -> None:
        """The noise of a step: seed key + step, and the number in the global batch of the first row to come."""


def signed(seed: int) -> int:
    """A seed modulo 2^64 as an int64 has it."""
    return (seed + 2**63) % 2**64 - 2**63


class Dropout(nn.Module):
    """Dropout from the package's stream: row r of the global batch has the same mask however the batch is cut."""

    seed: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.row = 0
        # A buffer, not an int: a new step must compile nothing.
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64), persistent=False)

    def set_noise(self, key: int, step: int, row: int) -> None:
        """See Noisy."""
        self.seed.fill_(signed(key + step))
        self.row = row

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..], rows first; the same shape. Nothing is dropped in evaluation."""
        if not self.training or self.p == 0:
            return x
        return dropout(x, self.p, self.seed, offset=self.row * (x.numel() // x.shape[0]))


class NoisyLinear(PerturbedLinear):
    """PerturbedLinear whose seed is a step's: all rows of the global batch see the same perturbed weights.

    Where gradients are wanted the perturbed weight is made once and kept for backward, which would make its noise again
    (0.78 to 0.97 of the time on a CPU, for as much memory as the weights take); elsewhere it is never stored.
    """

    step_seed: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias, intensity=0.0)
        # A buffer, not an int: a new step must compile nothing. Not of the state: the step and the path give it.
        self.register_buffer("step_seed", torch.zeros((), dtype=torch.int64), persistent=False)

    def set_noise(self, key: int, step: int, row: int) -> None:
        """See Noisy."""
        self.step_seed.fill_(signed(key + step))

    @property
    def seed(self) -> Tensor:
        """Of the step."""
        return self.step_seed

    @seed.setter
    def seed(self, value: Any) -> None:
        if "step_seed" in self._buffers:  # not yet where PerturbedLinear's constructor sets its own
            self.step_seed.fill_(signed(int(value)))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_features] -> [.., out_features]."""
        if self._silent:
            return F.linear(x, self.weight, self.bias)
        sigma, bias_sigma = self._sigmas()
        bias = self.bias
        if bias is not None and bias_sigma is not None:
            bias = perturb(bias, bias_sigma, self.step_seed, stream=_BIAS_STREAM)  # type: ignore[assignment]
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return F.linear(x, perturb(self.weight, sigma, self.step_seed), bias)
        return perturbed_linear(x, self.weight, bias, sigma=sigma, seed=self.step_seed)


class NoiseKeys:
    """The keys of a model's noisy modules: seed_for(run seed, module path), before anything wraps the model."""

    def __init__(self, model: nn.Module, run_seed: int) -> None:
        self.modules = [
            (module, seed_for(run_seed, f"{path}.{type(module).__name__.lower()}"))
            for path, module in model.named_modules()
            if isinstance(module, Noisy)
        ]

    def set(self, step: int, row: int) -> None:
        """Give every module the noise of a step, for rows from `row` on of its global batch."""
        for module, key in self.modules:
            module.set_noise(key, step, row)
