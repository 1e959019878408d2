"""One case: the line-up, parity, the rounds, memory. No terminal's library is needed for it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from rmc_kernels import backends
from rmc_kernels.bench import ceilings, contention, memory, parity
from rmc_kernels.bench.cases import Case, Group
from rmc_kernels.bench.contestants import Contestant, timed
from rmc_kernels.bench.problem import draw
from rmc_kernels.bench.record import Figure, Status, TimedCase, timed_figure
from rmc_kernels.bench.timing import Clock, Entry, clock_for, interleave
from rmc_kernels.errors import in_short


class Meter(Protocol):
    """What measures peak memory; see `memory.Meter`."""

    def peak(self, order: memory.Order, number: int) -> int | None:
        """Bytes that one call of contestant `number` of the line-up needs; None where they could not be measured."""


def taking_part(backend: str, cases: Iterable[Case], device: str) -> tuple[list[str], dict[str, str]]:
    """The backends that are timed, and why others are not.

    Raises:
        ValueError: `backend` is neither "all" nor a backend.
    """
    reference = backends.REFERENCE.name
    known = [name for name in backends.CHOICES if name != "auto"]
    if backend not in ("all", *known):
        raise ValueError(f"backend takes one of all, {', '.join(known)}; got {backend!r}")
    absent: dict[str, str] = {}
    present = []
    for name, candidate in backends.BACKENDS.items():
        reasons = (candidate.refuses(case.spec, getattr(torch, case.dtype), torch.device(device)) for case in cases)
        reason = candidate.unavailable() or next((reason for reason in reasons if reason), None)
        if reason is None:
            present.append(name)
        else:
            absent[name] = reason
    if backend != "all":
        return [backend] if backend in present else [], {k: v for k, v in absent.items() if k == backend}
    fused = [name for name in present if name != reference]
    return fused or [reference], absent


def run_case(
    case: Case,
    group: Group,
    backend_names: Sequence[str],
    device: str,
    load: float | None,
    meter: Meter,
    on_progress: Callable[[float], None] = lambda share: None,
    clock: Callable[[str, int], tuple[str, Clock]] | None = None,
) -> TimedCase:
    """Check the contestants of one case, time those that are right in turn, then measure their memory.

    Args:
        case: what is run.
        group: how.
        backend_names: of this package, that take part.
        device: "cpu" or "cuda".
        load: load average before, where it is known.
        meter: of memory.
        on_progress: told the share of the work that is done.
        clock: gives name and clock for a device and a number of threads; `timing.clock_for` if None, and then with the
            CPU's ceilings on a CPU.
    """
    with_ceilings = device == "cpu" and clock is None and ceilings.available()
    clock = clock or clock_for
    torch.compiler.reset()  # sizes of earlier cases would count against the number of recompilations
    order = memory.Order(case, group.against, backend_names, group.saved, group.at_width)
    contestants = order.contestants()
    figures = [checked(contestant, case, device, clock) for contestant in contestants]
    problem = draw(case, device=device)
    entries = [
        Entry(timed(contestant.bind(problem), case.mode), contestant.threads, clock(device, contestant.threads)[1])
        for contestant, figure in zip(contestants, figures, strict=True)
        if figure.status == "timed"
    ]

    def read(threads: int) -> ceilings.Ceilings | None:
        return ceilings.read(threads, case.weight_bytes) if with_ceilings else None

    samples = interleave(entries, group.seconds, read, fewest=group.fewest_rounds, on_progress=on_progress)
    filled = iter(samples)
    figures = [timed_figure(figure, next(filled)) if figure.status == "timed" else figure for figure in figures]
    if group.memory and case.threads == 1 and memory.available(device):
        figures = [
            replace(figure, peak_bytes=meter.peak(order, number))
            if figure.status == "timed" and memory.measurable(contestant)
            else figure
            for number, (figure, contestant) in enumerate(zip(figures, contestants, strict=True))
        ]
    return TimedCase(case, figures, contention.reasons([sample for taken in samples for sample in taken], load))


def checked(
    contestant: Contestant, case: Case, device: str, clock: Callable[[str, int], tuple[str, Clock]] | None = None
) -> Figure:
    """A contestant's figure before it is timed: whether it runs and, if it computes the cell, whether it is right."""
    figure = Figure(
        contestant.name, contestant.threads, contestant.flops, (clock or clock_for)(device, contestant.threads)[0],
        "timed", is_rmc=contestant.is_rmc, parameters=contestant.parameters,
    )  # fmt: skip
    threads_before = torch.get_num_threads()
    torch.set_num_threads(contestant.threads)
    try:
        if not contestant.is_rmc:
            timed(contestant.bind(draw(case, device=device)), case.mode)()
            return replace(figure, note=contestant.note)
        verdict = parity.check(contestant.bind, case, device)
    except Exception as error:  # one contestant that breaks must not take the others' figures with it
        status: Status = "error" if contestant.ours else "unavailable"
        return replace(figure, status=status, note=in_short(error), trace=traceback.format_exc())
    finally:
        torch.set_num_threads(threads_before)
    return replace(
        figure, status="timed" if verdict.ok else "parity failed", note=verdict.worst, severity=verdict.severity
    )
