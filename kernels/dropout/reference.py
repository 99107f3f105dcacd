"""Dropout with a mask from the noise stream, in plain PyTorch."""

import torch
from torch import Tensor

from ..philox import reference as philox


def dropout(x: Tensor, seed: Tensor, p: float, stream: int, offset: int = 0) -> Tensor:
    """x / (1 - p) where the uniform of the element exceeds p, else 0: in float32 or better, rounded once."""
    uniform = philox.fill(tuple(x.shape), seed, stream, 2, offset, x.device)
    wide = x if x.dtype == torch.float64 else x.float()
    scale = 1 / (1 - p) if p < 1 else 0.0
    return torch.where(uniform > torch.tensor(p, dtype=torch.float32), wide * scale, 0.0).to(x.dtype)
