"""What a kernel knows of its cell: widths that are part of addresses, and the same as bounds of loops."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl


class Sizes(NamedTuple):
    """Compile-time sizes, in the symbols of docs/cell.md.

    Attributes:
        N: memory slots.
        S: rows attended to, the input rows included.
        D: width of a row.
        K, V: key and value size of a head.
        F: width of the joint query, key and value projection.
        G: width of both gates together; 0 without gates.
        HEADS: heads.
    """

    N: tl.constexpr
    S: tl.constexpr
    D: tl.constexpr
    K: tl.constexpr
    V: tl.constexpr
    F: tl.constexpr
    G: tl.constexpr
    HEADS: tl.constexpr


class Bounds(NamedTuple):
    """D, F, G, heads, K and V as run-time integers: loops with constexpr bounds are unrolled and spill."""

    D: tl.tensor
    F: tl.tensor
    G: tl.tensor
    HEADS: tl.tensor
    K: tl.tensor
    V: tl.tensor
