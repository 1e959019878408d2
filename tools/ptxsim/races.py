"""Who touched each part of a memory, and whether anything orders that: the happens-before order of barriers.

A program's barriers cut its run into intervals, and programs never wait for each other. So two accesses of one place,
one of them a write, are ordered only where one program makes them, in one warp or in different intervals. All others
are reported, whichever came first in this run.

Several warps may hold the same value and store it to the same place, and each may read it back without a barrier: a
layout with replicated threads. A write of the value that another warp wrote in the same interval joins that write, and
is no race.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tools.ptxsim.arithmetic import Array

#: Bytes of a place.
GRAIN = 2
_INTERVALS = 1 << 20
#: The interval of a copy that has not been waited for: later than all.
_IN_FLIGHT = _INTERVALS - 1
_NOBODY, _SEVERAL = -1, -2


class Accessors(NamedTuple):
    """The threads of one access, [threads] each: program, warp in it, and interval of the program."""

    program: Array
    warp: Array
    interval: Array

    def only(self, chosen: Array) -> Accessors:
        """Those of the threads."""
        return Accessors(self.program[chosen], self.warp[chosen], self.interval[chosen])


@dataclass(frozen=True)
class Race:
    """Two accesses that nothing orders.

    Attributes:
        kind: "read after write", "write after write", "write after read", "one instruction".
        place: in which memory, and where.
        site, other: numbers of the instructions, the later one in this run first.
    """

    kind: str
    place: int
    site: int
    other: int


class Shadow:
    """The accesses of one memory.

    Args:
        size: of the memory, in bytes.
        warps: of a program.
        report: called with each race, at most once for a pair of instructions.
    """

    def __init__(self, size: int, warps: int, report: Callable[[Race], None]) -> None:
        places = -(-size // GRAIN)
        self._report = report
        # (program + 1) * _INTERVALS + interval of the last write, 0 where there was none
        self._stamp = np.zeros(places, np.int64)
        self._write_site, self._read_site = np.full((2, places), -1, np.int32)
        # interval of the last write and read of each warp
        self._written, self._read = np.full((2, places, warps), -1, np.int32)
        self._reader = np.full(places, _NOBODY, np.int32)

    @staticmethod
    def places(offset: Array, size: int) -> Array:
        """[threads, places] of accesses of `size` bytes."""
        return (offset // GRAIN)[:, None] + np.arange(max(size // GRAIN, 1))

    def read(self, offset: Array, size: int, by: Accessors, site: int) -> None:
        """Note a read of `size` bytes at each offset [threads], and report what races with it."""
        places = self.places(offset, size)
        stamp = self._stamp[places]
        if stamp.any():
            self._check_read(places, stamp, by, site)
        warp = by.warp[:, None]
        self._read[places, warp] = by.interval[:, None]
        self._read_site[places] = site
        self._note_readers(places, by.program)

    def _note_readers(self, places: Array, program: Array) -> None:
        program = np.broadcast_to(program[:, None], places.shape)
        before = self._reader[places]
        if ((before == program) | (before == _SEVERAL)).all():
            return
        now = np.where((before == _NOBODY) | (before == program), program, _SEVERAL)
        self._reader[places] = now
        clash = self._reader[places] != now
        self._reader[places[clash]] = _SEVERAL

    def _check_read(self, places: Array, stamp: Array, by: Accessors, site: int) -> None:
        recent = self._not_before(stamp, by)
        if not recent.any():
            return
        thread, column = np.nonzero(recent)
        place, stamp = places[thread, column], stamp[thread, column]
        own = (self._written[place, by.warp[thread]] == by.interval[thread]) & _same_program(stamp, by.program[thread])
        bad = np.flatnonzero(~own | (stamp % _INTERVALS == _IN_FLIGHT))
        self._tell("read after write", place[bad], site, self._write_site[place[bad]])

    @staticmethod
    def _not_before(stamp: Array, by: Accessors) -> Array:
        """[threads, places]: whether the last write is by another program or in this interval, or in flight."""
        start = ((by.program.astype(np.int64) + 1) * _INTERVALS)[:, None]
        earlier = (stamp >= start) & (stamp < start + by.interval[:, None])
        found: Array = (stamp != 0) & ~earlier
        return found

    def write(self, offset: Array, size: int, by: Accessors, site: int, unchanged: Callable[[], Array]) -> None:
        """Note a write of `size` bytes at each offset [threads], and report what races with it.

        Args:
            unchanged: gives which threads [threads] write the value that is there.
        """
        places = self.places(offset, size)
        self._check_write(places, by, site, unchanged)
        self._note_write(places, by, by.interval, site)

    def begin_copy(self, offset: Array, size: int, by: Accessors, site: int) -> None:
        """Note that a copy to each offset [threads] is on its way: nobody may touch those places before its end."""
        places = self.places(offset, size)
        self._check_write(places, by, site, lambda: np.zeros(len(offset), bool))
        self._note_write(places, by, np.full_like(by.interval, _IN_FLIGHT), site)

    def end_copy(self, offset: Array, size: int, by: Accessors, site: int) -> None:
        """Note that a copy was waited for: it counts as a write of that moment."""
        self._note_write(self.places(offset, size), by, by.interval, site)

    def _note_write(self, places: Array, by: Accessors, interval: Array, site: int) -> None:
        self._stamp[places] = ((by.program.astype(np.int64) + 1) * _INTERVALS + interval)[:, None]
        self._written[places, by.warp[:, None]] = interval[:, None]
        self._write_site[places] = site

    def _check_write(self, places: Array, by: Accessors, site: int, unchanged: Callable[[], Array]) -> None:
        warps = np.arange(self._written.shape[1])
        others = (warps != by.warp[:, None])[:, None, :]
        now = by.interval[:, None, None]
        stamp = self._stamp[places]
        written = self._not_before(stamp, by)
        if written.any():
            foreign = written & (~_same_program(stamp, by.program[:, None]) | (stamp % _INTERVALS == _IN_FLIGHT))
            written = ((self._written[places] >= now) & others).any(2) & written
            joins = unchanged()[:, None] & written & ~foreign
            bad = (written | foreign) & ~joins
            self._tell("write after write", places[bad], site, self._write_site[places[bad]])
        else:
            joins = written
        reader = self._reader[places]
        elsewhere = (reader == _SEVERAL) | ((reader != _NOBODY) & (reader != by.program[:, None]))
        read = ((self._read[places] >= now) & others).any(2) & (reader == by.program[:, None])
        bad = (elsewhere | read) & ~joins
        if bad.any():
            self._tell("write after read", places[bad], site, self._read_site[places[bad]])

    def conflict(self, offset: Array, site: int) -> None:
        """Report that threads wrote different values to each offset in one instruction."""
        self._tell("one instruction", offset // GRAIN, site, np.full(len(offset), site))

    def _tell(self, kind: str, places: Array, site: int, others: Array) -> None:
        for other, first in zip(*np.unique(others, return_index=True), strict=True):
            self._report(Race(kind, int(places[first]) * GRAIN, site, int(other)))


class Blind(Shadow):
    """Sees no race, in half of the time."""

    def __init__(self) -> None:
        super().__init__(0, 0, lambda race: None)

    def read(self, offset: Array, size: int, by: Accessors, site: int) -> None:
        """Nothing is noted."""

    def write(self, offset: Array, size: int, by: Accessors, site: int, unchanged: Callable[[], Array]) -> None:
        """Nothing is noted."""

    def begin_copy(self, offset: Array, size: int, by: Accessors, site: int) -> None:
        """Nothing is noted."""

    def end_copy(self, offset: Array, size: int, by: Accessors, site: int) -> None:
        """Nothing is noted."""


def _same_program(stamp: Array, program: Array) -> Array:
    found: Array = stamp // _INTERVALS == program + 1
    return found
