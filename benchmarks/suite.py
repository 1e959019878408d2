"""Runs a suite: for each case the line-up, parity, the rounds; what comes out is a `SuiteResult`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rmc_kernels import backends
from rmc_kernels.benchmarks import ceilings, contention, machine, memory, parity, plots, table
from rmc_kernels.benchmarks.cases import SUITES, Case, Group
from rmc_kernels.benchmarks.contestants import Contestant, timed
from rmc_kernels.benchmarks.pace import Pace
from rmc_kernels.benchmarks.problem import draw
from rmc_kernels.benchmarks.record import CaseResult, Figure, timed_figure
from rmc_kernels.benchmarks.timing import Entry, clock_for, interleave

SCHEMA = 1


@dataclass(frozen=True)
class SuiteResult:
    """What a suite gave.

    Attributes:
        name: of the suite.
        machine: where and with what, see `machine.describe`.
        absent: backend -> why it took no part.
        cases: the results.
    """

    name: str
    machine: dict[str, Any]
    absent: dict[str, str]
    cases: list[CaseResult]

    @property
    def ok(self) -> bool:
        """Whether nobody failed parity or broke."""
        return all(case.ok for case in self.cases)

    @property
    def title(self) -> str:
        """What was run, and where."""
        return f"{self.name} suite on {self.machine['processor']}"

    def table(self) -> Table:
        """The figures as a table."""
        return table.render(self.cases, self.title)

    def show(self, console: Console) -> None:
        """Print the table at its full width."""
        table.show(self.cases, self.title, console)

    def notes(self) -> list[str]:
        """What a reader of the table has to know."""
        return table.notes(self.cases, self.absent, self.machine)

    def to_json(self) -> str:
        """All of it, samples included."""
        data = asdict(self) | {"cases": [case.as_dict() for case in self.cases]}
        return json.dumps({"schema": SCHEMA, "ok": self.ok} | data, indent=1)

    def write(self, path: Path) -> list[Path]:
        """Write the JSON to `path` and the plots beside it; the paths written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return [path, *plots.draw_all(self.cases, path.parent, path.stem)]

    @classmethod
    def from_json(cls, text: str) -> SuiteResult:
        """The result that `to_json` wrote.

        Raises:
            ValueError: another schema.
        """
        data = json.loads(text)
        if data.get("schema") != SCHEMA:
            raise ValueError(f"text takes a benchmark result of schema {SCHEMA}, got {data.get('schema')!r}")
        cases = [CaseResult.from_dict(case) for case in data["cases"]]
        return cls(data["name"], data["machine"], data["absent"], cases)


def run_suite(
    name: str,
    *,
    out_dir: Path | None = None,
    console: Console | None = None,
    backend: str = "all",
    against: Sequence[str] | None = None,
    device: str = "cpu",
    threads: Sequence[int] | None = None,
) -> SuiteResult:
    """Run a suite, showing progress.

    Args:
        name: "demo" (about a minute), "quick" (under four) or "full" (about an hour).
        out_dir: folder that gets `bench-NAME.json` and the plots; nothing is written if None.
        console: where progress goes; nowhere if None.
        backend: the one to time, or "all" for every fused one (the reference where there is none).
        against: names of `contestants.RIVALS` for every case; the suite's own if None.
        device: "cpu" or "cuda".
        threads: only cases of these numbers of threads; all if None.

    Returns:
        The figures; `.ok` is False where a contestant failed parity or broke.
    """
    suite = SUITES[name]
    chosen = [
        (case, group if against is None else replace(group, against=tuple(against)))
        for group in suite.groups
        for case in group.cases
        if (threads is None or case.threads in threads) and (device == "cpu" or case.threads == 1)
    ]
    console = console or Console(quiet=True)
    start, about = time.perf_counter(), machine.describe(device)
    names, absent = taking_part(backend, [case for case, _ in chosen], device)
    results = []
    pace = Pace([group.seconds for _, group in chosen], suite.limit)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False) as progress, memory.Meter(device) as meter:
        task = progress.add_task("", total=len(chosen))
        for number, (case, group) in enumerate(chosen):

            def show(share: float, case: Case = case, number: int = number) -> None:
                progress.update(task, description=case.name, completed=number + share, refresh=True)

            show(0)
            paced = replace(group, seconds=pace.allowance(number))
            results.append(run_case(case, paced, names, device, about["load"], meter, show))
            show(1)
    about |= {"seconds": time.perf_counter() - start, "load_after": contention.load_average()}
    result = SuiteResult(name, about, absent, results)
    if out_dir is not None:
        result.write(out_dir / f"bench-{name}.json")
    return result


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
    meter: memory.Meter,
    on_progress: Callable[[float], None],
) -> CaseResult:
    """Check the contestants of one case, time those that are right in turn, then measure their memory."""
    torch.compiler.reset()  # sizes of earlier cases would count against the number of recompilations
    order = memory.Order(case, group.against, backend_names, group.saved, group.at_width)
    contestants = order.contestants()
    figures = [checked(contestant, case, device) for contestant in contestants]
    problem = draw(case, device=device)
    entries = [
        Entry(timed(contestant.bind(problem), case.mode), contestant.threads, clock_for(device, contestant.threads)[1])
        for contestant, figure in zip(contestants, figures, strict=True)
        if figure.status == "timed"
    ]

    def read(threads: int) -> ceilings.Ceilings | None:
        return ceilings.read(threads, case.weight_bytes) if device == "cpu" and ceilings.available() else None

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
    return CaseResult(case, figures, contention.reasons([sample for taken in samples for sample in taken], load))


def checked(contestant: Contestant, case: Case, device: str) -> Figure:
    """A contestant's figure before it is timed: whether it runs and, if it computes the cell, whether it is right."""
    figure = Figure(
        contestant.name, contestant.threads, contestant.flops, clock_for(device, contestant.threads)[0], "timed",
        is_rmc=contestant.is_rmc, parameters=contestant.parameters,
    )  # fmt: skip
    if not contestant.is_rmc:
        return replace(figure, note=contestant.note)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(contestant.threads)
    try:
        verdict = parity.check(contestant.bind, case, device)
    except Exception as error:  # one contestant that breaks must not take the others' figures with it
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return replace(figure, status="error" if contestant.ours else "unavailable", note=reason)
    finally:
        torch.set_num_threads(threads_before)
    return replace(
        figure, status="timed" if verdict.ok else "parity failed", note=verdict.worst, severity=verdict.severity
    )
