"""The noise is what it is said to be: normal, uniform, balanced, independent. Seeds fixed, thresholds at p < 1e-6.

Run on the default backend, C++; test_philox.py shows that the others give the same bits.
"""

import math

import pytest
import torch
from tails import IMPROBABLE, chi_square_tail, kolmogorov_tail, largest_of, normal_tail, poisson_tail
from torch import Tensor

from quaver.kernels import philox_normal, philox_rademacher, philox_uniform, philox_words


def test_the_tail_formulas():
    """Against tabulated quantiles."""
    assert normal_tail(1.959964) == pytest.approx(0.05, rel=1e-5)
    assert normal_tail(-4.891638) == pytest.approx(1e-6, rel=1e-5)
    for quantile, degrees in ((3.841459, 1), (5.991465, 2), (18.307038, 10), (124.342113, 100)):
        assert chi_square_tail(quantile, degrees) == pytest.approx(0.05, rel=1e-5)
    assert chi_square_tail(0.0, 7) == 1
    assert chi_square_tail(255.0, 255) == pytest.approx(0.4882, abs=1e-4)
    # P(X <= 3) and P(X >= 12) of a Poisson variable of mean 8 are 0.04238 and 0.11192.
    assert poisson_tail(3, 8) == pytest.approx(2 * 0.04238, abs=1e-5)
    assert poisson_tail(12, 8) == pytest.approx(2 * 0.11192, abs=1e-5)
    assert kolmogorov_tail(1.358099 / 100, 10000) == pytest.approx(0.05, rel=1e-5)
    assert kolmogorov_tail(0.001, 10000) == 1


def _uniform_p_value(numbers: Tensor, bins: int) -> float:
    """Chi-square of integers in [0, bins) against equal frequencies."""
    counts = torch.bincount(numbers.flatten(), minlength=bins).double()
    mean = numbers.numel() / bins
    return chi_square_tail(float(((counts - mean) ** 2).sum() / mean), bins - 1)


def _kolmogorov_p_value(cumulative: Tensor) -> float:
    """The p-value of draws, given their cumulative probabilities, against the uniform."""
    count = len(cumulative)
    sorted_, steps = cumulative.sort().values, torch.arange(count + 1, dtype=torch.float64) / count
    return kolmogorov_tail(float(torch.maximum(steps[1:] - sorted_, sorted_ - steps[:-1]).max()), count)


# ---- the normal distribution ---------------------------------------------------------------------------------------


def test_moments_of_normals():
    z = philox_normal(2**24, 1, dtype=torch.float64)
    square = z * z
    # The variances of z, z^2, z^3 and z^4 are 1, 2, 15 and 96.
    for power, mean, variance in ((z, 0, 1), (square, 1, 2), (square * z, 0, 15), (square * square, 3, 96)):
        assert normal_tail((float(power.mean()) - mean) * math.sqrt(len(z) / variance)) > IMPROBABLE


def test_tails_of_normals():
    beyond = torch.zeros(5, 2, dtype=torch.int64)
    count, chunk = 2**26, 2**22
    for offset in range(0, count, chunk):
        z = philox_normal(chunk, 2, offset=offset, dtype=torch.float32)
        for sigma in range(1, 6):
            beyond[sigma - 1] += torch.stack(((z > sigma).sum(), (z < -sigma).sum()))
    for sigma, sides in enumerate(beyond.tolist(), 1):
        probability = math.erfc(sigma / math.sqrt(2)) / 2
        mean = count * probability
        for side in sides:
            if mean > 1e4:
                assert normal_tail((side - mean) / math.sqrt(mean * (1 - probability))) > IMPROBABLE, sigma
            else:
                assert poisson_tail(side, mean) > IMPROBABLE, sigma


def test_the_normal_distribution_function():
    assert _kolmogorov_p_value(torch.special.ndtr(philox_normal(2**21, 3, dtype=torch.float64))) > IMPROBABLE


def test_pairs_have_an_exponential_square_and_a_uniform_independent_angle():
    pairs = philox_normal((2**21, 2), 4, dtype=torch.float64)
    square, angle = (pairs * pairs).sum(-1), torch.atan2(pairs[:, 1], pairs[:, 0])
    cumulative = -torch.expm1(-square / 2)
    assert _kolmogorov_p_value(cumulative) > IMPROBABLE
    turn = (angle / (2 * math.pi)) % 1
    assert _uniform_p_value((turn * 4096).long().clamp(max=4095), 4096) > IMPROBABLE
    cells = (cumulative * 64).long().clamp(max=63) * 64 + (turn * 64).long().clamp(max=63)
    assert _uniform_p_value(cells, 4096) > IMPROBABLE


# ---- uniforms, words, signs ----------------------------------------------------------------------------------------


def test_uniforms():
    u = philox_uniform(2**23, 5, dtype=torch.float64)
    # 1 itself, the rounded u of one word in 2^24, counts in the last bin.
    assert _uniform_p_value((u * 4096).long().clamp(max=4095), 4096) > IMPROBABLE
    # Below 1/2 no bit is rounded away: the lowest twelve of the 24 that are used.
    assert _uniform_p_value((u[u < 0.5] * 2**24).long() & 4095, 4096) > IMPROBABLE
    assert normal_tail((float(u.mean()) - 0.5) * math.sqrt(12 * len(u))) > IMPROBABLE


