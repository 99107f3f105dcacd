"""What torch.autocast asks of the inputs of a matrix product."""

import torch
from torch import Tensor

#: The kinds of devices that have autocast, looked up once: torch 2.11 compiles no call of is_autocast_available.
_KINDS = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast gives the inputs of a matrix product; what is no tensor of floats as it is."""
    if not torch._C._is_any_autocast_enabled():
        return x
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    kind = x.device.type
    if kind not in _KINDS or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
