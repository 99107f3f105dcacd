"""Checks of perturbed_linear's arguments, and their one form that the ops take."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autocast import autocast
from .._seeds import Seed, check_floating
from ..perturb.arguments import noise_place, seeds_and_sigma, sigma_tensor


class Arguments(NamedTuple):
    """The op's arguments, in order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    sigma: Tensor
    bias_sigma: Tensor | None
    seed: Tensor
    member_inputs: bool
    stream: int
    domain: int
    row_offset: int
    column_offset: int
    row_length: int


def _check_same_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.device != weight.device:
        raise ValueError(f"{name}: expected a tensor on {weight.device}, as the weight is, got one on {tensor.device}")


def _check_input(x: Tensor, weight: Tensor) -> None:
    check_floating("x", x)
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [N, K], got shape {tuple(weight.shape)}")
    _check_same_device("x", x, weight)
    if x.dtype != weight.dtype and not (weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        also = ", bfloat16 or float16" if weight.dtype == torch.float32 else ""
        raise TypeError(f"x: expected {weight.dtype}{also} with a weight of {weight.dtype}, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected [.., {weight.shape[1]}] for a weight {list(weight.shape)}, got {list(x.shape)}")


def _check_bias(bias: Tensor, weight: Tensor) -> None:
    check_floating("bias", bias)
    _check_same_device("bias", bias, weight)
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias: expected {weight.dtype}, as the weight has, got {bias.dtype}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: expected [{weight.shape[0]}] for a weight {list(weight.shape)}, got {list(bias.shape)}"
        )


def _check_members(x: Tensor, members: int, shared: bool | None) -> bool:
    """Whether x has an input for each of the members."""
    if shared is not None and not isinstance(shared, bool):
        raise TypeError(f"shared_input: expected True, False or None, got {type(shared).__name__}")
    fits = x.dim() >= 2 and x.shape[0] == members
    if shared is False and not fits:
        raise ValueError(f"x: expected [{members}, .., K], an input for each member, got {list(x.shape)}")
    return fits and not shared


def checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: float | Tensor,
    bias_sigma: float | Tensor | None,
    seed: Seed,
    place: tuple[Any, ...],
    shared: bool | None,
) -> Arguments:
    """The op's arguments; place: stream, distribution, row_offset, column_offset, row_length.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    x = autocast(x)
    _check_input(x, weight)
    seeds, sigmas = seeds_and_sigma(weight, sigma, seed)
    bias_sigmas = None
    if bias is not None:
        _check_bias(bias, weight)
    if bias_sigma is not None:
        if bias is None:
            raise ValueError("bias_sigma: needs a bias, got None")
        bias_sigmas, members = sigma_tensor(bias_sigma, bias, "bias_sigma")
        if members is not None and seeds.dim() == 0:
            seeds = seeds.to(weight.device).expand(members)
        elif members is not None and members != seeds.shape[0]:
            raise ValueError(
                f"bias_sigma: expected a leading dimension of {seeds.shape[0]}, as seed has, got {members}"
            )
    member_inputs = False
    if seeds.dim():
        member_inputs = _check_members(x, seeds.shape[0], shared)
    elif shared is False:
        raise ValueError("shared_input: False needs a population of seeds, got one seed")
    stream, distribution, *offsets = place
    noise = noise_place(tuple(weight.shape), stream, distribution, *offsets)
    return Arguments(x, weight, bias, sigmas, bias_sigmas, seeds, member_inputs, *noise)
