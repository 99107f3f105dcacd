"""Choices of spectral_linear: in which order its products are made. What shapes the CPU's kernels is in csrc/cpu."""

#: The order of backends on a GPU.
CUDA_ORDER = ("cuda",)


def forward_by_delta(tokens: int, inputs: int, outputs: int) -> bool:
    """Whether W + Delta is made for each sample, rather than x projected to the factors.

    Multiplications of a sample: by tokens T R (K + N) + T N K, by Delta N K R + T N K. They are equal at
    T* = K N / (K + N), whatever R is.
    """
    return tokens * (inputs + outputs) > inputs * outputs


def backward_by_delta(
    tokens: int,
    inputs: int,
    outputs: int,
    rank: int,
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
    coefficients; up^T G (N K R) for down; W + Delta again (N K R, unless it was kept) for x.

    Args:
        tokens, inputs, outputs, rank: T, K, N, R.
        need_x, need_weight, need_down, need_coefficients: whether these gradients are asked for.
        need_up: whether that of up or gain is.
        kept_by_delta: the order of a forward pass that kept its intermediate result, W + Delta or z; None: it did not.
    """
    of_coefficients = need_up or need_coefficients
    by_token = tokens * outputs * rank if need_x or need_down or of_coefficients else 0
    by_token += tokens * outputs * rank if need_up else 0
    again = of_coefficients and kept_by_delta is not False
    by_token += (int(again) + int(need_down) + int(need_x)) * tokens * inputs * rank
    again = need_x and kept_by_delta is not True
    by_delta = (int(of_coefficients) + int(need_down) + int(again)) * inputs * outputs * rank
    by_delta += tokens * inputs * outputs if (need_down or of_coefficients) and not need_weight else 0
    return by_delta < by_token
