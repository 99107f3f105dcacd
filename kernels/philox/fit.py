"""Finds the coefficients in coefficients.py: minimax polynomials, weighted by what their error does to a normal.

    python kernels/philox/fit.py        prints the table

A minimax fit is a least-squares fit whose weights are multiplied by its errors again and again (C. L. Lawson, 1961).
Each coefficient is rounded to float32 at the end; README.md has the error of the float32 arithmetic, which is larger
than that of the polynomials. A fit of another length would be another stream.
"""

import math
import sys

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_POINTS = 4000
_ITERATIONS = 200


def _minimax(x: Floats, y: Floats, weight: Floats, degree: int) -> Floats:
    """The polynomial of `degree` in x, lowest power first, whose largest weight * |p(x) - y| is least."""
    powers = np.stack([x**power for power in range(degree + 1)], axis=1)
    lawson = np.full_like(x, 1 / len(x))
    coefficients = np.zeros(degree + 1)
    for _ in range(_ITERATIONS):
        scale = np.sqrt(lawson) * weight
        coefficients = np.asarray(np.linalg.lstsq(powers * scale[:, None], y * scale, rcond=None)[0], np.float64)
        lawson *= np.abs(powers @ coefficients - y) * weight
        lawson /= lawson.sum()
    return coefficients


def _chebyshev_points() -> Floats:
    """Dense at both ends of [-1, 1], where the error of a polynomial is largest."""
    return np.cos(np.linspace(0, math.pi, _POINTS))


def fit_log() -> Floats:
    """-2 log(1 + m) / m on [sqrt(1/2) - 1, sqrt(2) - 1].

    The radius is r = sqrt(-2 log(1 + m) - 2 exponent log 2), and an error d of log(1 + m) / m moves it by |m| d / r:
    most where the exponent is 0, which comes with m <= 0 only, or -1.
    """
    low, high = math.sqrt(0.5) - 1, math.sqrt(2) - 1
    m = (high - low) / 2 * _chebyshev_points() + (high + low) / 2
    log = np.log1p(m)
    radius_0 = np.sqrt(-2 * np.minimum(log, 0))
    weight_0 = np.where(m < 0, np.abs(m) / np.maximum(radius_0, 1e-9), 0)
    weight_1 = np.abs(m) / np.sqrt(2 * math.log(2) - 2 * log)
    # No point is without weight: near m = 0, where both vanish, the series would be free.
    return -2 * _minimax(m, log / m, np.maximum(np.maximum(weight_0, weight_1), 1e-3), 6)


def fit_sine_and_cosine() -> tuple[Floats, Floats]:
    """sin(pi/2 a) / a and (cos(pi/2 a) - 1) / a^2 as polynomials in a^2 on [0, 1/2], for the least absolute error."""
    a = (_chebyshev_points() + 1) / 4 + 1e-12  # not 0, by which it is divided
    square = a * a
    sine = _minimax(square, np.sin(math.pi / 2 * a) / a, a, 3)
    cosine = _minimax(square, (np.cos(math.pi / 2 * a) - 1) / square, square, 2)
    return sine, cosine


def fit() -> dict[str, tuple[float, ...]]:
    """The table: float32 values, by their names in coefficients.py."""
    sine, cosine = fit_sine_and_cosine()
    table = {"LOG": fit_log(), "SIN": sine, "COS": cosine, "MINUS_TWO_LOG_TWO": np.array([-2 * math.log(2)])}
    return {name: tuple(float(np.float32(value)) for value in values) for name, values in table.items()}


if __name__ == "__main__":
    for name, values in fit().items():
        sys.stdout.write(f"{name} = {', '.join(value.hex() for value in values)}\n")
