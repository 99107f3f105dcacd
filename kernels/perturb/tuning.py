"""Measured choices of the perturb kernels."""


def cuda_order(elements: int) -> tuple[str, ...]:
    """The order of backends on a GPU, by the elements of a weight; measured on an H100 (docs/gpu.md).

    Triton takes 0.62 to 0.65 of CUDA C++'s time for a large perturbed weight; but its launches cost the host more,
    which the 4 us that it saves on 2 M elements would not pay.
    """
    return ("triton", "cuda") if elements >= 2**22 else ("cuda", "triton")


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
