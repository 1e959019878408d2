"""The stages: jobs, run apart, each a list of findings."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from rmc_kernels import verify
from rmc_kernels.bench.case_run import checked, run_case
from rmc_kernels.bench.cases import Group, Mode
from rmc_kernels.bench.contestants import line_up, timed
from rmc_kernels.bench.gpu import isolated_process, runtime
from rmc_kernels.bench.gpu.device import Device
from rmc_kernels.bench.gpu.workload import Workload, backends_of
from rmc_kernels.bench.problem import draw
from rmc_kernels.bench.record import TimedCase
from rmc_kernels.errors import in_short
from rmc_kernels.verify.baseline import NO_YARDSTICK
from rmc_kernels.verify.check import CaseResult

Job = TypeVar("Job")
Value = TypeVar("Value")
Status = Literal["right", "wrong", "error", "left out", "no yardstick", "not served"]
#: Most processes side by side: what they wait for is Triton's compiler.
MOST_WORKERS = 16
#: Share of the time of a benchmark in which kernels are compiled for all cases, side by side, before any is timed.
COMPILING = 0.45
#: Seconds of one case of a benchmark, its kernels compiled: one that hangs leaves time for the others.
TIMING = 120.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what became of it.

    Attributes:
        name: of it.
        status: what became of it.
        detail: how right, or why not.
        trace: of the exception, where there was one.
    """

    name: str
    status: Status
    detail: str = ""
    trace: str = ""

    @property
    def fails(self) -> bool:
        """Whether the stage fails by it."""
        return self.status in ("wrong", "error", "left out")

    @property
    def line(self) -> str:
        """To be told; the trace, if any, in lines of its own."""
        return f"{self.status}: {self.name} {self.detail}\n{self.trace}".rstrip()


@dataclass(frozen=True)
class Result:
    """What a stage gave.

    Attributes:
        findings: all of them.
        seconds: that it took.
        cases: benchmark cases.
    """

    findings: list[Finding]
    seconds: float
    cases: list[TimedCase] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether something was found right, and nothing fails."""
        return any(f.status == "right" for f in self.findings) and not any(f.fails for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "ok": self.ok,
            "seconds": self.seconds,
            "findings": [asdict(finding) for finding in self.findings],
            "cases": [case.as_dict() for case in self.cases],
        }


class Listener(NamedTuple):
    """Who hears of a stage while it runs.

    Attributes:
        tell: takes a line.
        keep: takes the result so far, which fails, since the rest is left out.
    """

    tell: Callable[[str], object]
    keep: Callable[[Result], object]


REST = Finding("the rest", "left out", "the run was ended before it")


def verification(device: Device, workload: Workload, seconds: float, listener: Listener) -> Result:
    """Parity of every case, by the criterion of `rmc verify`."""

    def found(job: tuple[verify.Case, str], result: CaseResult) -> list[Finding]:
        if result.reason.startswith(NO_YARDSTICK):
            return [Finding(_name(job), "no yardstick", result.reason)]
        if result.status == "not served":
            kind = f"{result.backend}, {result.case.spec.variant}, {result.case.dtype}"
            return [Finding(kind, "not served", result.reason)]
        if result.status == "right":
            worst = max(result.comparisons.values(), key=lambda compared: compared.severity)
            return [Finding(_name(job), "right", f"{100 * worst.severity:.0f} % of the limit")]
        tensors = "; ".join(f"{tensor}: {compared}" for tensor, compared in result.misses.items())
        detail = f"{result.reason or tensors}; {verify.reproducer(result)}"
        return [Finding(_name(job), "wrong", detail, result.trace)]

    right: set[tuple[str, str]] = set()

    def noted(job: tuple[verify.Case, str], result: CaseResult) -> list[Finding]:
        if result.status == "right" and result.backend == device.backend:
            right.add((result.case.spec.variant, result.case.dtype))
        return found(job, result)

    jobs = backends_of(workload, device.backend)
    result = _collect(partial(_verified, device.name), jobs, _name, noted, device, seconds, listener)
    served = dict.fromkeys((case.spec.variant, case.dtype) for case in workload.subjects)
    missed = [
        Finding(f"{device.backend}, {variant}, {dtype}", "wrong", "no case of it was found right")
        for variant, dtype in served
        if (variant, dtype) not in right
    ]
    for finding in missed:
        listener.tell(finding.line)
    return replace(result, findings=[*result.findings, *missed])


def _verified(device: str, job: tuple[verify.Case, str]) -> CaseResult:
    case, backend = job
    return verify.check_case(case, backend, device=device)


def _name(job: tuple[verify.Case, str]) -> str:
    case, backend = job
    return f"{backend} {case.as_json()}"


def while_running(device: Device, workload: Workload, seconds: float, listener: Listener) -> Result:
    """The same bits, graphs, streams, devices; see `runtime`."""

    def found(case: verify.Case, looks: list[runtime.Look]) -> list[Finding]:
        return [
            Finding(what if status == "not served" else f"{what}: {case.as_json()}", status, detail, trace)
            for what, status, detail, trace in looks
        ]

    function = partial(runtime.look_at, device, workload.repeats)
    return _collect(function, workload.subjects, verify.Case.as_json, found, device, seconds, listener)


def benchmark(mode: Mode, device: Device, workload: Workload, seconds: float, listener: Listener) -> Result:
    """Time and memory in a mode, of contestants that are right; first everything is compiled, side by side."""
    start = time.monotonic()
    groups = [group for group in workload.timed if group.cases[0].mode == mode]
    if not device.alone:
        for done in isolated_process.run_all(
            partial(compile_all, device), groups, workers=_workers(), deadline=start + COMPILING * seconds
        ):
            listener.tell(f"compiled: {_case_name(done.job)} {done.error}")
    cases: list[TimedCase] = []

    def found(group: Group, given: tuple[TimedCase, str]) -> list[Finding]:
        result, clocks = given
        cases.append(result)
        bad = [f"{figure.label}: {figure.status}: {figure.note}" for figure in result.figures if not figure.seconds]
        ours = any(figure.contestant == f"rmc {device.backend}" and figure.seconds for figure in result.figures)
        detail = "; ".join([*bad, *([clocks] if clocks else [])])
        traces = "\n".join(f"{figure.label}: {figure.trace}" for figure in result.figures if figure.trace)
        return [Finding(_case_name(group), "right" if result.ok and ours else "wrong", detail, traces)]

    left = start + seconds - time.monotonic()
    with_cases = Listener(listener.tell, lambda part: listener.keep(replace(part, cases=cases)))
    result = _collect(
        partial(time_case, device), groups, _case_name, found, device, left, with_cases, workers=1, limit=TIMING
    )  # fmt: skip
    return Result(result.findings, time.monotonic() - start, cases)


def _case_name(group: Group) -> str:
    return group.cases[0].name


def compile_all(device: Device, group: Group) -> None:
    """Run every contestant once, so that its kernels are in the caches of Triton and torch."""
    (case,) = group.cases
    for contestant in line_up(case, group.against, [device.backend]):
        checked(contestant, case, device.name)


def time_case(device: Device, group: Group) -> tuple[TimedCase, str]:
    """One case, and the device's clocks under it; the contestants are checked, in this process too, before."""
    (case,) = group.cases
    found = run_case(case, group, [device.backend], device.name, None, device.meter, clock=device.clock)
    return found, _clocks(device, group)


