"""The instructions that one program executed, through a scoreboard of one multiprocessor: how many cycles they take.

All warps of a program run the same instructions; they are spread evenly over the schedulers, each of which issues one
warp instruction a clock. A result may be used after its latency; every pipe takes one instruction after the other.

PTX order stands in for the order that ptxas gives the instructions. It may move them as it likes, but not across a
barrier; so there are two replays: `in order`, which is slower than what ptxas makes, as a rule, and `reordered`, in
which an instruction between two barriers starts as soon as its operands are there, which no machine reaches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tools.gpu_model.machines import SCHEDULERS, SECTOR, Gpu
from tools.gpu_model.operations import UNITS, Operation


class Scoreboard:
    """What is ready when.

    Args:
        gpu: the machine.
        warps: of the program.
        traffic: by number of an instruction of memory: wavefronts of shared memory, or sectors of L2, that one warp's
            execution moves, on average.
        reorder: see above.

    Attributes:
        now: cycles so far.
    """

    def __init__(self, gpu: Gpu, warps: int, traffic: Mapping[int, float], reorder: bool) -> None:
        self._gpu, self._warps, self._traffic, self._reorder = gpu, warps, traffic, reorder
        self._each = max(warps / SCHEDULERS, 1.0)
        self._ready: dict[str, float] = {}
        self._taken = dict.fromkeys(("fp32", "simple", "special", "matrix", "shared", "l2"), 0.0)
        self._groups: list[float] = []
        self._open_group = 0.0
        self.now = 0.0
        # Of the last barrier: when it was, the latest start since, and how long issuing takes since.
        self._since, self._latest, self._issued = 0.0, 0.0, 0.0
        self._earliest = 0.0  # for any instruction, when reordered
        self._handlers = {unit: getattr(self, f"_{unit}") for unit in UNITS}

    def run(self, program: Sequence[Operation], sites: Iterable[int]) -> float:
        """Execute instructions by their number; the cycles in all."""
        for site in sites:
            operation = program[site]
            self._handlers[operation.unit](site, operation)
        return self._end()

    def _end(self) -> float:
        return max(self.now, self._latest, self._since + self._issued)

    def _start(self, operation: Operation) -> float:
        """When its operands are there, and in order its turn."""
        earliest = self._earliest if self._reorder else self.now
        return max([earliest, *(self._ready.get(register, 0.0) for register in operation.reads)])

    def _pass(self, operation: Operation, start: float, finish: float) -> None:
        """Issue at `start`; what is written may be used at `finish`."""
        for register in operation.writes:
            self._ready[register] = finish
        self._latest = max(self._latest, start)
        self._issued += self._each
        if not self._reorder:
            self.now = start + self._each

    def _on(self, pipe: str, operation: Operation, busy: float, latency: float) -> float:
        """Keep a pipe busy; returns when the last warp is done."""
        start = max(self._start(operation), self._taken[pipe])
        self._taken[pipe] = start + busy
        finish = start + busy + latency
        self._pass(operation, start, finish)
        return finish

    # -- by unit -------------------------------------------------------------------------------------------------------

    def _arithmetic(self, pipe: str, cycles: float, operation: Operation) -> None:
        """The warps of a scheduler take turns, so that what waits for one of them is not held up by the others."""
        busy = cycles * self._each
        self._on(pipe, operation, busy, max(self._gpu.arithmetic_latency - busy, 0.0))

    def _fp32(self, site: int, operation: Operation) -> None:
        self._arithmetic("fp32", self._gpu.fp32, operation)

    def _simple(self, site: int, operation: Operation) -> None:
        self._arithmetic("simple", self._gpu.simple, operation)

    def _special(self, site: int, operation: Operation) -> None:
        self._on("special", operation, self._gpu.special * self._each, self._gpu.special_latency)

    def _matrix(self, site: int, operation: Operation) -> None:
        last = self._gpu.matrix * (self._each - 1)
        start = max(self._start(operation), self._taken["matrix"])
        self._taken["matrix"] = start + self._gpu.matrix * self._each
        self._pass(operation, start, start + last + self._gpu.matrix_latency)

    def _shuffle(self, site: int, operation: Operation) -> None:
        self._on("shared", operation, float(self._warps), self._gpu.shuffle_latency)

    def _shared(self, site: int, operation: Operation) -> None:
        self._on("shared", operation, self._moved(site) * self._warps, self._gpu.shared_latency)

    def _load(self, site: int, operation: Operation) -> None:
        self._on("l2", operation, self._l2(site), self._gpu.l2_latency)

    def _store(self, site: int, operation: Operation) -> None:
        self._on("l2", operation, self._l2(site), 0.0)

    def _copy(self, site: int, operation: Operation) -> None:
        finish = self._on("l2", operation, self._l2(site), self._gpu.l2_latency)
        self._open_group = max(self._open_group, finish)

    def _commit(self, site: int, operation: Operation) -> None:
        self._groups.append(self._open_group)
        self._open_group = 0.0

    def _wait(self, site: int, operation: Operation) -> None:
        start = self._start(operation)
        while len(self._groups) > operation.size:
            start = max(start, self._groups.pop(0))
        self._pass(operation, start, start)
        self._earliest = start  # what was copied is read after this

    def _barrier(self, site: int, operation: Operation) -> None:
        self.now = self._since = self._earliest = self._end() + self._gpu.barrier_latency
        self._latest, self._issued = self.now, 0.0

    def _free(self, site: int, operation: Operation) -> None:
        start = self._start(operation)
        for register in operation.writes:
            self._ready[register] = start

    def _moved(self, site: int) -> float:
        return self._traffic.get(site, 1.0)

    def _l2(self, site: int) -> float:
        return self._moved(site) * SECTOR * self._warps / self._gpu.l2_port
