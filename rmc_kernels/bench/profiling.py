"""Where the CPU time of one call goes: phases of the C++ kernels, or operators of torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity

from rmc_kernels import backends
from rmc_kernels.bench import models
from rmc_kernels.bench.cases import Case
from rmc_kernels.bench.contestants import YARDSTICK, Run, line_up, timed
from rmc_kernels.bench.problem import draw

#: Who can be profiled: our backends, the yardstick, the other models.
CONTESTANTS = (*(name for name in backends.CHOICES if name != "auto"), YARDSTICK, *models.NAMES)
OUTSIDE = "outside the kernels"


@dataclass(frozen=True)
class Part:
    """A part of a call.

    Attributes:
        name: of a phase or an operator.
        seconds: CPU time of one call, over all threads.
    """

    name: str
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a call goes.

    Attributes:
        case, contestant: what was run.
        seconds: CPU time of one call, all of it.
        calls: how many were averaged.
        parts: the largest first.
    """

    case: Case
    contestant: str
    seconds: float
    calls: int
    parts: tuple[Part, ...]


def profile(case: Case, contestant: str, seconds: float = 1.0) -> Profile:
    """Run a contestant, of `CONTESTANTS`, for about so many seconds, and see where the time goes.

    Raises:
        ValueError: the contestant is unknown, or its backend does not serve `case` on the CPU.
    """
    if contestant not in CONTESTANTS:
        raise ValueError(f"contestant takes one of {', '.join(CONTESTANTS)}; got {contestant!r}")
    backend = backends.BACKENDS.get(contestant)
    if backend is not None:
        reason = backend.unavailable() or backend.refuses(case.spec, getattr(torch, case.dtype), torch.device("cpu"))
        if reason is not None:
            raise ValueError(f"contestant {contestant} does not serve this case: {reason}")
    against, ours = ((), (contestant,)) if backend is not None else ((contestant,), ())
    found = line_up(replace(case, threads=1), against, ours)[-1]
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        call = timed(found.bind(draw(case)), case.mode)
        call()
        run = _phases if contestant == "cpu" else _operators
        return run(case, found.name, call, seconds)
    finally:
        torch.set_num_threads(threads_before)


def show(found: Profile, console: Console, most: int = 20) -> None:
    """Print the largest parts as a table with bars."""
    table = Table(title=f"{found.contestant}: {found.case.name}", title_justify="left")
    table.add_column("part", no_wrap=True)
    for header in ("µs/step", "%"):
        table.add_column(header, justify="right")
    table.add_column("", no_wrap=True, overflow="crop")
    for part in found.parts[:most]:
        share = part.seconds / found.seconds
        per_step = f"{1e6 * part.seconds / found.case.steps:,.2f}"
        table.add_row(part.name, per_step, f"{100 * share:.1f}", "█" * round(30 * share))
    if found.parts[most:]:
        rest = sum(part.seconds for part in found.parts[most:])
        per_step = f"{1e6 * rest / found.case.steps:,.2f}"
        table.add_row(f"{len(found.parts) - most} others", per_step, f"{100 * rest / found.seconds:.1f}", "")
    table.add_section()
    table.add_row("all", f"{1e6 * found.seconds / found.case.steps:,.2f}", "100.0", "")
    console.print(table)
    console.print(
        f"CPU time, mean of {found.calls} calls on {found.case.threads} thread(s); "
        "taking it apart costs some time itself: `rmc bench` tells how long a call takes.",
        highlight=False,
    )


def _phases(case: Case, name: str, call: Run, seconds: float) -> Profile:
    """By the clocks in the C++ kernels; what they do not cover is Python, autograd and allocation."""
    from rmc_kernels import _C  # optional: the caller has seen that the backend is available

    _C.profile_enable(True)
    try:
        _C.profile()
        total, calls = _repeat(call, seconds)
        parts = [Part(phase, 1e-9 * spent / calls) for phase, spent in _C.profile().items() if spent]
    finally:
        _C.profile_enable(False)
    parts.append(Part(OUTSIDE, max(0.0, total - sum(part.seconds for part in parts))))
    return _profile(case, name, total, calls, parts)


def _operators(case: Case, name: str, call: Run, seconds: float) -> Profile:
    """By torch's profiler: what each operator itself took, without those that it called."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        total, calls = _repeat(call, seconds)
    parts = [Part(event.key, 1e-6 * event.self_cpu_time_total / calls) for event in profiler.key_averages()]
    parts.append(Part("between operators", max(0.0, total - sum(part.seconds for part in parts))))
    return _profile(case, name, total, calls, parts)


def _repeat(call: Run, seconds: float) -> tuple[float, int]:
    """CPU time of one call, and how many were made."""
    start, cpu, calls = time.perf_counter(), time.process_time(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        call()
        calls += 1
    return (time.process_time() - cpu) / calls, calls


def _profile(case: Case, name: str, total: float, calls: int, parts: list[Part]) -> Profile:
    return Profile(case, name, total, calls, tuple(sorted(parts, key=lambda part: -part.seconds)))
