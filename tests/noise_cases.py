"""What the noise tests share: the SIMD levels of this machine, sources to compare at, and a count of what was compared.

Run as a script, `python tests/noise_cases.py [pytest arguments]` runs the bit-for-bit tests, slow ones too, and says
how many numbers they compared.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from quaver.kernels import _native
from quaver.kernels._library import SIMD_LEVELS, capped_simd, current_simd

#: The levels that this machine can run.
LEVELS = SIMD_LEVELS[: SIMD_LEVELS.index(_native.detected_simd()) + 1]

#: How many numbers `assert_same` has compared, by (what, how).
COMPARED: Counter[tuple[str, str]] = Counter()


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Runs both compiled modules, the ops and `_native`, at exactly `level`."""
    before = _native.current_simd()
    with capped_simd(level):
        _native.cap_simd(level)
        assert (current_simd(), _native.current_simd()) == (level, level)
        try:
            yield
        finally:
            _native.cap_simd(before)


def assert_same(what: str, how: str, got: Tensor, expected: Tensor) -> None:
    """`==` in every element, and the same shape and dtype; a NaN equals nothing."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    if not torch.equal(got, expected):
        wrong = (got != expected).flatten().nonzero().flatten()
        first = int(wrong[0])
        values = f"{got.flatten()[first].item()!r} for {expected.flatten()[first].item()!r}"
        raise AssertionError(f"{what}, {how}: {len(wrong)} of {got.numel()} differ, first at {first}: {values}")
    COMPARED[what, how] += got.numel()


#: Around the groups of 128 that the vector loops make, the tiles of 256, the block 2^32 where the high word of the
#: counter changes (element 2^34 of normals, 2^39 of signs), and the largest offsets.
OFFSETS = (
    *(0, 1, 2, 3, 4, 31, 32, 33, 63, 127, 128, 129, 255, 256, 257, 123457),
    *(2**34 - 1000, 2**34 - 129, 2**34 - 128, 2**34 - 1, 2**34, 2**34 + 1, 3 * 2**34 - 5),
    *(2**39 - 129, 2**39 - 1, 2**39, 2**39 + 127),
    *(2**62 - 129, 2**62 - 1, 2**62, 2**62 + 3, 2**63 - 5000),
)
COUNTS = (0, 1, 2, 3, 5, 31, 127, 128, 129, 255, 383, 1001, 4097)


def sources(seed: int) -> Iterator[tuple[int, int, int, int]]:
    """(seed, stream, offset, count): every offset with every count, seeds and streams at random."""
    random = Random(seed)
    for offset in OFFSETS:
        for count in COUNTS:
            stream = random.choice((0, 1, 2**31, 2**32 - 1, random.getrandbits(32)))
            yield random.getrandbits(64) - 2**63, stream, offset, count


def main() -> None:
    import pytest
    from rich.console import Console
    from rich.table import Table

    sys.modules["noise_cases"] = sys.modules[__name__]  # what the tests import, and count in, is this module
    code = pytest.main([str(Path(__file__).with_name("test_philox.py")), "-q", *sys.argv[1:]])
    table = Table("compared", "how", "numbers")
    for (what, how), count in sorted(COMPARED.items()):
        table.add_row(what, how, f"{count:,}")
    Console().print(table)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
