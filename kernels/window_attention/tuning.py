"""Measured choices of the window attention kernels. Those of the CPU stand in csrc/cpu, beside what they shape."""

#: The order of backends on a GPU: none has kernels for these ops yet, so the reference runs there.
CUDA_ORDER: tuple[str, ...] = ()
