"""Any module with noise in all its weights for one call."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from quaver.kernels import perturb, seed_for, weight_scale


def perturbed_call(module: nn.Module, *arguments: Any, intensity: float, seed: int, **keywords: Any) -> Any:
    """module(*arguments, **keywords) with every floating-point parameter w as w + intensity std(w) normal.

    The weights are not written. Gradients are those of the perturbed call; std(w) is a constant, 0 for one element. A
    parameter's noise is the stream of seed_for(seed, its path), so that it depends on nothing else in the module.

    Args:
        module: any.
        arguments, keywords: of the call.
        intensity: noise over the standard deviation of each parameter; 0 or more.
        seed: an int.

    Raises:
        ValueError: for an intensity that is negative or not finite.
    """
    if not 0 <= intensity < float("inf"):
        raise ValueError(f"intensity: expected a finite number of 0 or more, got {intensity}")
    if intensity == 0:
        return module(*arguments, **keywords)
    noisy = {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            with torch.no_grad():
                sigma = intensity * weight_scale(parameter)
            noisy[name] = perturb(parameter, sigma, seed_for(seed, name))
    return functional_call(module, noisy, arguments, keywords)
