"""The coefficients of the normals: one table, read by the reference, C++, CUDA and Triton.

Each is a float32, written exactly. `fit.py` finds them; `README.md` says what they are the coefficients of. A change
here changes the bits of every normal that quaver has ever made.

Run as a script with a path it writes the table as a C++ header there (the build does).
"""

import sys
from pathlib import Path

_f = float.fromhex

#: -2 log(1 + m) = m * P(m) on [sqrt(1/2) - 1, sqrt(2) - 1], lowest power first.
LOG = (
    _f("-0x1.000016p+1"),
    _f("0x1.000302p+0"),
    _f("-0x1.551adcp-1"),
    _f("0x1.fd6c5ap-2"),
    _f("-0x1.a42a88p-2"),
    _f("0x1.83ba08p-2"),
    _f("-0x1.f0712ep-3"),
)
#: sin(pi/2 a) = a * P(a^2) on [-1/2, 1/2].
SIN = (_f("0x1.921fb4p+0"), _f("-0x1.4abba8p-1"), _f("0x1.465a3ep-4"), _f("-0x1.2cf5d2p-8"))
#: cos(pi/2 a) = 1 + a^2 * P(a^2) on [-1/2, 1/2].
COS = (_f("-0x1.3bd3a2p+0"), _f("0x1.03b162p-2"), _f("-0x1.4ea9e6p-6"))
#: -2 log(2)
MINUS_TWO_LOG_TWO = _f("-0x1.62e430p+0")
#: The bits of 2^24 sqrt(1/2) as a float32: splits x = 2^24 u into 2^exponent (1 + m).
LOG_SPLIT = 0x4B3504F3
#: The bits of sqrt(1/2) as a float32.
SQRT_HALF = 0x3F3504F3


def header() -> str:
    """The table as a C++ header."""
    lines = [
        "// Written by kernels/philox/coefficients.py.",
        "#pragma once",
        f"#define QUAVER_LOG_SPLIT {LOG_SPLIT:#x}u",
    ]
    lines.append(f"#define QUAVER_SQRT_HALF {SQRT_HALF:#x}u")
    lines.append(f"#define QUAVER_MINUS_TWO_LOG_TWO {MINUS_TWO_LOG_TWO.hex()}f")
    for name, values in (("LOG", LOG), ("SIN", SIN), ("COS", COS)):
        lines += [f"#define QUAVER_{name}{power} {value.hex()}f" for power, value in enumerate(values)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(header())
