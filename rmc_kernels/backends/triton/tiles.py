"""How a program is cut: one table keyed by width, dtype and target, each entry with its reason.

Batch size and sequence length are in no key and compile nothing anew; the batch size only picks among the entries of a
key, so that a small batch is spread over more programs. `make matrix` compiles every entry for every target. No entry
has been timed: no GPU has run them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
#: With four wavefronts to a program a lane has 512 registers, with eight 256: then all but the smallest tiles spill.
AMD_WARPS = 4
#: Most attended rows of one batch element: they share a tile.
MOST_ROWS = 64


@dataclass(frozen=True)
class Tile:
    """One way to cut the work of a program.

    Attributes:
        rows: of the tile; at least the padded rows of one batch element.
        columns: of a product computed at a time.
        inner: of a product's inner dimension at a time; the whole of it keeps the left side in registers.
        head: most columns of a head at a time.
        warps, stages: Triton's options.
    """

    rows: int
    columns: int
    inner: int
    head: int
    warps: int
    stages: int

    @property
    def registers(self) -> int:
        """Most registers of a thread on NVIDIA's targets: a processor has 65536 for the threads of a program."""
        return min(255, 65536 // (32 * self.warps))

    def head_columns(self, size: int) -> int:
        """Columns at a time of a head's part of `size` columns; a product takes no fewer than 16."""
        return max(LEAST_ROWS, min(self.head, _power_of_two(size)))

    def fitted(self, width: int) -> Tile:
        """The same for rows of `width`, without columns that a narrow cell would only pad."""
        most = max(LEAST_ROWS, _power_of_two(width))
        return replace(self, columns=min(self.columns, most), inner=min(self.inner, most))


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        width: widest D that it is for.
        wide: whether it is for float32; otherwise for the half types.
        tile: the tile.
        reason: why this one, with what other tiles spilled (stores, sm_80, 8 slots, 4 heads) when it was chosen;
            tools/compile_matrix/compile-matrix.md has what this one takes.
        on_amd: the tile on AMD's targets; None for the same with `AMD_WARPS`.
    """

    width: int
    wide: bool
    tile: Tile
    reason: str
    on_amd: Tile | None = None

    def tile_on(self, target: str) -> Tile:
        """The tile for a target."""
        if target.startswith("gfx"):
            return self.on_amd or replace(self.tile, warps=AMD_WARPS)
        return self.tile


#: Width of the entries that take any.
ANY = 1 << 30
#: Narrow entries first; among those of one width, small tiles first.
TABLE = (
    Entry(64, False, Tile(16, 64, 64, 64, 4, 2), "left side resident, fewest rows"),
    Entry(64, False, Tile(32, 64, 64, 64, 8, 2), "twice the rows at twice the warps; at 4 warps 16 spills"),
    Entry(64, False, Tile(64, 32, 32, 32, 8, 2), "narrow blocks; with 64 columns 19 spills, with 16 warps 36"),
    Entry(128, False, Tile(16, 64, 128, 64, 4, 2), "left side resident, fewest rows"),
    Entry(
        128,
        False,
        Tile(32, 64, 128, 64, 8, 2),
        "left side resident; at 4 warps 15 spills; with 64 columns gfx942: 39",
        on_amd=Tile(32, 32, 128, 64, AMD_WARPS, 2),
    ),
    Entry(128, False, Tile(64, 32, 64, 64, 8, 2), "inner dimension in blocks; 64 resident rows: 31 spills"),
    Entry(256, False, Tile(16, 32, 256, 64, 4, 2), "left side resident, fewest rows"),
    Entry(256, False, Tile(32, 32, 256, 32, 8, 2), "at 4 warps 52 spills"),
    Entry(256, False, Tile(64, 32, 32, 32, 8, 2), "inner dimension in blocks; with blocks of 64 34 spills"),
    Entry(ANY, False, Tile(16, 64, 64, 64, 4, 3), "inner dimension in blocks: a resident row is too wide"),
    Entry(ANY, False, Tile(32, 64, 64, 64, 8, 3), "likewise"),
    Entry(ANY, False, Tile(64, 32, 32, 32, 8, 2), "likewise, as at 256"),
    Entry(ANY, True, Tile(16, 16, 32, 32, 4, 2), "small blocks, as they are unrolled; at 32 columns sm_86 spills 7"),
    Entry(ANY, True, Tile(32, 16, 16, 16, 4, 2), "likewise; at 32 columns sm_86 spills 31"),
    Entry(ANY, True, Tile(64, 16, 16, 16, 8, 2), "likewise; at 32 columns TF32 spills in phases, at 0.6 of the loads"),
)
#: The backward kernel's, for any width: one for each number of rows. It holds more than the others, so that their tiles
#: would spill in inner loops.
BACKWARD = (
    Entry(ANY, False, Tile(16, 64, 64, 64, 4, 2), "inner dimension in blocks"),
    Entry(ANY, False, Tile(32, 64, 64, 64, 8, 2), "twice the rows at twice the warps"),
    Entry(ANY, False, Tile(64, 32, 32, 16, 8, 2), "narrow blocks; with 32 columns of a head some spilled in a phase"),
    Entry(ANY, True, Tile(16, 16, 32, 32, 4, 2), "as forward"),
    Entry(ANY, True, Tile(32, 16, 16, 16, 4, 2), "as forward"),
    Entry(ANY, True, Tile(64, 16, 16, 16, 8, 1), "none in a phase; at 32 columns, 16 warps, 32 inner or 2 stages some"),
)
#: Of the projections of the input side, which have no recurrence: ordinary products.
PROJECTION = Tile(rows=64, columns=64, inner=32, head=0, warps=4, stages=3)


def choose(spec: CellSpec, dtype: torch.dtype, target: str, batch_size: int, processors: int) -> Tile:
    """The tile of a call: of its key's entries, the one of most rows that still gives each processor a program.

    Args:
        spec: the cell.
        dtype: of x.
        target: a key of `SHARED_MEMORY`, or another architecture of the same makers.
        batch_size: batch elements.
        processors: of the device.
    """
    wide = dtype is torch.float32
    padded = padded_rows(spec)
    fitting = [entry for entry in TABLE if entry.width >= spec.mem_size and entry.wide == wide]
    tiles = [e.tile_on(target) for e in fitting if e.width == fitting[0].width and e.tile.rows >= padded]
    busy = [tile for tile in tiles if -(-batch_size // (tile.rows // padded)) >= processors]
    return (busy[-1] if busy else tiles[0]).fitted(spec.mem_size)


def backward(spec: CellSpec, dtype: torch.dtype, target: str, rows: int) -> Tile:
    """The tile of the backward kernel of a call whose other kernels have tiles of `rows`."""
    (entry,) = [entry for entry in BACKWARD if entry.wide == (dtype is torch.float32) and entry.tile.rows == rows]
    return entry.tile_on(target).fitted(spec.mem_size)


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


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
