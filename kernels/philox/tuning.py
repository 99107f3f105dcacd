"""Measured choices of the noise stream's kernels."""

#: The order of backends on a GPU. Not measured on one yet: CUDA C++ first, as it is what the emulator checks.
CUDA_ORDER = ("cuda", "triton")

#: Triton: bytes that a thread reads or writes at a time. It owns that many bytes of consecutive elements, and at least
#: one Philox block (four elements: float64 takes two accesses), so that the noise is made where it is used.
TRITON_BYTES = 16
#: Triton: (groups of such elements, warps) of a program, for rows that fit the first and for all others. With fewer
#: groups than threads (AMD: 64 a warp) the compiler passes the noise through shared memory; with two for each NVIDIA
#: thread the chains of one group hide the latency of the other's, and a float32 kernel takes 30 to 40 registers. A row
#: with a sigma of its own is a program at least: the small one wastes less of a narrow row. Not measured on a GPU yet.
TRITON_TILES = ((64, 1), (256, 4))
