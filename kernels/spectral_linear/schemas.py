"""The schemas of these ops, and their results without data: shapes, dtypes and strides."""

from torch import Tensor

from .. import _ops

overload = _ops.overload
_TRITON = "quaver.kernels.spectral_linear.triton_kernels"


def _fake_coefficients(theta: Tensor, directions: Tensor) -> Tensor:
    return theta.new_empty((*theta.shape[:-1], 2 * directions.shape[0]))


def gradients(*wanted: tuple[Tensor | None, bool]) -> tuple[Tensor, ...]:
    """Contiguous results, not filled, of the shape and dtype of each tensor; [0] for those that nobody needs."""
    first = next(tensor for tensor, _ in wanted if tensor is not None)
    return tuple(
        tensor.new_empty(tensor.shape)
        if tensor is not None and needed
        else (tensor if tensor is not None else first).new_empty(0)
        for tensor, needed in wanted
    )


def _fake_coefficients_backward(
    grad: Tensor, coefficients: Tensor, theta: Tensor, directions: Tensor, need_theta: bool, need_directions: bool
) -> tuple[Tensor, ...]:
    return gradients((theta, need_theta), (directions, need_directions))


def _fake_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    gain: Tensor | None,
    by_delta: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    batch, length, inputs = x.shape
    outputs = weight.shape[0]
    kept = (batch, outputs, inputs) if by_delta else (batch, length, down.shape[0] * down.shape[1])
    return x.new_empty((batch, length, outputs)), x.new_empty(kept if keep else (0,))


def _fake_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    coefficients: Tensor,
    gain: Tensor | None,
    effective: Tensor | None,
    projected: Tensor | None,
    by_delta: bool,
    *needed: bool,
) -> tuple[Tensor, ...]:
    return gradients(*zip((x, weight, bias, down, up, coefficients, gain), needed, strict=True))


def _fake_delta(down: Tensor, up: Tensor, coefficients: Tensor, gain: Tensor | None) -> Tensor:
    return down.new_empty((coefficients.shape[0], up.shape[1], down.shape[2]))


def _fake_delta_backward(
    grad: Tensor, down: Tensor, up: Tensor, coefficients: Tensor, gain: Tensor | None, *needed: bool
) -> tuple[Tensor, ...]:
    return gradients(*zip((down, up, coefficients, gain), needed, strict=True))


def _fake_delta_linear(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, gain: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[0]))


def _fake_delta_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    gain: Tensor | None,
    *needed: bool,
) -> tuple[Tensor, ...]:
    return gradients(*zip((x, weight, bias, delta, gain), needed, strict=True))


# theta and directions are of one dtype, float32 or float64. Coefficients and gain below are of the dtype that
# arithmetic on x (on down, for spectral_delta) runs in: float64 for float64, float32 for the others. Each of the pairs
# weight and bias, down and up has x's dtype, or that one; the gradients have the dtypes of what they are of.
_ops.define("spectral_coefficients(Tensor theta, Tensor directions) -> Tensor", _fake_coefficients, _TRITON)
# coefficients: of the forward pass. Gradients that are not needed have the shape [0], here and below.
_ops.define(
    "spectral_coefficients_backward(Tensor grad, Tensor coefficients, Tensor theta, Tensor directions, "
    "bool need_theta, bool need_directions) -> (Tensor, Tensor)",
    _fake_coefficients_backward,
    _TRITON,
)
_FACTORS = "Tensor down, Tensor up, Tensor coefficients, Tensor? gain"
# The second result is for backward, in x's dtype: by Delta W + gain * Delta, [B, N, K]; by tokens x down^T, before the
# coefficients, [B, T, R]. [0] where `keep` is False. by_delta: never with coefficients by tokens.
_ops.define(
    f"spectral_linear(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, bool by_delta, bool keep) -> (Tensor, Tensor)",
    _fake_linear,
    _TRITON,
)
# effective and projected: what forward kept, if it did, of either order; by_delta: that of backward.
_ops.define(
    f"spectral_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, Tensor? effective, "
    "Tensor? projected, bool by_delta, bool need_x, bool need_weight, bool need_bias, bool need_down, bool need_up, "
    "bool need_coefficients, bool need_gain) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_linear_backward,
    _TRITON,
)
_ops.define(f"spectral_delta({_FACTORS}) -> Tensor", _fake_delta, _TRITON)
_ops.define(
    f"spectral_delta_backward(Tensor grad, {_FACTORS}, bool need_down, bool need_up, bool need_coefficients, "
    "bool need_gain) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_delta_backward,
    _TRITON,
)
# delta [B, N, K]: x's dtype, or that of gain.
_ops.define(
    "delta_linear(Tensor x, Tensor weight, Tensor? bias, Tensor delta, Tensor? gain) -> Tensor",
    _fake_delta_linear,
    _TRITON,
)
_ops.define(
    "delta_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor delta, Tensor? gain, "
    "bool need_x, bool need_weight, bool need_bias, bool need_delta, bool need_gain) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_delta_linear_backward,
    _TRITON,
)
