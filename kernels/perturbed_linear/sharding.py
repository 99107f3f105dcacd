"""perturbed_linear on DTensors: each shard of a weight has the noise of the whole."""

import sys
from typing import Any

import torch
from torch import Tensor

from .op import perturbed_linear


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor; imports nothing of torch.distributed."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor: every process gathers it, and so finds the same bits in what it computes from it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _bias_alone(y: Tensor, weight: Tensor, bias: Tensor, **arguments: Any) -> Tensor:
    """The perturbed bias in every row of y: the layer of an input without columns."""
    empty = y.new_empty((*y.shape[:-1], 0))
    return perturbed_linear(empty, weight[:, :0], bias, sigma=0.0, **arguments)


def sharded_linear(
    x: Tensor, weight: Any, bias: Tensor | None, sigma: Tensor, bias_sigma: Tensor | None, **noise: Any
) -> Tensor:
    """perturbed_linear of a weight that is a DTensor, sharded by rows (column-parallel) or by columns (row-parallel).

    Args:
        x: a DTensor, or a plain tensor that every process has whole.
        weight: DTensor [N, K], sharded in one of its dimensions at most.
        bias: [N], sharded as the weight's rows are, or None.
        sigma, bias_sigma: as in perturbed_linear, of the whole weight or sharded as it is.
        noise: seed, stream and distribution.

    Returns:
        A DTensor: its last dimension sharded for a weight sharded by rows, whole otherwise.

    Raises:
        ValueError: for a weight that is sharded in both dimensions, or partial.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = weight.device_mesh, weight.placements
    sharded = [placement for placement in placements if not isinstance(placement, Replicate)]
    if len(sharded) > 1 or not all(isinstance(placement, Shard) for placement in sharded):
        raise ValueError(f"weight: expected a DTensor sharded by rows or by columns, got placements {placements}")
    dimension = sharded[0].dim if sharded else None

    def along(split: Any, other: Any) -> list[Any]:
        """`split` on the mesh dimension that shards the weight, `other` on the rest."""
        return [split if isinstance(placement, Shard) else other for placement in placements]

    def placed(tensor: Tensor, to: list[Any], grad_placements: list[Any] | None = None) -> Tensor:
        """This process's part of a tensor that is to be placed so; plain tensors are whole in every process."""
        if not is_sharded(tensor):
            tensor = DTensor.from_local(tensor, mesh, whole_everywhere, run_check=False)
        return tensor.redistribute(mesh, to).to_local(grad_placements=grad_placements)  # type: ignore[attr-defined, no-any-return]

    def follow(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
        """A sigma that is cut as the weight is, where the weight is cut along one of its `dims`."""
        if dimension in dims:
            return placed(tensor, along(Shard(dimension), Replicate()))
        # Shared by all shards: its gradient is the sum of theirs.
        return placed(tensor, whole_everywhere, along(Partial(), Replicate()))

    whole_everywhere = along(Replicate(), Replicate())
    _, (row_offset, column_offset) = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    place = {"row_offset": row_offset, "column_offset": column_offset, "row_length": weight.shape[1]}
    dims = (0, 1) if sigma.shape == weight.shape else (0,) if sigma.dim() == 2 else ()
    local_sigma, local_weight = follow(sigma, dims), weight.to_local()
    if dimension == 1:
        local_x = placed(x, along(Shard(x.dim() - 1), Replicate()))
        part = perturbed_linear(local_x, local_weight, sigma=local_sigma, **place, **noise)
        y = DTensor.from_local(part, mesh, along(Partial(), Replicate()), run_check=False)
        y = y.redistribute(mesh, whole_everywhere)
        if bias is None:
            return y
        # Added once, after the sum over shards.
        local_bias_sigma = None if bias_sigma is None else placed(bias_sigma, whole_everywhere)
        local_y = y.to_local()
        perturbed = _bias_alone(
            local_y, local_weight, placed(bias, whole_everywhere), bias_sigma=local_bias_sigma, **noise
        )
        return DTensor.from_local(local_y + perturbed, mesh, whole_everywhere, run_check=False)
    local_x = placed(x, whole_everywhere, along(Partial(), Replicate()))
    local_bias_sigma = None if bias_sigma is None else follow(bias_sigma, (0,) if bias_sigma.dim() else ())
    local_bias = None if bias is None else placed(bias, along(Shard(0), Replicate()))
    part = perturbed_linear(
        local_x, local_weight, local_bias, sigma=local_sigma, bias_sigma=local_bias_sigma, **place, **noise
    )
    # The shape of the whole: shards may differ in size.
    shape = torch.Size((*part.shape[:-1], weight.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    split = along(Shard(part.dim() - 1), Replicate())
    return DTensor.from_local(part, mesh, split, run_check=False, shape=shape, stride=stride)
