"""Parts that several systems are made of."""

from .attention import Attention, LayerCache, causal_mask, empty_cache, place_in_context
from .basic import RMSNorm, SwiGLU, rotary_tables, rotate
from .building import initialize, parameter_count, run_block
from .njx import NJXAttention
from .noise import Dropout, NoiseKeys, Noisy, NoisyLinear
from .spectral import Modulation, SpectralBank, SpectralLinear

__all__ = [
    "Attention",
    "Dropout",
    "LayerCache",
    "Modulation",
    "NJXAttention",
    "NoiseKeys",
    "Noisy",
    "NoisyLinear",
    "RMSNorm",
    "SpectralBank",
    "SpectralLinear",
    "SwiGLU",
    "causal_mask",
    "empty_cache",
    "initialize",
    "parameter_count",
    "place_in_context",
    "rotary_tables",
    "rotate",
    "run_block",
]
