"""How time is taken: contestants in turn, round after round, the ceilings read beside every sample.

The machine is taken to be shared and to change its speed, so nothing is compared that was not measured within the same
round. On one thread a sample is the CPU time of the whole process (which other processes hardly touch, and in which
work hidden in other threads counts); on more threads it is wall time; on a GPU, what triton.testing.do_bench finds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rmc_kernels.bench.ceilings import Ceilings

#: A sample repeats its call until it takes this long, in seconds.
SAMPLE_SECONDS = 0.01
WARM_UPS = 1  # and the call that finds how often to repeat


class Reading(NamedTuple):
    """Time of some calls, in seconds: by the contestant's clock, and on the wall."""

    seconds: float
    wall: float


Call = Callable[[], object]
Clock = Callable[[Call, int], Reading]


@dataclass(frozen=True)
class Sample:
    """One measurement.

    Attributes:
        seconds: of one call, by the contestant's clock.
        wall: of one call.
        ceilings: read just before; None where they cannot be.
    """

    seconds: float
    wall: float
    ceilings: Ceilings | None


@dataclass(frozen=True)
class Entry:
    """A contestant at the start: what it runs, on how many threads, by which clock."""

    call: Call
    threads: int
    clock: Clock


def interleave(
    entries: Sequence[Entry],
    budget: float,
    read_ceilings: Callable[[int], Ceilings | None],
    *,
    fewest: int = 5,
    now: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[list[Sample]]:
    """Time the entries in turn until the budget is spent; a round starts one entry later than the last.

    Args:
        entries: what is timed.
        budget: seconds to spend on the rounds, above 0; the warm-up is not counted.
        read_ceilings: number of threads -> a reading.
        fewest: rounds that are run even where they take longer.
        now: the clock of the budget.
        on_progress: told the share of the work that is done, after each round.

    Returns:
        The samples of each entry, one a round, in the order of `entries`.
    """
    samples: list[list[Sample]] = [[] for _ in entries]
    threads_before = torch.get_num_threads()
    try:
        calls = [_warm_up(entry) for entry in entries]
        start, rounds = now(), 0
        while entries and (rounds < fewest or now() - start < budget):
            for turn in range(len(entries)):
                number = (rounds + turn) % len(entries)
                entry = entries[number]
                torch.set_num_threads(entry.threads)
                ceilings = read_ceilings(entry.threads)
                seconds, wall = entry.clock(entry.call, calls[number])
                samples[number].append(Sample(seconds / calls[number], wall / calls[number], ceilings))
            rounds += 1
            on_progress(min(1.0, rounds / fewest, (now() - start) / budget))
    finally:
        torch.set_num_threads(threads_before)
    return samples


def _warm_up(entry: Entry) -> int:
    """Run the entry until it is warm; how many calls make a sample."""
    torch.set_num_threads(entry.threads)
    for _ in range(WARM_UPS):
        entry.call()
    return max(1, math.ceil(SAMPLE_SECONDS / max(entry.clock(entry.call, 1).seconds, 1e-6)))


def clock_for(device: str, threads: int) -> tuple[str, Clock]:
    """The clock of a contestant, with its name."""
    if device == "cuda":
        return "triton.testing.do_bench", by_do_bench
    return ("CPU time", by_cpu) if threads == 1 else ("wall time", by_wall)


def by_cpu(call: Call, count: int) -> Reading:
    """CPU time of the process, all its threads together."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        call()
    return Reading(time.process_time() - cpu, time.perf_counter() - wall)


def by_wall(call: Call, count: int) -> Reading:
    """Wall time."""
    wall = time.perf_counter()
    for _ in range(count):
        call()
    elapsed = time.perf_counter() - wall
    return Reading(elapsed, elapsed)


def by_do_bench(call: Call, count: int) -> Reading:
    """The median by triton's own benchmark: device events around each call, the L2 cache cleared before it.

    On the wall calls follow each other, until the device has done them all.
    """
    from triton import testing  # not everywhere: a torch with CUDA brings it along

    milliseconds = testing.do_bench(call, warmup=0, rep=1000 * SAMPLE_SECONDS, return_mode="median")
    torch.cuda.synchronize()
    wall = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return Reading(count * milliseconds / 1000, time.perf_counter() - wall)
