"""Matrices spread over a warp: which thread's register holds which element, and `mma` (PTX ISA 9.7.14).

Registers come as [registers][warps * 32] uint32. Sums are float64, rounded once: a tensor core's own order and
rounding are not documented.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from tools.ptxsim.arithmetic import Array, from_bf16, from_f16

_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


def multiply(kind: str, inner: int, a: Sequence[Array], b: Sequence[Array], c: Sequence[Array]) -> list[Array]:
    """Registers of `a b + c`, of the shape m16n8k`inner`, for every warp.

    Args:
        kind: of a and b: "f16", "bf16" or "tf32"; c and the result are float32.
        inner: k.
        a, b, c: registers.
    """
    left, right, places = _layout(kind, inner)
    x = _elements(kind, a)[:, left].reshape(-1, 16, inner)
    y = _elements(kind, b)[:, right].reshape(-1, inner, 8)
    product = np.matmul(x, y).reshape(-1, 128) + _words(c).view(np.float32)[:, np.argsort(places)]
    found = np.ascontiguousarray(product.astype(np.float32)[:, places]).view(np.uint32).reshape(-1, 4, 32)
    return list(found.transpose(1, 0, 2).reshape(4, -1))


def _words(registers: Sequence[Array]) -> Array:
    """[warps, registers * 32]."""
    stacked = np.stack(registers).reshape(len(registers), -1, 32)
    return np.ascontiguousarray(stacked.transpose(1, 0, 2)).reshape(stacked.shape[1], -1)


def _elements(kind: str, registers: Sequence[Array]) -> Array:
    """[warps, elements] float64; a tensor core ignores the last 13 bits of TF32."""
    words = _words(registers)
    if kind == "tf32":
        values = (words & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        values = {"bf16": from_bf16, "f16": from_f16}[kind](words.view(np.uint16))
    wide: Array = values.astype(np.float64)
    return wide


@cache
def _layout(kind: str, inner: int) -> tuple[Array, Array, Array]:
    """For a and b, where in `_elements` each element of the matrix is; for d, which element each register holds."""
    per_register = 1 if kind == "tf32" else 2
    across = 4 * per_register  # columns of `a` that one register of each thread in a group covers
    left, right = [], []
    for part in range(inner // across):
        for half in (0, 8):
            left += [
                (_GROUP[lane] + half) * inner + _IN_GROUP[lane] * per_register + element + part * across
                for lane in range(32)
                for element in range(per_register)
            ]
        right += [
            (_IN_GROUP[lane] * per_register + element + part * across) * 8 + _GROUP[lane]
            for lane in range(32)
            for element in range(per_register)
        ]
    places = np.concatenate([(_GROUP + 8 * (i // 2)) * 8 + _IN_GROUP * 2 + i % 2 for i in range(4)])
    return np.argsort(left), np.argsort(right), places


def to_fragment(rows: Array, transposed: bool) -> Array:
    """Registers [warps, 32] of 8 x 8 matrices of 16 bits [warps, 8, 8], as ldmatrix spreads them."""
    rows = np.ascontiguousarray(rows.transpose(0, 2, 1) if transposed else rows)
    return rows.reshape(-1, 32, 2).view(np.uint32)[:, :, 0]


def from_fragment(registers: Array, transposed: bool) -> Array:
    """The matrices [warps, 8, 8] of registers [warps, 32]: what `to_fragment` undoes."""
    rows = np.ascontiguousarray(registers).view(np.uint16).reshape(-1, 8, 8)
    return rows.transpose(0, 2, 1) if transposed else rows
