"""The noise stream in Triton: the device functions that every kernel with noise is made of, and the philox ops.

A thread makes the noise of the WIDTH consecutive elements that it loads and stores. Groups of WIDTH elements are
counted in the stream, not in the tensor: a tensor that starts in the middle of a group has its first elements masked
off, and is read and written an element at a time, its noise by way of shared memory (4 KiB and 5 barriers a program,
577 instructions for 472).
"""

import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from . import coefficients, tuning

NORMAL = tl.constexpr(0)
RADEMACHER = tl.constexpr(1)
UNIFORM = tl.constexpr(2)
KEYS = tl.constexpr(3)
WORDS = tl.constexpr(4)

_LOG = tl.constexpr(coefficients.LOG)
_SIN = tl.constexpr(coefficients.SIN)
_COS = tl.constexpr(coefficients.COS)
_MINUS_TWO_LOG_TWO = tl.constexpr(coefficients.MINUS_TWO_LOG_TWO)
_LOG_SPLIT = tl.constexpr(coefficients.LOG_SPLIT)
_SQRT_HALF = tl.constexpr(coefficients.SQRT_HALF)


@triton.jit
def philox(block, stream, domain, low, high):
    """The four words of each block (uint64); the other arguments are uint32 scalars. A 64-bit product
    gives both of its words: umulhi and a 32-bit product take 5 % more instructions (sm_80, normals: 497 for 472)."""
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = stream
    c3 = domain
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ low
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ high
        c3 = p0.to(tl.uint32)
        low += 0x9E3779B9
        high += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def scaled_uniform(x):
    return (x >> 8).to(tl.int32).to(tl.float32) + 0.5


@triton.jit
def uniform(x):
    return scaled_uniform(x) * 2.0**-24


