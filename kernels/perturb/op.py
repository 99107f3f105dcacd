"""Weights plus noise that is made in the kernel and never stored, and the gradients of that."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .._autograd import differentiable
from .._backends import choose, transformed
from .._seeds import FLOATING, Seed, check_floating, compute_dtype
from . import reference
from .arguments import noise_place, seeds_and_sigma
from .tuning import cuda_order

_PLACE = "int stream, int domain, SymInt row_offset, SymInt column_offset, SymInt row_length"
_TRITON = "quaver.kernels.perturb.triton_kernels"


def _contiguous(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


_ops.define(
    f"perturb(Tensor weight, Tensor sigma, Tensor seed, {_PLACE}) -> Tensor",
    lambda weight, sigma, seed, *place: _contiguous(weight, (*seed.shape, *weight.shape)),
    _TRITON,
)
_ops.define(f"perturb_(Tensor(a!) weight, Tensor sigma, Tensor seed, {_PLACE}) -> ()", lambda *_: None, _TRITON)
# grad has the shape of perturb's result; the result has sigma's.
_ops.define(
    f"perturb_sigma_gradient(Tensor grad, Tensor sigma, Tensor seed, {_PLACE}) -> Tensor",
    lambda grad, sigma, seed, *place: _contiguous(sigma, sigma.shape),
    _TRITON,
)
_ops.define("perturb_weight_gradient(Tensor grad) -> Tensor", lambda grad: _contiguous(grad, grad.shape[1:]), _TRITON)
_ops.define(
    f"perturbation_gradient(Tensor coefficients, Tensor seeds, SymInt[] shape, {_PLACE}) -> Tensor",
    lambda coefficients, seeds, shape, *place: _contiguous(coefficients, shape),
    _TRITON,
)
_ops.define(
    "weight_scale(Tensor weight) -> Tensor",
    lambda weight: _contiguous(weight, (), compute_dtype(weight.dtype)),
    _TRITON,
)
_ops.define(
    "weight_scale_gradient(Tensor grad, Tensor weight, Tensor scale) -> Tensor",
    lambda grad, weight, scale: _contiguous(weight, weight.shape),
    _TRITON,
)


class _Family:
    """The differentiable ops of one backend. perturb is linear in (weight, sigma): its derivatives are each other's."""

    def __init__(self, backend: str) -> None:
        def make(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Tensor]:
            return differentiable(_ops.overload(name, backend), save, backward)

        self.perturb = make("perturb", self._save_perturb, self._perturb_backward)
        self.sigma_gradient = make("perturb_sigma_gradient", self._save_sigma_gradient, self._sigma_gradient_backward)
        self.weight_gradient = make("perturb_weight_gradient", self._save_members, self._weight_gradient_backward)
        self.perturbation_gradient = make(
            "perturbation_gradient", self._save_coefficients, self._perturbation_gradient_backward
        )
        self.weight_scale = make("weight_scale", self._save_scale, self._weight_scale_backward)
        self.weight_scale_gradient = make(
            "weight_scale_gradient", self._save_scale_gradient, self._weight_scale_gradient_backward
        )

    @staticmethod
    def _save_perturb(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, sigma, seed, *ctx.place = inputs
        ctx.save_for_backward(sigma, seed)

    def _perturb_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sigma, seed = ctx.saved_tensors
        need_weight, need_sigma = ctx.needs_input_grad[:2]
        grad_weight = (self.weight_gradient(grad) if seed.dim() else grad) if need_weight else None
        grad_sigma = self.sigma_gradient(grad, sigma, seed, *ctx.place) if need_sigma else None
        return grad_weight, grad_sigma, None, *[None] * 5

    @staticmethod
    def _save_sigma_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, _, seed, *ctx.place = inputs
        ctx.weight_shape, ctx.weight_dtype = grad.shape[seed.dim() :], grad.dtype
        ctx.save_for_backward(seed)

    def _sigma_gradient_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (seed,) = ctx.saved_tensors
        zero = torch.zeros(ctx.weight_shape, dtype=ctx.weight_dtype, device=grad.device)
        return self.perturb(zero, grad, seed, *ctx.place), None, None, *[None] * 5

    @staticmethod
    def _save_members(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.members = inputs[0].shape[0]

    @staticmethod
    def _weight_gradient_backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.expand(ctx.members, *grad.shape)

    @staticmethod
    def _save_coefficients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        coefficients, seeds, _, *ctx.place = inputs
        ctx.save_for_backward(coefficients, seeds)

    def _perturbation_gradient_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        coefficients, seeds = ctx.saved_tensors
        # <grad, epsilon_p> is the gradient of a sigma of one value a member, every member with the same grad.
        sigma = coefficients.reshape(-1, 1, 1)
        shared = grad.expand(seeds.shape[0], *grad.shape)
        return self.sigma_gradient(shared, sigma, seeds, *ctx.place).reshape(-1), None, None, *[None] * 5

    @staticmethod
    def _save_scale(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)

    def _weight_scale_backward(self, ctx: Any, grad: Tensor) -> Tensor:
        weight, scale = ctx.saved_tensors
        return self.weight_scale_gradient(grad, weight, scale)

    @staticmethod
    def _save_scale_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def _weight_scale_gradient_backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, weight, scale = ctx.saved_tensors
        # The reference formula g (w - mean) / ((n - 1) s), differentiated in g, w and s.
        wide = v.to(scale.dtype)
        per_grad = (wide * reference.weight_scale_gradient(torch.ones_like(grad), weight, scale)).sum()
        per_weight = reference.weight_scale_gradient(grad, wide, scale).to(weight.dtype)
        per_scale = torch.where(scale == 0, 0.0, -grad * per_grad / scale)
        return per_grad, per_weight, per_scale


_compiled = _Family("")
_families = {"cpp": _compiled, "cuda": _compiled, "triton": _Family("triton")}


def _backend(tensor: Tensor) -> str:
    return "reference" if transformed() else choose(tensor.device, cuda_order(tensor.numel()))


def perturb(
    weight: Tensor,
    sigma: float | Tensor,
    seed: Seed,
    *,
    stream: int = 0,
    distribution: str = "normal",
    row_offset: int = 0,
    column_offset: int = 0,
    row_length: int | None = None,
) -> Tensor:
    """weight + sigma * epsilon, with epsilon made in the kernel from the noise stream.

    Element (n, k) of a weight [N, ..] of K = numel / N columns uses element
    (row_offset + n) * row_length + column_offset + k of the stream, so that a shard of a larger matrix gets the bits of
    the whole. A weight of fewer than two dimensions is one row.

    Args:
        weight: any shape and strides; float64, float32, bfloat16 or float16.
        sigma: a float, or a tensor of shape (), [N, 1, ..] or the weight's own; with a leading P for a population (one
            value a member is [P], or [P, 1] for a vector). Any sign: `-sigma` with one seed is the antithetic twin.
        seed: an int (taken modulo 2^64), or an int64 tensor, 0-dim or [P] for a population.
        stream: an independent stream, in [0, 2^32).
        distribution: "normal" or "rademacher".
        row_offset: rows of the whole matrix before this block.
        column_offset: columns of the whole matrix before this block.
        row_length: columns of the whole matrix; the block's own when None.

    Returns:
        The weight's shape, or [P, *shape]; the weight's dtype; contiguous. Product and sum are rounded to float32
        (float64 for float64) one after the other, then to the weight's dtype: the same bits on every backend.
        Differentiable in weight and sigma, any number of times; the noise is made again, never stored.

    Raises:
        TypeError, ValueError: for arguments out of range, naming the argument.
    """
    seeds, sigmas = seeds_and_sigma(weight, sigma, seed)
    place = noise_place(tuple(weight.shape), stream, distribution, row_offset, column_offset, row_length)
    backend = _backend(weight)
    if backend == "reference":
        return reference.perturb(weight, sigmas, seeds, *place)
    return _families[backend].perturb(weight, sigmas, seeds, *place)


def perturb_(
    weight: Tensor,
    sigma: float | Tensor,
    seed: Seed,
    *,
    stream: int = 0,
    distribution: str = "normal",
    row_offset: int = 0,
    column_offset: int = 0,
    row_length: int | None = None,
) -> Tensor:
    """`perturb` in place, without autograd: subtracting the same noise later does not restore the bits.

    Args: those of `perturb`; no population.

    Returns:
        weight.

    Raises:
        RuntimeError: when the weight requires grad in grad mode.
        TypeError, ValueError: for arguments out of range, naming the argument.
    """
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("weight: perturb_ has no gradient; call it under torch.no_grad(), or use perturb")
    seeds, sigmas = seeds_and_sigma(weight, sigma, seed)
    if seeds.dim():
        raise ValueError(f"seed: perturb_ has room for one member, got a population of {seeds.shape[0]}")
    place = noise_place(tuple(weight.shape), stream, distribution, row_offset, column_offset, row_length)
    backend = _backend(weight)
    if backend == "reference":
        return weight.copy_(reference.perturb(weight, sigmas, seeds, *place))
    _ops.overload("perturb_", backend)(weight, sigmas, seeds, *place)
    if not torch.compiler.is_compiling() and not weight.is_inference():
        # Autograd must notice when a tensor that it saved has changed.
        torch.autograd.graph.increment_version(weight)
    return weight


def perturbation_gradient(
    coefficients: Tensor,
    seeds: Tensor,
    shape: Sequence[int],
    *,
    stream: int = 0,
    distribution: str = "normal",
    row_offset: int = 0,
    column_offset: int = 0,
    row_length: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """sum_p c_p epsilon_p: the estimate that evolution strategies and zeroth-order methods make of a gradient.

    No epsilon is stored: memory is that of the result. With weights (f(W + s eps_p) - f(W - s eps_p)) / (2 s P) it is
    the antithetic estimate of Salimans et al. (2017), "Evolution strategies as a scalable alternative to RL".

    Args:
        coefficients: [P], float64, float32, bfloat16 or float16.
        seeds: int64 [P], on the same device.
        shape: of the weight that was perturbed.
        stream, distribution, row_offset, column_offset, row_length: as given to `perturb`.
        dtype: of the result; the coefficients' when None.
        device: of the result; must be the coefficients' when given.

    Returns:
        [*shape]. Added in float32 (float64 for float64) in the order of p, then rounded once: the same bits on every
        backend. Differentiable in coefficients, any number of times.

    Raises:
        TypeError, ValueError: for arguments out of range, naming the argument.
    """
    check_floating("coefficients", coefficients)
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        got = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"seeds: expected an int64 tensor, got {got}")
    if coefficients.dim() != 1 or coefficients.shape != seeds.shape:
        raise ValueError(
            f"coefficients, seeds: expected two tensors of shape [P], got {tuple(coefficients.shape)} and "
            f"{tuple(seeds.shape)}"
        )
    if seeds.device != coefficients.device:
        raise ValueError(f"seeds: expected a tensor on {coefficients.device}, got one on {seeds.device}")
    if device is not None and torch.device(device) != coefficients.device:
        raise ValueError(f"device: expected the coefficients' {coefficients.device}, got {device}")
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}")
    sizes = tuple(shape)
    place = noise_place(sizes, stream, distribution, row_offset, column_offset, row_length)
    wide = coefficients.to(compute_dtype(coefficients.dtype))
    backend = _backend(coefficients)
    if backend == "reference":
        total = reference.perturbation_gradient(wide, seeds, sizes, *place)
    else:
        total = _families[backend].perturbation_gradient(wide, seeds, sizes, *place)
    return total.to(dtype or coefficients.dtype)


def weight_scale(weight: Tensor) -> Tensor:
    """The unbiased standard deviation of all elements of a weight: what relative noise is scaled by.

    Args:
        weight: any shape and strides; float64, float32, bfloat16 or float16.

    Returns:
        0-dim, float32 (float64 for float64), on the weight's device; 0 below two elements. Two passes over blocks that
        fit the cache, combined in a fixed order (Chan, Golub, LeVeque 1979): no cancellation, and the same bits for any
        number of threads. Differentiable any number of times; the gradient at 0 is 0.

    Raises:
        TypeError: when weight is not a floating-point tensor.
    """
    check_floating("weight", weight)
    backend = _backend(weight)
    if backend == "reference":
        return reference.weight_scale(weight)
    return _families[backend].weight_scale(weight)
