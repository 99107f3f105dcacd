"""PyTorch kernels for transformers whose weights, attention and representations move."""

from quaver.kernels import *  # noqa: F403
from quaver.kernels import __all__ as _ops

__version__ = "0.1.0"
__all__ = ["__version__", *_ops]
