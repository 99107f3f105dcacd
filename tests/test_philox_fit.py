"""The coefficients of the normals are those that fit.py finds."""

import math

import numpy as np

from quaver.kernels.philox import coefficients, fit


def test_the_fit_finds_the_table_exactly():
    for name, values in fit.fit().items():
        table = getattr(coefficients, name)
        assert values == (table if isinstance(table, tuple) else (table,)), name


def test_the_thresholds_are_the_bits_of_the_root_of_a_half():
    assert np.float32(math.sqrt(0.5)).view(np.int32) == coefficients.SQRT_HALF
    assert np.float32(2**24 * math.sqrt(0.5)).view(np.int32) == coefficients.LOG_SPLIT
