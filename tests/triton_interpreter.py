"""bfloat16 in Triton's interpreter (3.7.1), which keeps it as 16 bits in a numpy uint16.

As shipped, the cast of a float32 to bfloat16 truncates, casts of anything else convert the bits as an integer, and
arithmetic and dot compute on the bits. `install` makes every cast and dot right. quaver's kernels compute in float32,
so arithmetic on bfloat16 is refused, not emulated: a kernel that forgot a cast fails here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 bits, exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even; NaN stays NaN. float64 and integers are rounded once, too."""
    values = np.asarray(values)
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    bits = single.view(np.uint32)
    if values.dtype != np.float32:
        # Round to odd first: a float32 that has lost something gets an odd last bit and so can't be taken for a tie.
        wide = values.astype(np.float64)
        away = np.abs(single.astype(np.float64)) > np.abs(wide)
        bits = np.where(single == wide, bits, (bits - away) | 1)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), (single.view(np.uint32) >> 16).astype(np.uint16) | np.uint16(0x40), rounded)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _float32_handle(handle: Any) -> Any:
    return TensorHandle(to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    def checked(self: InterpreterBuilder, *arguments: Any) -> Any:
        if any(_is_bfloat16(argument) for argument in arguments) and arguments[-1] not in (*_BITWISE, np.where):
            raise TypeError(f"arithmetic on bfloat16 ({arguments[-1]}): cast to float32 first, as quaver's kernels do")
        return method(self, *arguments)

    return checked


def install() -> None:
    """Patches the interpreter of this process; a second call changes nothing."""
    builder = InterpreterBuilder
    if builder.cast_impl.__module__ == __name__:
        return
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: InterpreterBuilder, source: Any, kind: Any) -> Any:
        if kind.scalar == tl.bfloat16 and not _is_bfloat16(source):
            return TensorHandle(to_bfloat16(source.data), tl.bfloat16)
        if _is_bfloat16(source) and kind.scalar != tl.bfloat16:
            return TensorHandle(to_float32(source.data).astype(interpreter._get_np_dtype(kind)), kind.scalar)
        return cast(self, source, kind)

    def create_dot(self: InterpreterBuilder, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _float32_handle(a), _float32_handle(b), *rest)

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(builder, name, _refusing(getattr(builder, name)))