def test_bytes_and_neighbours_of_words():
    words = philox_words(2**21, 6)
    for shift in (0, 8, 16, 24):
        assert _uniform_p_value(words >> shift & 255, 256) > IMPROBABLE
    # The top six bits of a word and of the next, within a block and across.
    assert _uniform_p_value((words[1:] >> 26) * 64 + (words[:-1] >> 26), 4096) > IMPROBABLE


def test_signs_balance_and_run():
    signs = philox_rademacher(2**23, 7, dtype=torch.float32)
    count = len(signs)
    # A float32 sum of 2^23 signs is exact.
    assert normal_tail(float(signs.sum()) / math.sqrt(count)) > IMPROBABLE
    for lag in (*range(1, 9), 31, 32, 33, 127, 128, 129):
        agree = float((signs[lag:] * signs[:-lag]).sum())
        assert normal_tail(agree / math.sqrt(count - lag)) > IMPROBABLE, lag
    # Lengths of runs: 1, 2, .. with probability 1/2, 1/4, ..; 16 and longer together.
    ends = (signs[1:] != signs[:-1]).nonzero().flatten()
    lengths = ends.diff()
    counts = torch.bincount(lengths.clamp(max=16), minlength=17)[1:].double()
    expected = len(lengths) * 2.0 ** -torch.cat((torch.arange(1.0, 16), torch.tensor([15.0]))).double()
    assert chi_square_tail(float(((counts - expected) ** 2 / expected).sum()), 15) > IMPROBABLE


def test_bits_of_signs_balance_by_place():
    """Each of the 128 places of a block, over 2^16 blocks."""
    sums = philox_rademacher((2**16, 128), 8, dtype=torch.float32).sum(0)
    assert largest_of(float(sums.abs().max()) / 2**8, 128) > IMPROBABLE


# ---- independence --------------------------------------------------------------------------------------------------


def _independence_p_value(rows: Tensor) -> float:
    """Of the largest correlation between rows [sources, n], each of mean 0 and variance 1."""
    count, n = rows.shape
    above = torch.ones(count, count, dtype=torch.bool).triu(1)
    correlations = (rows @ rows.t() / n)[above]
    return largest_of(float(correlations.abs().max()) * math.sqrt(n), len(correlations))


def _with_squares(z: Tensor) -> Tensor:
    """z and (z^2 - 1) / sqrt(2), which sees a shared radius: all rows of mean 0 and variance 1."""
    return torch.cat((z, (z * z - 1) / math.sqrt(2)))


def test_streams_are_independent():
    streams = (0, 1, 2, 3, 4, 255, 256, 2**16, 2**31, 2**32 - 1)
    z = torch.stack([philox_normal(2**19, 9, stream=stream, dtype=torch.float64) for stream in streams])
    assert _independence_p_value(_with_squares(z)) > IMPROBABLE


def test_seeds_are_independent():
    """Consecutive ones, as steps and members of a population have, and ones that differ in a high bit."""
    seeds = torch.tensor([*range(-2, 10), 2**31, 2**32, 2**32 + 1, 2**62, -(2**63)])
    assert _independence_p_value(_with_squares(philox_normal(2**19, seeds, dtype=torch.float64))) > IMPROBABLE


def test_neighbours_are_independent():
    z = philox_normal(2**22, 10, dtype=torch.float64)
    features = (z, (z * z - 1) / math.sqrt(2), (z * z * z - 3 * z) / math.sqrt(6))
    for lag in range(1, 9):
        for left in features:
            for right in features:
                correlation = float(left[lag:] @ right[:-lag]) / math.sqrt(len(z) - lag)
                assert normal_tail(correlation) > IMPROBABLE, lag


def _noise_of_domain(count: int, domain: int) -> Tensor:
    out = torch.empty(count, dtype=torch.float64)
    torch.ops.quaver.philox_fill_(out, torch.tensor(11), 0, domain, 0)
    return out


def test_domains_are_independent():
    """Normals, uniforms, signs and permutation keys of one seed and stream, of weights and biases, block by block.

    The elements that would come of the same word are set side by side: of a block's words the first and third make the
    radii of its normals, and in each the top bit is the sign at place 31 of 32 and the largest part of the uniform.
    """
    blocks = 2**17
    rows = []
    for bias in (0, 256):
        normals = _noise_of_domain(blocks * 4, bias).reshape(blocks, 4).t()
        uniforms = _noise_of_domain(blocks * 4, bias + 2).reshape(blocks, 4).t()
        signs = _noise_of_domain(blocks * 128, bias + 1).reshape(blocks, 4, 32)[:, :, 31].t()
        rows += [_with_squares(normals), (uniforms - 0.5) * math.sqrt(12), signs]
    keys = torch.empty(blocks * 2, dtype=torch.int64)
    torch.ops.quaver.philox_keys_(keys, torch.tensor(11), 0)
    high = (keys >> 31).double() * 2.0**-32  # words 0 and 2 of a block
    rows.append((high.reshape(blocks, 2).t() - 0.5) * math.sqrt(12))
    assert _independence_p_value(torch.cat(rows)) > IMPROBABLE
