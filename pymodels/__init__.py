"""Transformer systems built on quaver's kernels."""
