"""The noise stream as ops: words, normals, uniforms, signs and permutations (README.md)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops
from .._backends import choose, transformed
from .._seeds import FLOATING, Seed, check_offset, check_seed, check_stream, check_word, domain_of, seed_tensor
from . import reference
from .tuning import CUDA_ORDER

_TRITON = "quaver.kernels.philox.triton_kernels"


def _no_result(*_: object) -> None:
    return None


# Ops that fill a tensor rather than return one: what they write needs no tensor input, and the output's device decides
# where they run.
_ops.define(
    "philox_fill_(Tensor(a!) out, Tensor seed, int stream, int domain, SymInt offset) -> ()", _no_result, _TRITON
)
_ops.define(
    "philox_words_(Tensor(a!) out, Tensor seed, int stream, int domain, int block, int word) -> ()", _no_result, _TRITON
)
_ops.define("philox_keys_(Tensor(a!) out, Tensor seed, int stream) -> ()", _no_result, _TRITON)


def _resolve(device: torch.device | str | None) -> torch.device:
    if device is None:
        # Traced code cannot ask for the default device, but for that of a new tensor.
        return torch.empty(0).device if torch.compiler.is_compiling() else torch.get_default_device()
    resolved = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if resolved == torch.device("cuda") else resolved


def _check_shape(shape: Sequence[int] | int) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, (int, torch.SymInt)) else tuple(shape)
    for size in sizes:
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(f"shape: expected ints, got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"shape: expected sizes of 0 or more, got {sizes}")
    return sizes


def _fill(
    shape: Sequence[int] | int,
    seed: Seed,
    stream: int,
    domain: int,
    offset: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    sizes, where = _check_shape(shape), _resolve(device)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}")
    check_seed(seed, where)
    check_stream(stream)
    check_offset("offset", offset)
    seeds = seed_tensor(seed)
    backend = "reference" if transformed() else choose(where, CUDA_ORDER)
    if backend == "reference":
        return reference.fill(sizes, seeds, stream, domain, offset, where).to(dtype)
    out = torch.empty((*seeds.shape, *sizes), dtype=dtype, device=where)
    _ops.overload("philox_fill_", backend)(out, seeds, stream, domain, offset)
    return out


def philox_normal(
    shape: Sequence[int] | int,
    seed: Seed,
    *,
    stream: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals from the noise stream: the same bits on every device and backend.

    Args:
        shape: of one source's noise, row-major; an int is a 1-d shape.
        seed: an int (taken modulo 2^64), or an int64 tensor, 0-dim or [P] for P sources at once.
        stream: an independent stream, in [0, 2^32).
        offset: the number of the first element: `philox_normal(n, s, offset=k)` is `philox_normal(k + n, s)[k:]`.
        dtype: float64 widens the float32 normals, bfloat16 and float16 round them to nearest even.
        device: torch's default device when None.

    Returns:
        [*shape], or [P, *shape]. The largest magnitude that occurs is 5.89.

    Raises:
        TypeError, ValueError: for arguments out of range, naming the argument.

    The transform is Box and Muller's (1958), of Philox-4x32-10 words (Salmon et al. 2011); README.md has the bits.
    """
    return _fill(shape, seed, stream, domain_of("normal"), offset, dtype, device)


def philox_uniform(
    shape: Sequence[int] | int,
    seed: Seed,
    *,
    stream: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms in (0, 1] from the noise stream: (x >> 8) 2^-24 + 2^-25 of each word x, rounded to float32.

    The arguments, result and errors are those of `philox_normal`.
    """
    return _fill(shape, seed, stream, domain_of("uniform", ("uniform",)), offset, dtype, device)


def philox_rademacher(
    shape: Sequence[int] | int,
    seed: Seed,
    *,
    stream: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Signs, -1 or 1 with equal probability, from the noise stream: one bit an element.

    The arguments, result and errors are those of `philox_normal`.
    """
    return _fill(shape, seed, stream, domain_of("rademacher"), offset, dtype, device)


def philox_words(
    count: int,
    seed: Seed,
    *,
    stream: int = 0,
    offset: int = 0,
    domain: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Raw words of Philox-4x32-10: word (offset + i) % 4 of block (offset + i) // 4.

    Args:
        count: how many.
        seed: as in `philox_normal`.
        stream: the counter's third word, in [0, 2^32).
        offset: the number of the first word.
        domain: the counter's fourth word, in [0, 2^32).
        device: torch's default device when None.

    Returns:
        int64 [count], or [P, count], each in [0, 2^32).

    Raises:
        TypeError, ValueError: for arguments out of range, naming the argument.
    """
    (size,), where = _check_shape(count), _resolve(device)
    check_seed(seed, where)
    check_stream(stream)
    check_offset("offset", offset)
    check_word("domain", domain)
    seeds = seed_tensor(seed)
    backend = "reference" if transformed() else choose(where, CUDA_ORDER)
    if backend == "reference":
        element = torch.arange(offset, offset + size, dtype=torch.int64, device=where)
        return reference.words(
            element, seeds.to(where).unsqueeze(-1) if seeds.dim() else seeds.to(where), stream, domain
        )
    out = torch.empty((*seeds.shape, size), dtype=torch.int64, device=where)
    _ops.overload("philox_words_", backend)(out, seeds, stream, domain, offset // 4, offset % 4)
    return out


def philox_permutation(n: int, seed: Seed, *, stream: int = 0, device: torch.device | str | None = None) -> Tensor:
    """A uniformly drawn permutation of 0 .. n - 1: the order of n 63-bit keys from the noise stream.

    Args:
        n: how many.
        seed: an int (taken modulo 2^64), or a 0-dim int64 tensor.
        stream: an independent stream, in [0, 2^32).
        device: torch's default device when None.

    Returns:
        int64 [n].

    Raises:
        TypeError, ValueError: for arguments out of range, naming the argument.
    """
    (count,), where = _check_shape(n), _resolve(device)
    check_seed(seed, where, population=False)
    check_stream(stream)
    seeds = seed_tensor(seed)
    backend = "reference" if transformed() else choose(where, CUDA_ORDER)
    if backend == "reference":
        keys = reference.keys(count, seeds, stream, where)
    else:
        keys = torch.empty(count, dtype=torch.int64, device=where)
        _ops.overload("philox_keys_", backend)(keys, seeds, stream)
    return keys.argsort(stable=True)
