"""Measured choices of the noise stream's kernels."""

#: The order of backends on a GPU. Not measured on one yet: CUDA C++ first, as it is what the emulator checks.
CUDA_ORDER = ("cuda", "triton")
