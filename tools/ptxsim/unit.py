"""Threads that advance together: their registers, and the instructions that need more than one thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tools.ptxsim import tensor_cores
from tools.ptxsim.arithmetic import Array
from tools.ptxsim.errors import DivergenceError
from tools.ptxsim.races import Accessors
from tools.ptxsim.translator import UNSIGNED

if TYPE_CHECKING:
    from tools.ptxsim.machine import Machine

#: Threads of a warp.
WARP = 32


class _Copy(NamedTuple):
    """A cp.async that has not been waited for: destination offsets [threads], words to write there, who, where."""

    offset: Array
    words: Array
    lanes: Array | None
    site: int


class Unit:
    """Some warps of every program of a launch.

    Attributes:
        machine: that runs it.
        threads: how many.
        registers: one array [threads] or scalar each.
        special: special registers, likewise.
        by: program, warp and interval of each thread, [threads].
        at: [threads], the block that each thread runs next.
        barrier: [threads], the barrier that each waits at, -1 for none.
        together: the block that all run next; None where they differ, wait, or have ended.
        executed: instructions, per warp.
    """

    def __init__(self, machine: Machine, warps: Sequence[int]) -> None:
        programs = machine.programs
        shape = (programs, len(warps), WARP)
        self.machine = machine
        self.threads = int(np.prod(shape))
        program, warp, lane = (
            grid.reshape(-1) for grid in np.meshgrid(np.arange(programs), warps, np.arange(WARP), indexing="ij")
        )
        self._lane = lane
        self._first = np.arange(self.threads) // WARP * WARP
        x, y, _ = machine.grid
        thread = warp * WARP + lane
        numbers: dict[str, Any] = {
            "%tid.x": thread, "%tid.y": 0, "%tid.z": 0, "%ntid.x": machine.warps * WARP, "%ntid.y": 1, "%ntid.z": 1,
            "%ctaid.x": program % x, "%ctaid.y": program // x % y, "%ctaid.z": program // (x * y),
            "%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": machine.grid[2], "%laneid": lane, "%warpid": warp,
        }  # fmt: skip
        self.special = {name: np.asarray(value).astype(np.uint32)[()] for name, value in numbers.items()}
        # What was never written is a NaN, or nothing sensible as a number.
        self.registers: list[Any] = [
            np.array(0 if bits == 1 else 2**bits - 1, UNSIGNED[bits])[()]
            for bits in machine.program.kernel.registers.values()
        ]
        self.by = Accessors(program.astype(np.int32), warp.astype(np.int32), np.zeros(self.threads, np.int32))
        self.at = np.zeros(self.threads, np.int32)
        self.barrier = np.full(self.threads, -1, np.int32)
        self.together: int | None = 0
        self.executed = 0
        self._copies: list[_Copy] = []
        self._groups: list[list[_Copy]] = []
        self._sources: dict[tuple[str, int], Array] = {}

    # -- threads -------------------------------------------------------------------------------------------------------

    def spread(self, value: Array) -> Array:
        """[threads] of an array or a scalar."""
        return value if np.ndim(value) else np.full(self.threads, value)

    def lanes(self, mask: Array | None) -> Array | None:
        """The threads in a mask, None for all."""
        if mask is None or mask.all():
            return None
        return np.flatnonzero(self.spread(mask))

    def accessors(self, lanes: Array | None) -> Accessors:
        """Who the threads are."""
        return self.by if lanes is None else self.by.only(lanes)

    def name(self, thread: int) -> str:
        """A thread, for messages."""
        number = self.by.warp[thread] * WARP + self._lane[thread]
        return f"program {self.by.program[thread]} thread {number}"

    def _whole_warps(self, mask: Array | None, site: int) -> Array | None:
        """The threads in a mask, which has to hold whole warps; None for all."""
        lanes = self.lanes(mask)
        if lanes is None:
            return None
        assert mask is not None
        warps = self.spread(mask).reshape(-1, WARP)
        if (warps.any(1) != warps.all(1)).any():
            raise DivergenceError(f"a part of a warp executes {self.machine.instruction(site)}")
        return lanes

    # -- instructions --------------------------------------------------------------------------------------------------

    def parameter(self, name: str, dtype: npt.DTypeLike) -> Array:
        """A kernel parameter."""
        return self.machine.parameter(name, dtype)

    def shuffle(self, mode: str, value: Array, lane: Array, mask: Array | None, site: int) -> list[Array]:
        """shfl.sync.bfly and .idx over whole warps."""
        self._whole_warps(mask, site)
        if not np.ndim(value):
            return [value]
        key = (mode, int(lane)) if not np.ndim(lane) else None
        source = None if key is None else self._sources.get(key)
        if source is None:
            other = self._lane ^ lane if mode == "bfly" else self.spread(lane)
            source = self._first + (other & (WARP - 1)).astype(np.int64)
            if key is not None:
                self._sources[key] = source
        return [value[source]]

    def multiply(
        self, kind: str, inner: int, a: list[Array], b: list[Array], c: list[Array], mask: Array | None, site: int
    ) -> list[Array]:
        """mma.sync.m16n8k`inner`."""
        self._whole_warps(mask, site)
        return tensor_cores.multiply(kind, inner, *([self.spread(value) for value in x] for x in (a, b, c)))

    def load_matrices(
        self, address: Array, count: int, transposed: bool, mask: Array | None, site: int
    ) -> list[Array]:  # fmt: skip
        """ldmatrix: `count` matrices; thread i of a warp gives the address of row i % 8 of matrix i // 8."""
        lanes = self._whole_warps(mask, site)
        rows = self._row_lanes(lanes, count)
        memory = self.machine.shared_memory
        offset = memory.locate(self, address, 16, rows, site)
        memory.shadow.read(offset, 16, self.accessors(rows), site)
        matrices = memory.by_size[2].reshape(-1, 8)[offset // 16].reshape(-1, count, 8, 8)
        found = []
        for i in range(count):
            registers = tensor_cores.to_fragment(matrices[:, i], transposed).reshape(-1)
            if lanes is not None:
                some, registers = registers, np.zeros(self.threads, np.uint32)
                registers[lanes] = some
            found.append(registers)
        return found

    def store_matrices(
        self, address: Array, values: Sequence[Array], transposed: bool, mask: Array | None, site: int
    ) -> None:
        """stmatrix: the reverse of `load_matrices`."""
        lanes = self._whole_warps(mask, site)
        rows = self._row_lanes(lanes, len(values))
        memory = self.machine.shared_memory
        offset = memory.locate(self, address, 16, rows, site)
        spread = [self.spread(value) if lanes is None else self.spread(value)[lanes] for value in values]
        matrices = [tensor_cores.from_fragment(value.reshape(-1, WARP), transposed) for value in spread]
        memory.put(self, offset, np.stack(matrices, axis=1).reshape(-1, 8), rows, site)

    def _row_lanes(self, lanes: Array | None, count: int) -> Array:
        """Those of the threads that give the address of a row."""
        lanes = np.arange(self.threads) if lanes is None else lanes
        return lanes[self._lane[lanes] < 8 * count]

    # -- asynchronous copies -------------------------------------------------------------------------------------------

    def copy(self, to: Array, source: Array, size: int, count: Array, mask: Array | None, site: int) -> None:
        """cp.async: `count` of `size` bytes from global to shared memory, the rest zeros; written when waited for."""
        lanes = self.lanes(mask)
        if lanes is not None and not len(lanes):
            return
        shared, memory = self.machine.shared_memory, self.machine.global_memory
        offset = shared.locate(self, to, size, lanes, site)
        count = self.spread(count) if lanes is None else self.spread(count)[lanes]
        if not np.isin(count, (0, size)).all():
            raise DivergenceError(f"a copy of a part of {size} bytes, {self.machine.instruction(site)}")
        words = np.zeros((len(offset), size // 4), np.uint32)
        real = np.flatnonzero(count)
        if len(real):
            reading = real if lanes is None else lanes[real]
            start = memory.locate(self, source, size, reading, site)
            memory.shadow.read(start, size, self.accessors(reading), site)
            words[real] = memory.by_size[4].reshape(-1, size // 4)[start // size]
        shared.shadow.begin_copy(offset, size, self.accessors(lanes), site)
        self._copies.append(_Copy(offset, words, lanes, site))

    def commit_copies(self, mask: Array | None, site: int) -> None:
        """cp.async.commit_group."""
        self._all(mask, site)
        self._groups.append(self._copies)
        self._copies = []

    def wait_for_copies(self, groups: int, mask: Array | None, site: int) -> None:
        """cp.async.wait_group: all but the last `groups` groups are there."""
        self._all(mask, site)
        memory = self.machine.shared_memory
        while len(self._groups) > groups:
            for offset, words, lanes, issued in self._groups.pop(0):
                size = 4 * words.shape[1]
                memory.by_size[4].reshape(-1, words.shape[1])[offset // size] = words
                memory.shadow.end_copy(offset, size, self.accessors(lanes), issued)

    def _all(self, mask: Array | None, site: int) -> None:
        """Groups are kept for all threads of a unit together."""
        if self.lanes(mask) is not None:
            raise DivergenceError(f"not all threads execute {self.machine.instruction(site)}")
