"""A plain causal transformer: what the systems are compared with."""

from ..systems import System
from .config import PRESETS, BaselineConfig
from .model import Baseline

SYSTEM = System(
    name="baseline",
    summary="a plain causal transformer: RoPE, RMSNorm, SwiGLU, grouped queries",
    config=BaselineConfig,
    presets=PRESETS,
    build=Baseline,
)
