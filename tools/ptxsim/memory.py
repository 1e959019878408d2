"""A memory of a launch: its bytes, bounds and alignment checks, and the shadow that finds races."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.ptxsim.arithmetic import Array
from tools.ptxsim.errors import AccessError
from tools.ptxsim.races import Shadow

if TYPE_CHECKING:
    from tools.ptxsim.unit import Unit

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
#: Sizes that accesses are aligned to; contents are a multiple of the largest.
WIDEST = 16


class Memory:
    """Global memory, or the shared memories of all programs side by side.

    Attributes:
        content: [bytes] uint8.
        shadow: see `Shadow`.

    Args:
        content: what is in it at the start.
        base: address of the first byte.
        limit: bytes from `base` that an address may reach.
        window: distance of two programs' parts; 0 where they share one.
        inside: [bytes], which ones belong to something; None for all.
        describe: what an offset is in.
    """

    def __init__(
        self,
        content: Array,
        shadow: Shadow,
        base: int,
        limit: int,
        window: int,
        inside: Array | None,
        describe: Callable[[int], str],
    ) -> None:
        self.content, self.shadow = content, shadow
        self._base, self._limit, self._window = base, limit, window
        self._inside, self._inside_by_size = inside, dict[int, Array]()
        self.describe = describe
        self.by_size = {size: content.view(dtype) for size, dtype in _UNSIGNED.items()}

    def locate(self, unit: Unit, address: Array, size: int, lanes: Array | None, site: int) -> Array:
        """Offsets in `content` of accesses of `size` bytes by some threads of a unit (None: all of them).

        Raises:
            AccessError: one is out of bounds or misaligned.
        """
        address = unit.spread(address)
        if lanes is not None:
            address = address[lanes]
        offset = address.astype(np.int64) - self._base
        bad: Any = (offset < 0) | (offset > self._limit - size) | ((offset & (size - 1)) != 0)
        if not bad.any() and self._inside is not None:
            if size not in self._inside_by_size:
                self._inside_by_size[size] = np.asarray(self._inside.reshape(-1, size).all(1))
            bad = ~self._inside_by_size[size][offset // size]
        if bad.any():
            thread = int(np.flatnonzero(bad)[0])
            at = int(offset[thread])
            kind = "misaligned" if at % size else "out of bounds"
            who = unit.name(thread if lanes is None else int(lanes[thread]))
            where = self.describe(at)
            raise AccessError(f"{kind}: {size} bytes at {where}, by {who}, {unit.machine.instruction(site)}")
        if self._window:
            program = unit.by.program if lanes is None else unit.by.program[lanes]
            offset += program * self._window
        return offset

    def load(
        self, unit: Unit, address: Array, size: int, count: int, mask: Array | None, site: int
    ) -> list[Array]:  # fmt: skip
        """`count` arrays [threads] of elements of `size` bytes, side by side; 0 for threads outside the mask."""
        lanes = unit.lanes(mask)
        offset = self.locate(unit, address, size * count, lanes, site)
        self.shadow.read(offset, size * count, unit.accessors(lanes), site)
        rows = self.by_size[size].reshape(-1, count)[offset // (size * count)]
        if lanes is not None:
            found = np.zeros((unit.threads, count), rows.dtype)
            found[lanes] = rows
            rows = found
        return list(np.ascontiguousarray(rows.T))

    def store(
        self, unit: Unit, address: Array, size: int, values: Sequence[Array], mask: Array | None, site: int
    ) -> None:
        """Store arrays [threads] of elements of `size` bytes side by side, by the threads in the mask."""
        lanes = unit.lanes(mask)
        if lanes is not None and not len(lanes):
            return
        rows = np.stack([unit.spread(value) for value in values], axis=1)
        if lanes is not None:
            rows = rows[lanes]
        offset = self.locate(unit, address, size * len(values), lanes, site)
        self.put(unit, offset, rows, lanes, site)

    def put(self, unit: Unit, offset: Array, rows: Array, lanes: Array | None, site: int) -> None:
        """Store rows [threads, elements] at offsets."""
        width = rows.shape[1] * rows.itemsize
        content, at = self.by_size[rows.itemsize].reshape(-1, rows.shape[1]), offset // width
        by = unit.accessors(lanes)
        self.shadow.write(offset, width, by, site, lambda: np.asarray((content[at] == rows).all(1)))
        content[at] = rows
        lost = (content[at] != rows).any(1)
        if lost.any():
            self.shadow.conflict(offset[lost], site)
