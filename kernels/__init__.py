"""quaver's ops: eager references, C++ for the CPU, CUDA C++ and Triton behind torch custom ops."""

if __name__ == "quaver.kernels":
    from ._backends import use_backend, why_not
    from ._seeds import seed_for
    from .dropout.op import dropout
    from .perturb.op import perturb, perturb_, perturbation_gradient, weight_scale
    from .perturbed_linear.layer import PerturbedLinear
    from .perturbed_linear.op import perturbed_linear
    from .philox.op import philox_normal, philox_permutation, philox_rademacher, philox_uniform, philox_words
    from .spectral_linear.op import delta_linear, spectral_coefficients, spectral_delta, spectral_linear
    from .window_attention.decode import NJXCache
    from .window_attention.op import njx_attention, window_attention, window_exchange

    __all__ = [
        "NJXCache",
        "PerturbedLinear",
        "delta_linear",
        "dropout",
        "njx_attention",
        "perturb",
        "perturb_",
        "perturbation_gradient",
        "perturbed_linear",
        "philox_normal",
        "philox_permutation",
        "philox_rademacher",
        "philox_uniform",
        "philox_words",
        "seed_for",
        "spectral_coefficients",
        "spectral_delta",
        "spectral_linear",
        "use_backend",
        "weight_scale",
        "why_not",
        "window_attention",
        "window_exchange",
    ]
else:
    # Hugging Face has a package `kernels` that transformers probes for. Seen from the repository root this folder goes
    # by that name; without a __file__ the probe takes it for the namespace package that it then is.
    __file__ = None  # type: ignore[assignment]
