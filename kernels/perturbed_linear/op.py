"""A linear layer whose weights are perturbed as they are read: noise and perturbed weights are never stored."""

from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .._autograd import differentiable
from .._backends import choose, transformed
from .._seeds import Seed
from . import reference
from .arguments import Arguments, checked
from .tuning import cuda_order

_PLACE = "bool member_inputs, int stream, int domain, SymInt row_offset, SymInt column_offset, SymInt row_length"
#: The number of arguments from member_inputs on: none of them has a gradient.
_CONSTANTS = 6
_TRITON = "quaver.kernels.perturbed_linear.triton_kernels"


def _fake_linear(
    x: Tensor, weight: Tensor, bias: Any, sigma: Any, bias_sigma: Any, seed: Tensor, *place: Any
) -> Tensor:
    lead = x.shape[1:-1] if place[0] else x.shape[:-1]
    return x.new_empty((*seed.shape, *lead, weight.shape[0]))


def _fake_input_gradient(grad: Tensor, weight: Tensor, sigma: Tensor, seed: Tensor, *place: Any) -> Tensor:
    members = seed.shape if place[0] else ()
    return grad.new_empty((*members, *grad.shape[seed.dim() : -1], weight.shape[1]))


def _fake_parameter_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    bias_sigma: Tensor | None,
    seed: Tensor,
    need_weight: bool,
    need_sigma: bool,
    need_bias: bool,
    need_bias_sigma: bool,
    *place: Any,
) -> tuple[Tensor, ...]:
    wanted = ((weight, need_weight), (sigma, need_sigma), (bias, need_bias), (bias_sigma, need_bias_sigma))
    kinds = (weight, sigma, weight, sigma)
    return tuple(
        torch.empty(tensor.shape if needed and tensor is not None else (0,), dtype=kind.dtype, device=kind.device)
        for (tensor, needed), kind in zip(wanted, kinds, strict=True)
    )


_ops.define(
    "perturbed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, Tensor? bias_sigma, Tensor seed, "
    f"{_PLACE}) -> Tensor",
    _fake_linear,
    _TRITON,
)
# grad has the shape of perturbed_linear's result; the result has x's.
_ops.define(
    f"perturbed_linear_input_gradient(Tensor grad, Tensor weight, Tensor sigma, Tensor seed, {_PLACE}) -> Tensor",
    _fake_input_gradient,
    _TRITON,
)
# The results have the shapes of weight, sigma, bias and bias_sigma; those that are not needed are of shape [0].
_ops.define(
    "perturbed_linear_parameter_gradient(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor sigma, "
    "Tensor? bias_sigma, Tensor seed, bool need_weight, bool need_sigma, bool need_bias, bool need_bias_sigma, "
    f"{_PLACE}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_parameter_gradient,
    _TRITON,
)


