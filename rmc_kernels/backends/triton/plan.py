"""What a kernel is compiled for: one immutable value, given to it as a single compile-time argument."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import cache
from hashlib import sha256


@dataclass(frozen=True)
class Blocks:
    """How products are cut.

    Attributes:
        rows: of the tile, `R`.
        columns: of a product computed at a time.
        inner: of a product's inner dimension at a time; where that is all of it, the left side is loaded only once.
        stages: of the pipeline that loads weights.
        precision: of float32 products, "ieee" or "tf32".
    """

    rows: int
    columns: int
    inner: int
    stages: int
    precision: str


@dataclass(frozen=True)
class Plan:
    """The cell and the tile of the forward kernel; sizes in the symbols of docs/cell.md.

    Attributes:
        N, n: memory slots, input rows.
        D: width of a row.
        K, V: key and value size of a head.
        heads: how many.
        G: width of both gates together; 0 without gates.
        layers: of the MLP.
        residual: whether the attention's input is added to its output.
        ends_in_relu: whether a ReLU follows the last MLP layer.
        inputs_in_tile: whether input rows are rows of the tile.
        padded: rows of a batch element in the tile, padded to a power of two.
        blocks: how products are cut.
        key_columns, value_columns: of a head at a time; at least 16.
    """

    N: int
    n: int
    D: int
    K: int
    V: int
    heads: int
    G: int
    layers: int
    residual: bool
    ends_in_relu: bool
    inputs_in_tile: bool
    padded: int
    blocks: Blocks
    key_columns: int
    value_columns: int

    @property
    def cache_key(self) -> str:
        """Triton's cache key of this plan, in memory and on disk.

        Includes the source of the properties: a kernel contains their values, so a changed offset must recompile it.
        """
        return f"{self!r} {_source(*(each.__module__ for each in type(self).__mro__[:-1]))}"

    @property
    def S(self) -> int:
        """Rows attended to."""
        return self.N + self.n

    @property
    def F(self) -> int:
        """Width of the joint query, key and value projection."""
        return self.heads * (2 * self.K + self.V)

    @property
    def live(self) -> int:
        """Rows of a batch element in the tile."""
        return self.S if self.inputs_in_tile else self.N


@cache
def _source(*modules: str) -> str:
    """A digest of some modules."""
    return sha256("".join(inspect.getsource(sys.modules[name]) for name in modules).encode()).hexdigest()