@triton.jit
def normal_pair(x, y):
    """csrc/common/normal.h's normal_pair, statement by statement: each operation is rounded once, none is fused."""
    split = scaled_uniform(x).to(tl.uint32, bitcast=True) - _LOG_SPLIT
    exponent = (split.to(tl.int32, bitcast=True) >> 23).to(tl.float32)
    m = ((split & 0x7FFFFF) + _SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
    p = m * _LOG[6] + _LOG[5]
    p = p * m + _LOG[4]
    p = p * m + _LOG[3]
    p = p * m + _LOG[2]
    p = p * m + _LOG[1]
    p = p * m + _LOG[0]
    radius = tl.sqrt_rn(p * m + exponent * _MINUS_TWO_LOG_TWO).to(tl.uint32, bitcast=True)
    quadrant = y + 0x20000000
    a = (((quadrant >> 7) & 0x7FFFFE) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    z = a * a
    s = z * _SIN[3] + _SIN[2]
    s = s * z + _SIN[1]
    s = s * z + _SIN[0]
    s = s * a
    c = z * _COS[2] + _COS[1]
    c = c * z + _COS[0]
    c = c * z + 1.0
    odd = (quadrant & 0x40000000) != 0
    cosine_radius = (radius ^ ((quadrant + 0x40000000) & 0x80000000)).to(tl.float32, bitcast=True)
    sine_radius = (radius ^ (quadrant & 0x80000000)).to(tl.float32, bitcast=True)
    return cosine_radius * tl.where(odd, s, c), sine_radius * tl.where(odd, c, s)


@triton.jit
def four_elements(block, stream, domain, low, high, KIND: tl.constexpr):
    """Elements 4 block .. 4 block + 3, each in a tensor of block's shape."""
    x0, x1, x2, x3 = philox(block, stream, domain, low, high)
    if KIND == NORMAL:
        z0, z1 = normal_pair(x0, x1)
        z2, z3 = normal_pair(x2, x3)
    elif KIND == UNIFORM:
        z0 = uniform(x0)
        z1 = uniform(x1)
        z2 = uniform(x2)
        z3 = uniform(x3)
    else:
        z0 = x0
        z1 = x1
        z2 = x2
        z3 = x3
    return z0, z1, z2, z3


@triton.jit
def elements(group, stream, domain, low, high, KIND: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Elements WIDTH group .. WIDTH group + WIDTH - 1 of each of consecutive groups, in order, [SIZE].

    join makes the innermost index, so the bits of an element's number are joined from the highest to the lowest. In
    this form the compiler keeps every element in the thread that made it."""
    if KIND == RADEMACHER:
        # A thread's elements are bits of one word: Philox runs once for WIDTH of them.
        each: tl.constexpr = 128 // WIDTH  # groups of a block
        x0, x1, x2, x3 = philox(group // each, stream, domain, low, high)
        within = (group % each).to(tl.uint32) * WIDTH
        low_words = tl.where((within & 32) != 0, x1, x0)
        high_words = tl.where((within & 32) != 0, x3, x2)
        bits = tl.where((within & 64) != 0, high_words, low_words) >> (within & 31)
        if WIDTH >= 16:
            bits = tl.join(bits, bits >> 8)
        if WIDTH >= 8:
            bits = tl.join(bits, bits >> 4)
        bits = tl.join(bits, bits >> 2)
        bits = tl.join(bits, bits >> 1)
        made = ((bits << 31) ^ 0xBF800000).to(tl.float32, bitcast=True)  # -1 with its sign flipped by a 1
    elif KIND == KEYS:
        x0, x1, x2, x3 = philox(group, stream, domain, low, high)
        first = ((x0.to(tl.uint64) << 32) | x1.to(tl.uint64)) >> 1
        second = ((x2.to(tl.uint64) << 32) | x3.to(tl.uint64)) >> 1
        made = tl.join(first, second)
    elif WIDTH == 4:
        a0, a1, a2, a3 = four_elements(group, stream, domain, low, high, KIND)
        made = tl.join(tl.join(a0, a2), tl.join(a1, a3))
    else:
        a0, a1, a2, a3 = four_elements(group * 2, stream, domain, low, high, KIND)
        b0, b1, b2, b3 = four_elements(group * 2 + 1, stream, domain, low, high, KIND)
        made = tl.join(tl.join(tl.join(a0, b0), tl.join(a2, b2)), tl.join(tl.join(a1, b1), tl.join(a3, b3)))
    return tl.reshape(made, (SIZE,))


@triton.jit
def tile_place(tile, row, row_length, group, skip, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """The groups of a tile of a row (uint64 [GROUPS]) and the columns of their elements (int64 [GROUPS * WIDTH]).

    Row 0 starts at element `skip` of group `group`, and a row is `row_length` elements of the stream after the last."""
    start = skip + row * row_length
    first = start // WIDTH + tl.cast(tile, tl.int64) * GROUPS
    groups = (group + first + tl.arange(0, GROUPS)).to(tl.uint64)
    columns = first * WIDTH - start + tl.arange(0, GROUPS * WIDTH)
    return groups, columns


@triton.jit
def key_of(seeds, member, low, high):
    """A member's key (two uint32 words): seeds[member], or the two words if seeds is None."""
    if seeds is None:
        key_low = low.to(tl.uint32, bitcast=True)
        key_high = high.to(tl.uint32, bitcast=True)
    else:
        seed = tl.load(seeds + member)
        key_low = seed.to(tl.uint32)
        key_high = (seed >> 32).to(tl.uint32)
    return key_low, key_high


@triton.jit
def noise(
    groups, seeds, member, low, high, stream, domain, KIND: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    """The elements of `groups` of a member's source. Its seed is seeds[member], or the two words if seeds is None."""
    key_low, key_high = key_of(seeds, member, low, high)
    stream_word = stream.to(tl.uint32, bitcast=True)
    domain_word = domain.to(tl.uint32, bitcast=True)
    return elements(groups, stream_word, domain_word, key_low, key_high, KIND, WIDTH, SIZE)


@triton.jit
def noise_of(element, stream, domain, low, high, KIND: tl.constexpr):
    """Single elements (uint64), wherever they are: a block of Philox each, for the few of a bias."""
    stream_word = stream.to(tl.uint32, bitcast=True)
    domain_word = domain.to(tl.uint32, bitcast=True)
    if KIND == RADEMACHER:
        x0, x1, x2, x3 = philox(element >> 7, stream_word, domain_word, low, high)
        within = (element & 127).to(tl.uint32)
    else:
        x0, x1, x2, x3 = four_elements(element >> 2, stream_word, domain_word, low, high, KIND)
        within = (element & 3).to(tl.uint32) << 5
    first = tl.where((within & 32) != 0, x1, x0)
    second = tl.where((within & 32) != 0, x3, x2)
    made = tl.where((within & 64) != 0, second, first)
    if KIND == RADEMACHER:
        made = (((made >> (within & 31)) << 31) ^ 0xBF800000).to(tl.float32, bitcast=True)
    return made


@triton.jit
def scalar(low, high, compute: tl.constexpr):
    """A floating-point value that the host knows, from the words that `scalar_words` makes of it."""
    if compute == tl.float64:
        bits = (high.to(tl.int64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64)
        value = bits.to(tl.float64, bitcast=True)
    else:
        value = low.to(tl.float32, bitcast=True)
    return value


#: Parameters whose values change from call to call: they must not make Triton compile anew.
CALL_VALUES = ("low", "high", "stream", "domain", "group")
#: Counts, which Triton specializes for 1 only.
COUNTS = ("members", "rows", "tiles")


@triton.jit(do_not_specialize=CALL_VALUES, do_not_specialize_on_alignment=COUNTS)
def fill_kernel(
    out,
    seeds,
    low: tl.int32,
    high: tl.int32,
    stream: tl.int32,
    domain: tl.int32,
    group: tl.int64,
    skip: tl.int64,
    count: tl.int64,
    tiles: tl.int32,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out [members, count]: each member's elements from element `skip` of group `group` on."""
    member = (tl.program_id(0) // tiles).to(tl.int64)
    groups, column = tile_place(tl.program_id(0) % tiles, 0, 0, group, skip, WIDTH, GROUPS)
    made = noise(groups, seeds, member, low, high, stream, domain, KIND, WIDTH, GROUPS * WIDTH)
    tl.store(out + member * count + column, made.to(out.dtype.element_ty), mask=(column >= 0) & (column < count))


def int32(value: int) -> int:
    """`value` modulo 2^32, as a signed 32-bit integer: of one type for Triton whatever its size."""
    return (value + 2**31) % 2**32 - 2**31


def scalar_words(value: float, dtype: torch.dtype) -> tuple[int, int]:
    """The words of `value` in the type that arithmetic on `dtype` runs in: Triton has no float64 parameters."""
    if dtype == torch.float64:
        low, high = struct.unpack("<ii", struct.pack("<d", value))
        return low, high
    return struct.unpack("<i", struct.pack("<f", value))[0], 0


class SourceArguments(NamedTuple):
    """The kernels' parameters seeds, low, high, stream and domain."""

    seeds: Tensor | None
    low: int
    high: int
    stream: int
    domain: int


def source_arguments(seed: Tensor, stream: int, domain: int) -> SourceArguments:
    """A 0-dim CPU seed goes by value, as two words; any other is read on the device."""
    if seed.dim() == 0 and seed.device.type == "cpu":
        value = int(seed.item())
        return SourceArguments(None, int32(value), int32(value >> 32), int32(stream), int32(domain))
    return SourceArguments(seed.contiguous(), 0, 0, int32(stream), int32(domain))


def width_of(dtype: torch.dtype) -> int:
    """Elements of a thread's group: one access, and at least one Philox block."""
    return max(4, tuning.TRITON_BYTES // dtype.itemsize)


def tile_shape(columns: int, width: int) -> tuple[int, int]:
    """Groups and warps of a program for rows of `columns` elements."""
    small, large = tuning.TRITON_TILES
    return small if columns <= small[0] * width else large


def noise_options(kind: int, width: int, columns: int) -> dict[str, Any]:
    """The kernels' constexprs and options."""
    groups, warps = tile_shape(columns, width)
    return {"KIND": kind, "WIDTH": width, "GROUPS": groups, "num_warps": warps}


def tiles_of(columns: int, aligned: bool, width: int) -> int:
    """Tiles that cover a row; one that may start inside a group covers one more group."""
    groups, _ = tile_shape(columns, width)
    return -(-(columns + (0 if aligned else width - 1)) // (width * groups))


def _fill(out: Tensor, seed: Tensor, stream: int, domain: int, kind: int, width: int, group: int, skip: int) -> None:
    if out.numel() == 0:
        return
    members = seed.numel()
    count = out.numel() // members
    tiles = tiles_of(count, skip == 0, width)
    source = source_arguments(seed, stream, domain)
    options = noise_options(kind, width, count)
    launch(fill_kernel, (members * tiles,), out, *source, group, skip, count, tiles, **options)


def philox_fill_(out: Tensor, seed: Tensor, stream: int, domain: int, offset: int) -> None:
    """torch.ops.quaver.philox_fill_ in Triton."""
    width = width_of(out.dtype)
    _fill(out, seed, stream, domain, domain & 255, width, offset // width, offset % width)


def philox_words_(out: Tensor, seed: Tensor, stream: int, domain: int, block: int, word: int) -> None:
    """torch.ops.quaver.philox_words_ in Triton."""
    _fill(out, seed, stream, domain, WORDS.value, 4, block, word)


def philox_keys_(out: Tensor, seed: Tensor, stream: int) -> None:
    """torch.ops.quaver.philox_keys_ in Triton."""
    _fill(out, seed, stream, KEYS.value, KEYS.value, 2, 0, 0)


def report_launches() -> None:
    """Launches every variant that the resource report should know."""
    seed, seeds = torch.tensor(1 << 40), torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        philox_fill_(torch.empty(4096, dtype=dtype), seed, 0, 0, 0)
    for kind in (RADEMACHER.value, UNIFORM.value):
        for dtype in (torch.float32, torch.bfloat16):
            philox_fill_(torch.empty(4096, dtype=dtype), seed, 0, kind, 0)
    philox_fill_(torch.empty(2, 4096), seeds, 0, 0, 0)
    philox_fill_(torch.empty(256), seed, 0, 0, 0)
    philox_words_(torch.empty(4096, dtype=torch.int64), seed, 0, 0, 0, 0)
    philox_keys_(torch.empty(4096, dtype=torch.int64), seed, 0)
