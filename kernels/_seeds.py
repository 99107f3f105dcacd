"""Seeds and other arguments that every noise op takes."""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

#: Names of the distributions and the low byte of the counter's fourth word.
DISTRIBUTIONS = {"normal": 0, "rademacher": 1, "uniform": 2}

Seed = int | Tensor


def signed(value: int) -> int:
    """`value` modulo 2^64, as a signed 64-bit integer."""
    return (value + 2**63) % 2**64 - 2**63


def seed_for(run_seed: int, name: str) -> int:
    """The seed of one use of noise in a run: a hash of the run's seed and a name, equal on every platform and version.

    Args:
        run_seed: any Python int.
        name: the use, such as "decoder.layer.3.dropout".

    Returns:
        A signed 64-bit integer. The seed of a step is this plus the step modulo 2^64, which int64 tensor arithmetic
        gives too, so a counter on the device makes the same seeds.
    """
    if not isinstance(run_seed, int) or isinstance(run_seed, bool):
        raise TypeError(f"run_seed: expected an int, got {type(run_seed).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    digest = hashlib.blake2b(f"{run_seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def check_seed(seed: Seed, device: torch.device, *, population: bool = True) -> None:
    """Raise unless `seed` is an int, or an int64 tensor, 0-dim or [P], on `device` (0-dim may be on the CPU)."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int64 tensor, got {seed.dtype}")
        if seed.dim() > 1:
            raise ValueError(f"seed: expected a 0-dim or [P] tensor, got shape {tuple(seed.shape)}")
        if seed.dim() == 1 and not population:
            raise ValueError(f"seed: expected an int or a 0-dim tensor, got shape {tuple(seed.shape)}")
        if seed.device != device and not (seed.dim() == 0 and seed.device.type == "cpu"):
            raise ValueError(f"seed: expected a tensor on {device}, got one on {seed.device}")
    elif not isinstance(seed, (int, torch.SymInt)) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an int or an int64 tensor, got {type(seed).__name__}")


@lru_cache(maxsize=1024)
def _made_once(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def scalar_tensor(value: float, dtype: torch.dtype) -> Tensor:
    """A Python number as a 0-dim tensor on the CPU, which ops on any device take; not to be written to.

    One that was made before is used again, where nothing watches tensors being made: a sixth of the time of a call on a
    small layer goes into making two of them.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.is_inference_mode_enabled()
    )
    return torch.tensor(value, dtype=dtype) if watched else _made_once(value, dtype)


def seed_tensor(seed: Seed) -> Tensor:
    """`seed` as a tensor: a Python int becomes a 0-dim one on the CPU, which ops on any device take."""
    if isinstance(seed, Tensor):
        return seed
    # The comparison spares traced code an arithmetic that overflows 64 bits.
    return scalar_tensor(seed if -(2**63) <= seed < 2**63 else signed(seed), torch.int64)


def check_word(name: str, value: int) -> None:
    """Raise unless `value` is an int in [0, 2^32)."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not 0 <= value < 2**32:
        raise ValueError(f"{name}: expected a value in [0, 2^32), got {value}")


def check_stream(stream: int) -> None:
    """Raise unless `stream` is in [0, 2^32)."""
    check_word("stream", stream)


def domain_of(distribution: str, allowed: tuple[str, ...] = ("normal", "rademacher")) -> int:
    """The domain of a distribution's name."""
    if distribution not in allowed:
        raise ValueError(f"distribution: expected one of {', '.join(allowed)}, got {distribution!r}")
    return DISTRIBUTIONS[distribution]


def check_offset(name: str, value: int) -> None:
    """Raise unless an element offset is in [0, 2^63)."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"{name}: expected a value in [0, 2^63), got {value}")


FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a tensor of one of the four floating-point dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on `dtype` runs in: float64 for itself, float32 for the others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
