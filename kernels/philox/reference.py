"""The noise stream in plain PyTorch: what defines it (README.md). Exact integers, and single float32 operations."""

import torch
from torch import Tensor

from .coefficients import COS, LOG, LOG_SPLIT, MINUS_TWO_LOG_TWO, SIN, SQRT_HALF

_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def _wide_product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and low words of a 32 by 32 bit product, without leaving the range of int64."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (middle >> 32), middle & _MASK


def philox_4x32(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10 of Salmon et al. (2011).

    Args:
        counter: four int64 tensors, words in [0, 2^32).
        seed: int64; its low and high words are the key. Broadcasts against the counter.

    Returns:
        Four int64 tensors of words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        high0, low0 = _wide_product(c0, _M0)
        high1, low1 = _wide_product(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def words_of_blocks(block: Tensor, seed: Tensor, stream: int, domain: int) -> Tensor:
    """The words of blocks [..] of a source, as int64 [.., 4]."""
    stream_word, domain_word = torch.full_like(block, stream), torch.full_like(block, domain)
    counter = (block & _MASK, block >> 32 & _MASK, stream_word, domain_word)
    return torch.stack(torch.broadcast_tensors(*philox_4x32(counter, seed)), dim=-1)


def words(element: Tensor, seed: Tensor, stream: int, domain: int) -> Tensor:
    """Word element % 4 of block element // 4, for each element."""
    every = words_of_blocks(element >> 2, seed, stream, domain)
    return every.gather(-1, (element & 3).expand(every.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _scaled_uniform(x: Tensor) -> Tensor:
    return (x >> 8).to(torch.float32) + 0.5


def uniform_of_words(x: Tensor) -> Tensor:
    """u = float32((x >> 8) 2^-24 + 2^-25), in (0, 1]."""
    return _scaled_uniform(x) * 2.0**-24


def normals_of_words(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """R cos and R sin of Box and Muller (1958): R = sqrt(-2 log u(x)), the angle (y >> 8) 2^-24 of a turn."""
    split = _scaled_uniform(x).view(torch.int32) - LOG_SPLIT
    m = ((split & 0x7FFFFF) + SQRT_HALF).view(torch.float32) - 1.0
    p = torch.full_like(m, LOG[-1])
    for coefficient in LOG[-2::-1]:
        p = p * m + coefficient
    # The float32 square root of torch's CPU kernels is not correctly rounded; that of float64, rounded to float32, is.
    r = (p * m + (split >> 23).to(torch.float32) * MINUS_TWO_LOG_TWO).double().sqrt().float()
    quadrant = (y + 0x20000000) & _MASK
    a = ((quadrant >> 7 & 0x7FFFFE) | 0x3F800000).to(torch.int32).view(torch.float32) - 1.5
    z = a * a
    sine, cosine = torch.full_like(z, SIN[-1]), torch.full_like(z, COS[-1])
    for coefficient in SIN[-2::-1]:
        sine = sine * z + coefficient
    for coefficient in (*COS[-2::-1], 1.0):
        cosine = cosine * z + coefficient
    sine = sine * a
    odd = (quadrant & 0x40000000) != 0
    r_cosine = torch.where(((quadrant + 0x40000000) & 0x80000000) != 0, -r, r)
    r_sine = torch.where((quadrant & 0x80000000) != 0, -r, r)
    return r_cosine * torch.where(odd, sine, cosine), r_sine * torch.where(odd, cosine, sine)


def _rademacher(element: Tensor, seed: Tensor, stream: int, domain: int) -> Tensor:
    every = words_of_blocks(element >> 7, seed, stream, domain)
    word = every.gather(-1, (element >> 5 & 3).expand(every.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    return (word >> (element & 31) & 1).to(torch.float32) * 2 - 1


def _normal(element: Tensor, seed: Tensor, stream: int, domain: int) -> Tensor:
    every = words_of_blocks(element >> 2, seed, stream, domain)
    first, second = normals_of_words(every[..., 0], every[..., 1]), normals_of_words(every[..., 2], every[..., 3])
    four = torch.stack((*first, *second), dim=-1)
    return four.gather(-1, (element & 3).expand(four.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def noise(element: Tensor, seed: Tensor, stream: int, domain: int) -> Tensor:
    """epsilon of logical elements (int64, any shape), float32. `seed` (int64) broadcasts against `element`."""
    distribution = domain & 255
    seed = seed.to(element.device)
    if distribution == 0:
        return _normal(element, seed, stream, domain)
    if distribution == 1:
        return _rademacher(element, seed, stream, domain)
    return uniform_of_words(words(element, seed, stream, domain))


def fill(shape: tuple[int, ...], seed: Tensor, stream: int, domain: int, offset: int, device: torch.device) -> Tensor:
    """Elements offset, offset + 1, .. in row-major order, float32 of `shape`, or [P, *shape] for seeds [P]."""
    count = 1
    for size in shape:
        count *= size
    element = torch.arange(offset, offset + count, dtype=torch.int64, device=device).reshape(shape)
    if seed.dim() == 1:
        return noise(element, seed.reshape(-1, *[1] * len(shape)), stream, domain)
    return noise(element, seed, stream, domain)


def keys(count: int, seed: Tensor, stream: int, device: torch.device) -> Tensor:
    """63-bit sorting keys: word pairs (2 e, 2 e + 1) of domain 3, less the last bit, int64 [count]."""
    element = torch.arange(2 * count, dtype=torch.int64, device=device)
    high, low = words(element, seed.to(device), stream, 3).reshape(count, 2).unbind(-1)
    return high << 31 | low >> 1
