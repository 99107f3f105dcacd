"""Choices of the window attention kernels. Those of the CPU stand in csrc/cpu, beside what they shape."""

import torch

#: The order of backends on a GPU. Nothing of it was measured on a card yet.
CUDA_ORDER: tuple[str, ...] = ("cuda",)


def cuda_width(dtype: torch.dtype) -> int:
    """The CUDA kernels' largest head width: the sums of wider heads would not fit a thread's 255 registers."""
    return 32 if dtype == torch.float64 else 128
