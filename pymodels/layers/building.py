"""How models of these layers are initialized, run and counted."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from quaver.kernels import seed_for


def run_block(block: Callable[..., Any], *arguments: Any, recompute: bool) -> Any:
    """block(*arguments); with `recompute` its activations are not kept for backward but made again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
    return block(*arguments)


def initialize(model: nn.Module, run_seed: int, std: Callable[[str, nn.Parameter], float | None]) -> None:
    """Fill parameters with normals, each from a generator of its own: seed_for(run seed, "<path>.init").

    Args:
        std: of a parameter, from its path and itself; None leaves it as it is.
    """
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            deviation = std(path, parameter)
            if deviation is not None:
                generator = torch.Generator().manual_seed(seed_for(run_seed, f"{path}.init") % 2**63)
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(deviation))


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """Parameters of some modules, those that are shared counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
