"""Linear layers whose weights follow spectral coordinates, by low-rank factors that many layers share."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quaver.kernels import delta_linear, spectral_coefficients, spectral_delta, spectral_linear


class Modulation(NamedTuple):
    """What a bank hands to the layers of one forward pass: made once, used by all of them.

    coefficients: [B, 2n], or [B, T, 2n] by tokens. delta: [B, N, K], or None: layers then multiply by the factors.
    """

    down: Tensor
    up: Tensor
    coefficients: Tensor
    delta: Tensor | None


class SpectralBank(nn.Module):
    """Factors for Delta = sum_i cos(a_i) U_i V_i^T + sin(a_i) P_i Q_i^T, a = directions . theta, shared by layers.

    Layers of at most `in_features` inputs and `out_features` outputs use the first columns and rows of Delta, each
    times a gain of its own. Delta is zero at the start (`up` is), so that a model begins unmodulated.

    Args:
        coordinates: C of theta [B, C].
        directions: n; there are 2n factors.
        rank: of each factor.
        in_features, out_features: K and N, the largest of the layers that share the bank.

    Attributes:
        directions: [n, C], normal with variance 1 / C.
        down: [2n, rank, K], normal with variance 1 / K.
        up: [2n, N, rank], zero.
    """

    def __init__(self, coordinates: int, directions: int, rank: int, in_features: int, out_features: int) -> None:
        super().__init__()
        sizes = {
            "coordinates": coordinates,
            "directions": directions,
            "rank": rank,
            "in_features": in_features,
            "out_features": out_features,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.directions = nn.Parameter(torch.randn(directions, coordinates) * coordinates**-0.5)
        self.down = nn.Parameter(torch.randn(2 * directions, rank, in_features) * in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(2 * directions, out_features, rank))

    def forward(self, theta: Tensor, *, by_delta: bool | None = None) -> Modulation:
        """The modulation at some coordinates.

        Args:
            theta: [B, C], or [B, T, C] for coordinates by tokens.
            by_delta: whether Delta [B, N, K] is made, once for all layers: R / (m T) of the multiplications of m
                layers over T tokens, where R = 2n rank; or each layer multiplies its tokens by the factors, which few
                tokens are faster by. None: by Delta, but for coordinates by tokens, which have none.

        Raises:
            TypeError, ValueError: for coordinates that do not fit.
        """
        coefficients = spectral_coefficients(theta, self.directions)
        if by_delta is None:
            by_delta = theta.dim() == 2
        delta = spectral_delta(self.down, self.up, coefficients) if by_delta else None
        return Modulation(self.down, self.up, coefficients, delta)

    def extra_repr(self) -> str:
        """The sizes."""
        factors, rank, inputs = self.down.shape
        return (
            f"coordinates={self.directions.shape[1]}, directions={factors // 2}, rank={rank}, in_features={inputs}, "
            f"out_features={self.up.shape[1]}"
        )


class SpectralLinear(nn.Linear):
    """x (W + gain * Delta)^T + b, with Delta a bank's: nn.Linear where there is no modulation.

    The bank is not the layer's: a model has it once and hands what it makes to every call. A weight that torchao has
    quantized is made whole again for each modulated call.

    Args:
        in_features, out_features, bias: as in nn.Linear; at most the bank's.
        gain_by_row: a gain for each output; else one for the layer. 1 at the start.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, gain_by_row: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.gain = nn.Parameter(torch.ones(out_features if gain_by_row else ()))

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        """x [B, T, in_features] -> [B, T, out_features]. Without a modulation x may have any leading dimensions.

        Raises:
            TypeError, ValueError: for a bank smaller than the layer, or arguments that do not fit.
        """
        if modulation is None:
            return F.linear(x, self.weight, self.bias)
        down, up, coefficients, delta = modulation
        if down.shape[2] < self.in_features or up.shape[1] < self.out_features:
            raise ValueError(
                f"modulation: expected factors for at least {self.in_features} inputs and {self.out_features} outputs, "
                f"got {down.shape[2]} and {up.shape[1]}"
            )
        weight = self.weight
        if type(weight).dequantize is not Tensor.dequantize:  # a quantized weight's class has its own
            weight = weight.dequantize()
        if delta is not None:
            part = delta[:, : self.out_features, : self.in_features]
            return delta_linear(x, weight, self.bias, part, gain=self.gain)
        down, up = down[:, :, : self.in_features], up[:, : self.out_features]
        return spectral_linear(x, weight, self.bias, down, up, coefficients, gain=self.gain)