def _clocks(device: Device, group: Group) -> str:
    """Those while the cell is run once more: between the rounds, asking for them would disturb what is timed."""
    (case,) = group.cases
    try:
        (cell,) = line_up(case, (), [device.backend])
        return device.clocks(timed(cell.bind(draw(case, device=device.name)), case.mode))
    except Exception as error:  # what was timed is not to be lost
        return f"clocks: {in_short(error)}"


def _collect(
    function: Callable[[Job], Value],
    jobs: Sequence[Job],
    name: Callable[[Job], str],
    found: Callable[[Job, Value], list[Finding]],
    device: Device,
    seconds: float,
    listener: Listener,
    workers: int | None = None,
    limit: float = float("inf"),
) -> Result:
    """Run jobs, and make findings of what they give."""
    start = time.monotonic()
    count = 0 if device.alone else (workers or _workers())
    findings: list[Finding] = []
    try:
        for done in isolated_process.run_all(function, jobs, workers=count, deadline=start + seconds, limit=limit):
            if done.value is not None:
                some = found(done.job, done.value)
            elif done.begun:
                some = [Finding(name(done.job), "error", done.error, done.trace)]
            else:
                some = [Finding(name(done.job), "left out", "the time was over")]
            findings += some
            for finding in some:
                listener.tell(finding.line)
            listener.keep(Result([*findings, REST], time.monotonic() - start))
    except Exception as broken:  # what was found before it is not to be lost
        findings.append(Finding("the stage", "error", in_short(broken), traceback.format_exc()))
    return Result(findings, time.monotonic() - start)


def _workers() -> int:
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 1))


#: Name on the command line -> stage.
STAGES: dict[str, Callable[[Device, Workload, float, Listener], Result]] = {
    "verify": verification,
    "runtime": while_running,
    "forward": partial(benchmark, "forward"),
    "training": partial(benchmark, "forward+backward"),
}
