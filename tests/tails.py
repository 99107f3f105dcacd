"""Tail probabilities for the statistical tests: what scipy would have been needed for."""

import math

#: A test fails when what it saw had a smaller probability than this.
IMPROBABLE = 1e-6


def normal_tail(z: float) -> float:
    """P(|Z| >= |z|) of a standard normal."""
    return math.erfc(abs(z) / math.sqrt(2))


def largest_of(z: float, trials: int) -> float:
    """A bound on P(max |Z_i| >= |z|) over `trials` standard normals, dependent or not (Bonferroni)."""
    return min(1.0, trials * normal_tail(z))


def chi_square_tail(x: float, degrees: int) -> float:
    """P(X >= x) of chi-square with `degrees`: Q(a + 1, y) = Q(a, y) + y^a e^-y / gamma(a + 1), from Q(1/2) or Q(1)."""
    y = x / 2
    if y <= 0:
        return 1.0
    a = 0.5 if degrees % 2 else 1.0
    tail = math.erfc(math.sqrt(y)) if degrees % 2 else math.exp(-y)
    while a < degrees / 2:
        tail += math.exp(a * math.log(y) - y - math.lgamma(a + 1))
        a += 1
    return min(1.0, tail)


def poisson_tail(count: int, mean: float) -> float:
    """Twice the smaller of P(X <= count) and P(X >= count) of a Poisson variable."""
    at_most = chi_square_tail(2 * mean, 2 * (count + 1))
    at_least = 1 - chi_square_tail(2 * mean, 2 * count) if count else 1.0
    return min(1.0, 2 * min(at_most, at_least))


def kolmogorov_tail(distance: float, count: int) -> float:
    """P(D >= distance) of the Kolmogorov-Smirnov distance of `count` draws, asymptotically."""
    t = distance * math.sqrt(count)
    if t < 0.3:  # the series needs many terms there, and the probability is 1 to 5 digits
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * t) ** 2) for k in range(1, 20)))