class _Family:
    """The ops of one backend. Each is linear in every tensor but the seed: their derivatives are the ops themselves."""

    def __init__(self, backend: str) -> None:
        def overload(name: str) -> Any:
            return _ops.overload(name, backend)

        self.linear = differentiable(overload("perturbed_linear"), self._save_linear, self._linear_backward)
        self.input_gradient = differentiable(
            overload("perturbed_linear_input_gradient"), self._save_input_gradient, self._input_gradient_backward
        )
        self.parameter_gradient = differentiable(
            overload("perturbed_linear_parameter_gradient"),
            self._save_parameter_gradient,
            self._parameter_gradient_backward,
        )

    @staticmethod
    def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.place = inputs[6:]

    def _linear_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, bias, sigma, bias_sigma, seed = ctx.saved_tensors
        need_x, *needed = ctx.needs_input_grad[:5]
        of_x = self.input_gradient(grad, weight, sigma, seed, *ctx.place) if need_x else None
        need_weight, need_bias, need_sigma, need_bias_sigma = needed
        of_weight = of_bias = of_sigma = of_bias_sigma = None
        if any(needed):
            of_weight, of_sigma, of_bias, of_bias_sigma = self.parameter_gradient(
                *(grad, x, weight, bias, sigma, bias_sigma, seed),
                *(need_weight, need_sigma, need_bias, need_bias_sigma),
                *ctx.place,
            )
        return (
            of_x,
            of_weight if need_weight else None,
            of_bias if need_bias else None,
            of_sigma if need_sigma else None,
            of_bias_sigma if need_bias_sigma else None,
            None,
            *[None] * _CONSTANTS,
        )

    @staticmethod
    def _save_input_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.place = inputs[4:]

    def _input_gradient_backward(self, ctx: Any, v: Tensor) -> tuple[Any, ...]:
        # <v, grad W'> = <v W'^T, grad> = <grad^T v, W'>
        grad, weight, sigma, seed = ctx.saved_tensors
        need_grad, need_weight, need_sigma = ctx.needs_input_grad[:3]
        of_grad = self.linear(v, weight, None, sigma, None, seed, *ctx.place) if need_grad else None
        of_weight = of_sigma = None
        if need_weight or need_sigma:
            of_weight, of_sigma, _, _ = self.parameter_gradient(
                grad, v, weight, None, sigma, None, seed, need_weight, need_sigma, False, False, *ctx.place
            )
        return (
            of_grad,
            of_weight if need_weight else None,
            of_sigma if need_sigma else None,
            None,
            *[None] * _CONSTANTS,
        )

    @staticmethod
    def _save_parameter_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.needed, ctx.place = inputs[7:11], inputs[11:]

    def _parameter_gradient_backward(self, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        # The parameter gradients v stand for a layer whose weights are v_weight + v_sigma * epsilon, and likewise its
        # bias: <v, parameter_gradient(grad, x)> = <grad, that layer of x>.
        grad, x, weight, bias, sigma, _, seed = ctx.saved_tensors
        need_weight, need_sigma, need_bias, need_bias_sigma = ctx.needed
        v_weight, v_sigma, v_bias, v_bias_sigma = grads
        if not need_weight:
            v_weight = torch.zeros_like(weight)
        if not need_sigma:
            v_sigma = torch.zeros((), dtype=sigma.dtype, device=sigma.device)
        of_grad = of_x = None
        if ctx.needs_input_grad[0]:
            layer_bias = v_bias if need_bias else torch.zeros_like(bias) if need_bias_sigma else None
            layer_bias_sigma = v_bias_sigma if need_bias_sigma else None
            of_grad = self.linear(x, v_weight, layer_bias, v_sigma, layer_bias_sigma, seed, *ctx.place)
        if ctx.needs_input_grad[1]:
            of_x = self.input_gradient(grad, v_weight, v_sigma, seed, *ctx.place)
        return of_grad, of_x, *[None] * (9 + _CONSTANTS)


_compiled = _Family("")
_families = {"cpp": _compiled, "cuda": _compiled, "triton": _Family("triton")}


def run(arguments: Arguments) -> Tensor:
    """perturbed_linear of checked arguments, on the backend that is chosen for them."""
    x, weight = arguments.x, arguments.weight
    order = cuda_order(x.dtype, x.shape[:-1].numel(), weight.numel())
    backend = "reference" if transformed() else choose(weight.device, order)
    return reference.perturbed_linear(*arguments) if backend == "reference" else _families[backend].linear(*arguments)


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sigma: float | Tensor,
    bias_sigma: float | Tensor | None = None,
    seed: Seed,
    stream: int = 0,
    distribution: str = "normal",
    row_offset: int = 0,
    column_offset: int = 0,
    row_length: int | None = None,
    shared_input: bool | None = None,
) -> Tensor:
    """x @ (weight + sigma * epsilon).T + bias + bias_sigma * epsilon_bias, with the noise made as weights are read.

    Neither the noise nor the perturbed weights are stored, forward or backward. Element (n, k) of the weight uses
    element (row_offset + n) * row_length + column_offset + k of the stream, element n of the bias element
    row_offset + n of the stream's bias domain: column- and row-parallel shards get the noise of the whole.

    Args:
        x: [.., K]. For a population [P, .., K], one input a member, or [.., K], shared by all.
        weight: [N, K], any strides; x's dtype, or float32 where x is bfloat16 or float16.
        bias: [N] of the weight's dtype, or None.
        sigma: a float, or a tensor of shape (), [N, 1] or [N, K], with or without a leading P. Any sign: `-sigma` with
            the same seed is the antithetic twin.
        bias_sigma: None for a bias without noise; a float, or a tensor of shape () or [N]; [P, 1] or [P, N] for a
            population.
        seed: an int (taken modulo 2^64), or an int64 tensor, 0-dim or [P] for a population.
        stream: an independent stream, in [0, 2^32).
        distribution: "normal" or "rademacher".
        row_offset, column_offset, row_length: the place of this block in the whole matrix, as in `perturb`.
        shared_input: whether the members of a population share x. None: they do, unless x has two dimensions or more
            and the first is P.

    Returns:
        [.., N], or [P, .., N]; x's dtype; contiguous. The perturbed weights are those of `perturb` in float32 (float64
        for float64), rounded once to x's dtype; products are added in float32 or better. Under autocast x takes the
        autocast dtype and the parameters keep theirs. Differentiable any number of times in x, weight, bias, sigma and
        bias_sigma; saved for that: these and the seed.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    place = (stream, distribution, row_offset, column_offset, row_length)
    return run(checked(x, weight, bias, sigma, bias_sigma, seed, place, shared_input))
