"""A linear layer modulated by spectral coordinates: coefficients, the layer, and the Delta that layers can share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd import differentiable
from .._backends import choose, transformed
from .._second import derivative_of_gradient
from . import arguments, reference, schemas
from .orders import Sizes, backward_by_delta
from .tuning import CUDA_ORDER


def _where(needed: Sequence[bool], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for need, grad in zip(needed, grads, strict=True))


class _Family:
    """The ops of one backend. The derivative of a backward op is the reference's."""

    def __init__(self, backend: str) -> None:
        def overload(name: str) -> Any:
            return schemas.overload(name, backend)

        self.coefficients = differentiable(
            overload("spectral_coefficients"), self._save_coefficients, self._coefficients_backward
        )
        self.coefficients_gradient = differentiable(
            overload("spectral_coefficients_backward"),
            self._save_coefficients_gradient,
            self._coefficients_gradient_backward,
        )
        self.linear = differentiable(overload("spectral_linear"), self._save_linear, self._linear_backward)
        self.linear_gradient = differentiable(
            overload("spectral_linear_backward"), self._save_linear_gradient, self._linear_gradient_backward
        )
        self.delta = differentiable(overload("spectral_delta"), self._save_delta, self._delta_backward)
        self.delta_gradient = differentiable(
            overload("spectral_delta_backward"), self._save_delta_gradient, self._delta_gradient_backward
        )
        self.delta_linear = differentiable(
            overload("delta_linear"), self._save_delta_linear, self._delta_linear_backward
        )
        self.delta_linear_gradient = differentiable(
            overload("delta_linear_backward"), self._save_delta_linear_gradient, self._delta_linear_gradient_backward
        )

    @staticmethod
    def _save_coefficients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(output, *inputs)

    def _coefficients_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        coefficients, theta, directions = ctx.saved_tensors
        needed = tuple(ctx.needs_input_grad)
        # The coefficients are a function of theta and directions: their derivative's derivative covers it.
        return _where(needed, self.coefficients_gradient(grad, coefficients.detach(), theta, directions, *needed))

    @staticmethod
    def _save_coefficients_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0], *inputs[2:4])
        ctx.needed = inputs[4:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def _coefficients_gradient_backward(ctx: Any, *of_grads: Tensor | None) -> tuple[Any, ...]:
        grad, *tensors = ctx.saved_tensors
        of_inputs, of_outer = derivative_of_gradient(
            reference.spectral_coefficients, tensors, (grad,), _where(ctx.needed, of_grads)
        )
        return *of_outer, None, *of_inputs, None, None

    @staticmethod
    def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.by_delta, keep = inputs[7:]
        ctx.save_for_backward(*inputs[:7], output[1] if keep else None)
        ctx.set_materialize_grads(False)

    def _linear_backward(self, ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 9
        *tensors, kept = ctx.saved_tensors
        x, weight, _, down, *_ = tensors
        needed = tuple(ctx.needs_input_grad[:7])
        need_x, need_weight, _, need_down, need_up, need_coefficients, need_gain = needed
        # What was kept is a function of the inputs: their derivative's derivative covers it.
        kept = None if kept is None else kept.detach()
        by_delta = tensors[5].dim() == 2 and backward_by_delta(
            Sizes.of(x, weight, down),
            need_x=need_x,
            need_weight=need_weight,
            need_down=need_down,
            need_up=need_up or need_gain,
            need_coefficients=need_coefficients,
            kept_by_delta=None if kept is None else ctx.by_delta,
        )
        effective, projected = (kept, None) if ctx.by_delta else (None, kept)
        grads = self.linear_gradient(grad, *tensors, effective, projected, by_delta, *needed)
        return *_where(needed, grads), None, None

    @staticmethod
    def _save_linear_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:8])
        ctx.by_delta, *ctx.needed = inputs[10:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def _linear_gradient_backward(ctx: Any, *of_grads: Tensor | None) -> tuple[Any, ...]:
        grad, *tensors = ctx.saved_tensors

        def linear(*tensors: Any) -> Tensor:
            x, weight, bias, down, up, coefficients, gain = tensors
            return reference.spectral_linear(x, weight, bias, down, up, coefficients, gain, ctx.by_delta)

        of_inputs, of_outer = derivative_of_gradient(linear, tensors, (grad,), _where(ctx.needed, of_grads))
        return *of_outer, *of_inputs, *[None] * 10

    @staticmethod
    def _save_delta(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def _delta_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = tuple(ctx.needs_input_grad)
        return _where(needed, self.delta_gradient(grad, *ctx.saved_tensors, *needed))

    @staticmethod
    def _save_delta_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.needed = inputs[5:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def _delta_gradient_backward(ctx: Any, *of_grads: Tensor | None) -> tuple[Any, ...]:
        grad, *tensors = ctx.saved_tensors
        of_inputs, of_outer = derivative_of_gradient(
            reference.spectral_delta, tensors, (grad,), _where(ctx.needed, of_grads)
        )
        return *of_outer, *of_inputs, *[None] * 4

    @staticmethod
    def _save_delta_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def _delta_linear_backward(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = tuple(ctx.needs_input_grad)
        return _where(needed, self.delta_linear_gradient(grad, *ctx.saved_tensors, *needed))

    @staticmethod
    def _save_delta_linear_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.needed = inputs[6:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def _delta_linear_gradient_backward(ctx: Any, *of_grads: Tensor | None) -> tuple[Any, ...]:
        grad, *tensors = ctx.saved_tensors
        of_inputs, of_outer = derivative_of_gradient(
            reference.delta_linear, tensors, (grad,), _where(ctx.needed, of_grads)
        )
        return *of_outer, *of_inputs, *[None] * 5


_compiled = _Family("cpp")
_families = {"cpp": _compiled, "cuda": _compiled, "triton": _Family("triton")}


def _family(device: torch.device) -> _Family | None:
    """The ops of the backend that is chosen, or None for the reference."""
    return _families.get("reference" if transformed() else choose(device, CUDA_ORDER))


def spectral_coefficients(theta: Tensor, directions: Tensor) -> Tensor:
    """The coefficients of spectral coordinates: cosines, then sines, of the angles theta . directions_i.

    Args:
        theta: coordinates [B, C], or [B, T, C] by tokens; in radians times the unit of `directions`.
        directions: [n, C], of a dtype that arithmetic runs in the same one for.

    Returns:
        [B, 2n] or [B, T, 2n], contiguous; float64 for float64, float32 for the others, under autocast too. Cosines and
        sines are within 2 units in the last place of those of the computed angle, up to 1e4 in magnitude.
        Differentiable in both arguments, any number of times.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    checked = arguments.coefficients(theta, directions)
    family = _family(theta.device)
    result: Tensor = reference.spectral_coefficients(*checked) if family is None else family.coefficients(*checked)
    return result


def spectral_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    *,
    gain: Tensor | None = None,
    order: str | None = None,
) -> Tensor:
    """x W^T + b + gain * sum_i c_i (x down_i^T) up_i^T: a linear layer with low-rank factors weighted for each sample.

    Computed in the order with fewer multiplications, forward and backward each: by tokens, T (K + N) R + T N K a
    sample, or by way of W + Delta, N K R + T N K; R = 2n r. They are equal at T = K N / (K + N), whatever R is, and
    earlier on a CPU, where several samples share the products of up and down.

    Args:
        x: [B, T, K], any strides; those with contiguous rows need no copy.
        weight: [N, K] of x's dtype, or float32 beside a 16-bit x; then it is rounded to x's dtype.
        bias: [N] of the weight's dtype, or None.
        down: [2n, r, K], and up [2n, N, r]: the factors, of one dtype, x's or float32 beside a 16-bit x.
        coefficients: [B, 2n], or [B, T, 2n] by tokens; x's dtype or float32, used in float32 (float64 for float64).
        gain: 0-dim or [N], x's dtype or float32; None for 1.
        order: "token" or "delta" overrides the choice of forward; None chooses. Coefficients by tokens need "token".

    Returns:
        [B, T, N], x's dtype, contiguous. Sums are in float32 or better. Under autocast x takes its dtype.
        Differentiable in every tensor, any number of times; where a gradient is asked for, forward keeps
        W + gain * Delta [B, N, K] or x down^T [B, T, R] for backward. The second derivative is the reference's.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    checked = arguments.linear(x, weight, bias, down, up, coefficients, gain, order)
    family = _family(checked.x.device)
    if family is None:
        return reference.spectral_linear(*checked)
    result: Tensor = family.linear(*checked, _keeps(checked))[0]
    return result


def _keeps(checked: arguments.Linear) -> bool:
    """Whether backward will have a use for what forward can keep: W + Delta for x, x down^T for the other factors'."""
    if not torch.is_grad_enabled():
        return False
    if checked.by_delta:
        return checked.x.requires_grad
    return any(
        tensor is not None and tensor.requires_grad for tensor in (checked.up, checked.coefficients, checked.gain)
    )


def spectral_delta(down: Tensor, up: Tensor, coefficients: Tensor, *, gain: Tensor | None = None) -> Tensor:
    """Delta_b = gain * sum_i c_bi up_i down_i: computed once, for the `delta_linear` of many layers.

    Args:
        down: [2n, r, K], and up [2n, N, r], of one dtype.
        coefficients: [B, 2n]; their dtype or float32.
        gain: 0-dim or [N], in the same dtypes; None for 1.

    Returns:
        [B, N, K], down's dtype, contiguous. Differentiable in every argument, any number of times.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    checked = arguments.delta(down, up, coefficients, gain)
    family = _family(checked.down.device)
    result: Tensor = reference.spectral_delta(*checked) if family is None else family.delta(*checked)
    return result


def delta_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, *, gain: Tensor | None = None
) -> Tensor:
    """x_b (W + gain * delta_b)^T + b: a linear layer with a weight of its own for each sample, as an offset.

    m layers that share one Delta cost 1 + R / (m T) of unmodulated ones in multiplications.

    Args:
        x, weight, bias: as in `spectral_linear`.
        delta: [B, N, K], x's dtype or float32.
        gain: 0-dim or [N], x's dtype or float32; None for 1.

    Returns:
        [B, T, N], x's dtype, contiguous. W + gain * delta is rounded once to x's dtype; it never is in memory whole.
        Differentiable in every tensor, any number of times.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """
    checked = arguments.delta_linear(x, weight, bias, delta, gain)
    family = _family(checked.x.device)
    result: Tensor = reference.delta_linear(*checked) if family is None else family.delta_linear(*checked)
    return result
