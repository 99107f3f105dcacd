"""Measured choices of the perturb kernels."""

#: The order of backends on a GPU. Not measured on one yet: CUDA C++ first, as it is what the emulator checks.
CUDA_ORDER = ("cuda", "triton")

#: Triton: elements that a thread owns in the sum of a population's signs. They are bits of one word, so Philox runs
#: once for 16 elements and member instead of 4. Nothing is read but coefficients and seeds, and the result is written
#: once.
TRITON_SIGNS = 16
#: Triton: partial sums that a reduction aims at: several programs for each processor of any GPU, and few enough for one
#: program to add them.
TRITON_PARTIALS = 4096
#: Triton: partial sums that a program adds at a time.
TRITON_SUM_BLOCK = 1024
#: Triton: elements of a block of weight_scale and of its gradient: 32 a thread on NVIDIA, held in registers between the
#: two passes (sm_90: 58 registers for float32, 112 for float64).
TRITON_SCALE_BLOCK = 4096
