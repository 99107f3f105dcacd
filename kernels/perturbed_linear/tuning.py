"""Measured choices of perturbed_linear. Those of the CPU are constants of csrc/cpu/gemm.h: the README has the table."""

#: The order of backends on a GPU: there is no kernel for one yet.
CUDA_ORDER: tuple[str, ...] = ()
#: The backends without a kernel, and why.
MISSING = {
    "cuda": "perturbed_linear has no CUDA C++ kernel yet",
    "triton": "perturbed_linear has no Triton kernel yet",
}
