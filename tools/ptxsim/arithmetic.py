"""What PTX computes and numpy does not: half types, saturating conversions, bit fields. On arrays or scalars alike.

Registers are unsigned integers; a function says what it reads them as.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: What a register holds: an array [threads], or a numpy scalar where all threads hold the same.
Value = Any

_SMALLEST_NORMAL = np.float32(np.finfo(np.float32).tiny)


def from_bf16(bits: Value) -> Value:
    """float32 of uint16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Value) -> Value:
    """uint16 bits of float32, rounded to nearest even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_f16(bits: Value) -> Value:
    """float32 of uint16 bits."""
    return bits.view(np.float16).astype(np.float32)


def to_f16(x: Value) -> Value:
    """uint16 bits of float32, rounded to nearest even."""
    return x.astype(np.float16).view(np.uint16)


def to_tf32(x: Value) -> Value:
    """uint32 bits of float32 rounded to 10 mantissa bits, ties away from zero (cvt.rna)."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def low(x: Value) -> Value:
    """The low half of uint32 as uint16."""
    return x.astype(np.uint16)


def high(x: Value) -> Value:
    """The high half of uint32 as uint16."""
    return (x >> np.uint32(16)).astype(np.uint16)


def pack(low: Value, high: Value) -> Value:
    """uint32 of two uint16."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def fma(a: Value, b: Value, c: Value) -> Value:
    """`a * b + c` of float32, rounded once (twice, with a chance of 2**-29: float64 holds every product exactly)."""
    y = a.astype(np.float64)
    y = y * b
    y = y + c
    return y.astype(np.float32)


def flush(x: Value) -> Value:
    """Subnormal float32 to zeros of the same sign (.ftz)."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def to_integer(x: Value, dtype: npt.DTypeLike) -> Value:
    """Float to integer: truncates, saturates, NaN becomes 0."""
    limits = np.iinfo(np.dtype(dtype))
    y = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0)
    inside = np.clip(y, float(limits.min), np.nextafter(float(limits.max), 0.0)).astype(dtype)
    return np.where(y >= float(limits.max), limits.max, inside).astype(dtype)


def extract_bits(a: Value, start: Value, length: Value) -> Value:
    """bfe: `length` bits of `a` from `start` on; sign-extended where the dtype is signed."""
    width = a.dtype.itemsize * 8
    unsigned = np.uint32 if width == 32 else np.uint64
    bits = a.view(unsigned)
    start, length = (start & np.uint32(255)).astype(unsigned), (length & np.uint32(255)).astype(unsigned)
    mask = np.where(length >= width, ~unsigned(0), (unsigned(1) << length) - unsigned(1))
    field = (bits >> start) & mask
    if a.dtype.kind == "i":
        top = np.minimum(start + length - unsigned(1), unsigned(width - 1))
        negative = (length > 0) & ((bits >> top) & unsigned(1)).astype(bool)
        field = np.where(negative, field | ~mask, field)
    return field.astype(unsigned)


def permute_bytes(a: Value, b: Value, selector: Value) -> Value:
    """prmt: each nibble of `selector` picks one of the eight bytes of (b, a), or its sign with bit 3."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.uint32(0)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result = result | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i))
    return np.asarray(result)
