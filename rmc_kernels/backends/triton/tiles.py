"""How a program is cut, for each size, dtype and target: one table, each entry with its reason.

Batch size and sequence length are in no key. Every entry is compiled for every target it names by `make matrix`, which
checks that it fits the target's shared memory. No entry has been timed: no GPU has run them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rmc_kernels.spec import CellSpec

#: Bytes of shared memory that one program may use.
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
#: Fewest rows of a product: the smallest that the hardware multiplies.
LEAST_ROWS = 16
#: Most attended rows of one batch element: they share a tile.
MOST_ROWS = 64


@dataclass(frozen=True)
class Tile:
    """One way to cut the work of a program.

    Attributes:
        rows: of the tile; at least the padded rows of one batch element.
        columns: of a product computed at a time.
        inner: of a product's inner dimension at a time; the whole of it keeps the operand in registers.
        head: most columns of a head at a time.
        warps, stages: Triton's options.
    """

    rows: int
    columns: int
    inner: int
    head: int
    warps: int
    stages: int

    def head_columns(self, size: int) -> int:
        """Columns at a time of a head's part of `size` columns; a product takes no fewer than 16."""
        return max(LEAST_ROWS, min(self.head, _power_of_two(size)))


def padded_rows(spec: CellSpec) -> int:
    """Rows of one batch element in a tile: the attended ones, padded to a power of two."""
    return _power_of_two(live_rows(spec))


def live_rows(spec: CellSpec) -> int:
    """Rows of one batch element in a tile."""
    return spec.total_rows if input_rows_in_tile(spec) else spec.mem_slots


def input_rows_in_tile(spec: CellSpec) -> bool:
    """Whether input rows are rows of the tile: where there are several, or where what becomes of them counts.

    One input row whose own attention output is unused counts by its key and value alone, which are known beforehand.
    """
    return spec.input_rows_live or spec.rows > 1


PROJECTION = Tile(rows=64, columns=64, inner=32, head=0, warps=4, stages=3)


def choose(spec: CellSpec, dtype: torch.dtype) -> Tile:
    return Tile(max(LEAST_ROWS, padded_rows(spec)), 32, max(16, min(256, _power_of_two(spec.mem_size))), 32, 4, 2)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
