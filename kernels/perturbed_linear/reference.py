"""A linear layer with perturbed weights in plain, differentiable PyTorch: what perturbed_linear means."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..perturb import reference


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    bias_sigma: Tensor | None,
    seed: Tensor,
    member_inputs: bool,
    stream: int,
    domain: int,
    row_offset: int,
    column_offset: int,
    row_length: int,
) -> Tensor:
    """x @ (weight + sigma * epsilon).T + bias + bias_sigma * epsilon_bias, both sums rounded once to x's dtype.

    sigma is 0-dim or [1 or P, 1 or N, 1 or K], bias_sigma 0-dim or [1 or P, 1, 1 or N], seed 0-dim or [P]. x is
    [.., K], or [P, .., K] with member_inputs.
    """
    perturbed = reference.perturb(weight, sigma, seed, stream, domain, row_offset, column_offset, row_length)
    perturbed = perturbed.to(x.dtype)
    if bias is not None and bias_sigma is not None:
        rows = row_offset + bias.shape[0]
        bias = reference.perturb(bias, bias_sigma, seed, stream, domain + 256, 0, row_offset, rows)
    if bias is not None:
        bias = bias.to(x.dtype)
    if seed.dim() == 0:
        return F.linear(x, perturbed, bias)
    members, lead = seed.shape[0], x.shape[1:-1] if member_inputs else x.shape[:-1]
    # The rows by their number: a reshape with -1 fails where there are no members or no columns.
    rows_of_member = torch.Size(lead).numel()
    rows_of_x = x.reshape(members if member_inputs else 1, rows_of_member, x.shape[-1])
    product = torch.matmul(rows_of_x, perturbed.transpose(1, 2))
    if bias is not None:
        product = product + (bias if bias.dim() == 1 else bias.unsqueeze(1))
    return product.reshape(members, *lead, weight.shape[0])
