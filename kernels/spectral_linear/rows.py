"""Rows of the speed table of spectral_linear."""

from .._cases import Row

ROWS: list[Row] = []
