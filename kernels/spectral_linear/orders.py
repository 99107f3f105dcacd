"""In which order the products of spectral_linear are made: the one with fewer multiplications.

Multiplications of a sample: by tokens T R (K + N) + T N K, by way of Delta N K R + T N K; R columns of factors. The
CPU's kernels make a factor's product up_f down_f once for several samples (csrc/cpu/factor_loops.h): then Delta takes
as many as the rank for all of these, and one more for each, of every element and factor.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _library

#: Samples that share a factor's product: kSamplesTogether of csrc/cpu/factor_loops.h.
SAMPLES_TOGETHER = 16
#: What a multiplication costs there, beside one of the large products: 4 / 3 (measured: 1.2 to 1.6, Sapphire Rapids).
SHARED_COST = (4, 3)
#: Whether bfloat16 is multiplied by AMX: as it was at import; torch.compile cannot ask.
BY_TILES = _library.CPU.loaded and _library.current_simd() == "amx"


class Sizes(NamedTuple):
    """The sizes of a call; shared: whether the kernels can make factors' products for several samples."""

    batch: int
    tokens: int
    inputs: int
    outputs: int
    factors: int
    rank: int
    shared: bool

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, down: Tensor) -> "Sizes":
        """Those of a call. bfloat16 by AMX is counted as not shared: its tiles gain as much on every product."""
        shared = x.device.type == "cpu" and not (x.dtype is torch.bfloat16 and BY_TILES)
        factors, rank, _ = down.shape
        (batch, tokens, inputs), outputs = x.shape, weight.shape[0]
        return cls(batch, tokens, inputs, outputs, factors, rank, shared)

    def through_delta(self, by_sample: int, by_factor: int) -> int:
        """What products of N K R each cost, for all samples, in multiplications times `unit`: so many sample by sample,
        or, if that is less, so many that are shared."""
        cost, unit = SHARED_COST
        alone = unit * by_sample * self.rank * self.batch
        together = self.rank * -(-self.batch // SAMPLES_TOGETHER) + self.batch
        least = min(alone, cost * by_factor * together) if self.shared else alone
        return least * self.factors * self.inputs * self.outputs

    def through_tokens(self, wide: int, narrow: int) -> int:
        """What `wide` products of T N R and `narrow` ones of T K R cost, in the same unit."""
        per_token = wide * self.outputs + narrow * self.inputs
        return SHARED_COST[1] * self.batch * self.tokens * per_token * self.factors * self.rank


def forward_by_delta(sizes: Sizes) -> bool:
    """Whether W + Delta is made for each sample, rather than x projected to the factors.

    Where nothing is shared both cost the same at T* = K N / (K + N), whatever R is.
    """
    return sizes.through_delta(1, 1) < sizes.through_tokens(1, 1)


def backward_by_delta(
    sizes: Sizes,
    *,
    need_x: bool,
    need_weight: bool,
    need_down: bool,
    need_up: bool,
    need_coefficients: bool,
    kept_by_delta: bool | None,
) -> bool:
    """The same for backward, by the multiplications that the gradients asked for take.

    By tokens: dz = g up (T N R) for all but weight and bias; z = x down^T (T K R, unless it was kept) for up, gain and
    coefficients; g^T z (T N R) for up and gain; dz^T x (T K R) for down; dz down (T K R) for x.
    By Delta: G = g^T x (T N K, which the weight's gradient takes in any case); G down^T (N K R) for up, gain and
    coefficients, or, shared, one for up and gain and one for the coefficients; up^T G (N K R) for down; W + Delta again
    (N K R, unless it was kept) for x.

    Args:
        sizes: of the call.
        need_x, need_weight, need_down, need_coefficients: whether these gradients are asked for.
        need_up: whether that of up or gain is.
        kept_by_delta: the order of a forward pass that kept its intermediate result, W + Delta or z; None: it did not.
    """
    of_coefficients = need_up or need_coefficients
    again = of_coefficients and kept_by_delta is not False
    wide = int(need_x or need_down or of_coefficients) + int(need_up)
    by_token = sizes.through_tokens(wide, int(again) + int(need_down) + int(need_x))
    by_delta = sizes.through_delta(
        int(of_coefficients) + int(need_down), int(need_up) + int(need_coefficients) + int(need_down)
    )
    if need_x and kept_by_delta is not True:
        by_delta += sizes.through_delta(1, 1)
    if (need_down or of_coefficients) and not need_weight:
        by_delta += SHARED_COST[1] * sizes.batch * sizes.tokens * sizes.inputs * sizes.outputs
    return by_delta < by_token
