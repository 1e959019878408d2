"""One launch: memories, units and the schedule in which they advance from barrier to barrier."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt

from tools.ptxsim.arithmetic import Array
from tools.ptxsim.errors import Deadlock, LimitExceeded, Unsupported
from tools.ptxsim.memory import WIDEST, Memory
from tools.ptxsim.program import Block, Program
from tools.ptxsim.races import Blind, Race, Shadow
from tools.ptxsim.unit import WARP, Unit

Schedule = Literal["lockstep", "warp"]
#: The first address of global memory.
BASE = 1 << 32
_ENDED = np.iinfo(np.int32).max


@dataclass
class Report:
    """What a launch did.

    Attributes:
        races: in words, each pair of instructions once.
        allowed: those of them that were on the list of what is allowed.
        instructions: executed, the sum over all warps.
        barriers: how often a unit arrived at each of the program's barriers.
    """

    races: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    instructions: int = 0
    barriers: Counter[int] = field(default_factory=Counter)


class Machine:
    """Runs a program.

    Args:
        program: what.
        grid: programs along x, y, z.
        warps: of each.
        shared: bytes of shared memory of each.
        content, inside: global memory, and which of its bytes belong to a tensor; [bytes].
        names: (name, start, stop) of each tensor in it.
        parameters: the values as bits, by name.
        schedule: "lockstep": all warps advance together; "warp": one after the other, from barrier to barrier, in an
            order drawn from `seed`. Programs never wait for each other, so they advance together in both.
        seed: of the order of warps.
        limit: most instructions of one warp.
        allow: parts of locations, "file:line", whose races are only noted.
        without_barriers: numbers of barriers that do nothing.
        races: whether to look for races between instructions.

    Attributes:
        report: what happened so far.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        warps: int,
        shared: int,
        content: Array,
        inside: Array,
        names: list[tuple[str, int, int]],
        parameters: dict[str, Array],
        schedule: Schedule,
        seed: int,
        limit: int,
        allow: Collection[str],
        without_barriers: Collection[int],
        races: bool,
    ) -> None:
        self.program, self.grid, self.warps, self.programs = program, grid, warps, prod(grid)
        self.report = Report()
        self._parameters, self._names = parameters, names
        self._random, self._limit = random.Random(seed), limit
        self._allow, self._without_barriers = allow, without_barriers
        self._races = races
        self._told: set[tuple[str, str, int, int]] = set()
        self.global_memory = Memory(
            content, self._shadow("global", len(content)), BASE, len(content), 0, inside, self._tensor
        )
        shared = max(shared, program.kernel.shared)
        window = -(-max(shared, 1) // WIDEST) * WIDEST
        poison = np.full(self.programs * window, 0xFF, np.uint8)
        self.shared_memory = Memory(
            poison, self._shadow("shared", len(poison)), 0, shared, window, None, lambda at: f"shared memory + {at}"
        )
        self._window = window
        groups = [range(warps)] if schedule == "lockstep" else [[warp] for warp in range(warps)]
        self.units = [Unit(self, group) for group in groups]
        self._arrived: dict[int, Array] = {}

    def run(self) -> Report:
        """Run to the end.

        Raises:
            SimulationError: what the program did wrong; races are in the report instead.
        """
        with np.errstate(all="ignore"):
            waiting = list(self.units)
            while waiting:
                progress = [self._advance(unit) for unit in self._random.sample(waiting, len(waiting))]
                waiting = [unit for unit in waiting if (unit.at != _ENDED).any()]
                released = self._release()
                if waiting and not released and not any(progress):
                    raise Deadlock(self._deadlock())
        return self.report

    def parameter(self, name: str, dtype: npt.DTypeLike) -> Array:
        """The value of a parameter."""
        return self._parameters[name].view(dtype)[0]  # type: ignore[no-any-return]

    def instruction(self, site: int) -> str:
        """Instruction number `site` and where it comes from."""
        return str(self.program.kernel.instructions[site])

    # -- running -------------------------------------------------------------------------------------------------------

    def _advance(self, unit: Unit) -> bool:
        """Run a unit until its threads wait or have ended; whether anything ran."""
        ran = False
        while True:
            mask = None
            if unit.together is None:
                ready = (unit.at != _ENDED) & (unit.barrier < 0)
                if not ready.any():
                    return ran
                index = int(unit.at[ready].min())
                mask = ready & (unit.at == index)
                if mask.all():
                    mask, unit.together = None, index
            else:
                index = unit.together
            ran = True
            block = self.program.blocks[index]
            guard = self.program.code(index, mask is not None)(unit.registers, unit, mask)
            self._count(unit, block, mask)
            self._leave(unit, index, block, mask, guard)

    def _count(self, unit: Unit, block: Block, mask: Array | None) -> None:
        length = block.stop - block.start
        warps = unit.threads // WARP if mask is None else int(mask.reshape(-1, WARP).any(1).sum())
        self.report.instructions += length * warps
        unit.executed += length
        if unit.executed > self._limit:
            at = self.instruction(block.start)
            raise LimitExceeded(f"a warp executed more than {self._limit} instructions; it is at {at}")

    def _leave(self, unit: Unit, index: int, block: Block, mask: Array | None, guard: Array | None) -> None:
        """Send the threads in the mask to their next block."""
        end = block.end
        if end is None or block.barrier in self._without_barriers:
            self._go(unit, mask, index + 1)
        elif block.barrier is not None:
            self._arrive(unit, mask, guard, index, block.barrier)
        elif guard is None or guard.all():
            self._go(unit, mask, _ENDED if block.target is None else block.target)
        elif not guard.any():
            self._go(unit, mask, index + 1)
        else:
            going = np.where(guard, _ENDED if block.target is None else block.target, index + 1)
            if unit.together is not None:
                unit.at[:] = going
                unit.together = None
            else:
                unit.at[mask] = going[mask]

    def _go(self, unit: Unit, mask: Array | None, to: int) -> None:
        if mask is not None:
            unit.at[mask] = to
        elif to == _ENDED:
            unit.at[:] = _ENDED
            unit.together = None
        else:
            unit.together = to

    # -- barriers ------------------------------------------------------------------------------------------------------

    def _arrive(self, unit: Unit, mask: Array | None, guard: Array | None, index: int, number: int) -> None:
        barrier = self.program.barriers[number]
        name, *count = (int(operand) for operand in barrier.operands)
        if guard is not None or count not in ([], [self.warps * WARP]):
            raise Unsupported(f"a barrier of some threads of a program, {barrier}")
        self.report.barriers[number] += 1
        who = np.ones(unit.threads, bool) if mask is None else mask
        unit.at[who] = index + 1
        unit.barrier[who] = name
        unit.together = None
        arrived = self._arrived.setdefault(name, np.zeros(self.programs, np.int64))
        arrived += np.bincount(unit.by.program[who], minlength=self.programs)
        if len(self.units) == 1:
            self._release()

    def _release(self) -> bool:
        """Let the programs go on whose threads have all arrived at a barrier; whether there were any."""
        found = False
        for name, arrived in self._arrived.items():
            complete = arrived == self.warps * WARP
            if not complete.any():
                continue
            found = True
            arrived[complete] = 0
            for unit in self.units:
                free = complete[unit.by.program] & (unit.barrier == name)
                unit.barrier[free] = -1
                unit.by.interval[complete[unit.by.program]] += 1
                if (unit.barrier < 0).all() and (unit.at == unit.at[0]).all() and unit.at[0] != _ENDED:
                    unit.together = int(unit.at[0])
        return found

    def _deadlock(self) -> str:
        """Where the threads of the first program that cannot go on are."""
        lines: Counter[str] = Counter()
        program = min(int(unit.by.program[unit.at != _ENDED].min()) for unit in self.units if (unit.at != _ENDED).any())
        for unit in self.units:
            for thread in np.flatnonzero(unit.by.program == program):
                if unit.at[thread] == _ENDED:
                    lines["have ended"] += 1
                else:
                    end = self.program.blocks[unit.at[thread] - 1].end
                    lines[f"wait at barrier {unit.barrier[thread]}, {end}"] += 1
        where = "; ".join(f"{count} {line}" for line, count in lines.items())
        return f"program {program}, {self.warps * WARP} threads: {where}"

    # -- races ---------------------------------------------------------------------------------------------------------

    def _shadow(self, name: str, size: int) -> Shadow:
        return Shadow(size, self.warps, lambda race: self._tell(name, race)) if self._races else Blind()

    def _tell(self, memory: str, race: Race) -> None:
        pair = (memory, race.kind, race.site, race.other)
        if pair in self._told:
            return
        self._told.add(pair)
        where = self._tensor(race.place) if memory == "global" else f"shared memory + {race.place % self._window}"
        words = f"{race.kind} at {where}: {self.instruction(race.site)} and {self.instruction(race.other)}"
        allowed = any(f"{line}:" in words for line in self._allow)
        (self.report.allowed if allowed else self.report.races).append(words)

    def _tensor(self, offset: int) -> str:
        for name, start, stop in self._names:
            if start - WIDEST <= offset < stop + WIDEST:
                return f"{name} + {offset - start} of {stop - start} bytes"
        return f"address {BASE + offset:#x}"
