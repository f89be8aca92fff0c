"""bfloat16 in Triton's interpreter, as a GPU computes it.

The interpreter holds bfloat16 as the 16 bits of its representation. Its `dot` multiplies these bits as integers, and
its cast from float32 cuts the lower bits off instead of rounding (triton 3.6 to 3.9). `launch` installs the two
replacements here when the kernels are interpreted.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# numpy's arrays and scalars, which the interpreter works on; it is no dependency of this package.
Array = Any


def widen(bits: Array) -> Array:
    """float32 values of bfloat16 `bits` (uint16), exactly."""
    return (bits.astype("uint32") << 16).view("float32")


def round_to_nearest(values: Array) -> Array:
    """The bfloat16 bits (uint16) nearest to float32 `values`, ties to even; a NaN stays a NaN."""
    bits = values.view("uint32")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Adding would carry a NaN's mantissa into its exponent and sign.
    nan = values != values
    return (rounded * ~nan + ((bits >> 16) | 0x40) * nan).astype("uint16")


def install() -> None:
    """Make the interpreter's `dot` and casts right for bfloat16; those of other dtypes stay Triton's."""
    builder = InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    @wraps(dot)
    def create_dot(self, a, b, *rest):
        return dot(self, *(_widened(operand) for operand in (a, b)), *rest)

    @wraps(cast)
    def cast_impl(self, src, dst_type):
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(round_to_nearest(src.data), tl.bfloat16)
        return _widened(src) if types == (tl.bfloat16, tl.float32) else cast(self, src, dst_type)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle
