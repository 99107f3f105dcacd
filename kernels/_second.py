"""The derivative of a backward op, from the reference: what penalties on gradients need."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._seeds import compute_dtype


def derivative_of_gradient(
    reference: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    of_grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What <of_grads, gradients of reference at `tensors` for `grads`> adds to the gradients of `tensors` and `grads`.

    Computed in float32 (float64 for float64), by differentiating the reference twice; with grad mode on, the result can
    be differentiated again.

    Args:
        reference: takes `tensors`, returns a tensor or a tuple of them, one for each of `grads`.
        tensors: the inputs; None where there is none.
        grads: the gradients of its outputs; None for those that have none.
        of_grads: one for each of `tensors`; None where nothing depends on that gradient.
    """
    again = torch.is_grad_enabled()

    def leaf(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point():
            return x
        wide = x.to(compute_dtype(x.dtype))
        if not again:
            return wide.detach().requires_grad_()
        # An op of its own between the caller's graph and the one made here: gradients are taken with respect to it.
        return wide.view_as(wide) if wide.requires_grad else wide.detach().requires_grad_()

    with torch.enable_grad():
        inputs, outer = [leaf(x) for x in tensors], [leaf(x) for x in grads]
        outputs = reference(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(out, grad) for out, grad in zip(outputs, outer, strict=True) if grad is not None]
        wanted = [(x, v) for x, v in zip(inputs, of_grads, strict=True) if x is not None and v is not None]
        if not (pairs and wanted):
            return [None] * len(tensors), [None] * len(grads)
        first = torch.autograd.grad(
            [out for out, _ in pairs],
            [x for x, _ in wanted],
            [grad.to(out.dtype) for out, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
        found = [(g, v) for g, (_, v) in zip(first, wanted, strict=True) if g is not None]
        if not found:
            return [None] * len(tensors), [None] * len(grads)
        leaves = [x for x in (*inputs, *outer) if x is not None and x.requires_grad]
        second = torch.autograd.grad(
            [g for g, _ in found],
            leaves,
            [v.to(g.dtype) for g, v in found],
            create_graph=again,
            allow_unused=True,
        )
    by_leaf = dict(zip(map(id, leaves), second, strict=True))

    def of(leaf: Tensor | None, original: Tensor | None) -> Tensor | None:
        grad = by_leaf.get(id(leaf))
        return None if grad is None or original is None else grad.to(original.dtype)

    return (
        [of(x, original) for x, original in zip(inputs, tensors, strict=True)],
        [of(x, original) for x, original in zip(outer, grads, strict=True)],
    )
