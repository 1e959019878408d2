"""Runs a suite, case by case; what comes out is a `SuiteResult`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rmc_kernels.bench import contention, machine, memory, plots, table
from rmc_kernels.bench.case_run import run_case, taking_part
from rmc_kernels.bench.cases import SUITES, Case
from rmc_kernels.bench.record import TimedCase
from rmc_kernels.bench.time_budget import TimeBudget

SCHEMA = 1


@dataclass(frozen=True)
class SuiteResult:
    """What a suite gave.

    Attributes:
        name: of the suite.
        machine: where and with what, see `machine.describe`.
        absent: backend -> why it took no part.
        cases: the results.
        command: the command line that repeats it; empty in records older than this field.
    """

    name: str
    machine: dict[str, Any]
    absent: dict[str, str]
    cases: list[TimedCase]
    command: str = ""

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

    def without_samples(self) -> SuiteResult:
        """The result with medians, quartiles and counts in place of samples."""
        return replace(self, cases=[case.without_samples() for case in self.cases])

    def to_json(self) -> str:
        """All of it, samples included where there are any."""
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
        cases = [TimedCase.from_dict(case) for case in data["cases"]]
        return cls(data["name"], data["machine"], data["absent"], cases, data.get("command", ""))


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
        name: "demo" (about a minute), "quick" (under four), "targets" (eight) or "full" (about an hour).
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
    chosen = suite.passes * [
        (case, group if against is None else replace(group, against=tuple(against)))
        for group in (replace(group, seconds=group.seconds / suite.passes) for group in suite.groups)
        for case in group.cases
        if (threads is None or case.threads in threads) and (device == "cpu" or case.threads == 1)
    ]
    console = console or Console(quiet=True)
    start, about = time.perf_counter(), machine.describe(device)
    names, absent = taking_part(backend, [case for case, _ in chosen], device)
    results: dict[Case, TimedCase] = {}
    budget = TimeBudget([group.seconds for _, group in chosen], suite.limit)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False) as progress, memory.Meter(device) as meter:
        task = progress.add_task("", total=len(chosen))
        for number, (case, group) in enumerate(chosen):

            def show(share: float, case: Case = case, number: int = number) -> None:
                progress.update(task, description=case.name, completed=number + share, refresh=True)

            show(0)
            allowed = replace(group, seconds=budget.allowance(number))
            found = run_case(case, allowed, names, device, about["load"], meter, show)
            results[case] = results[case].then(found) if case in results else found
            show(1)
    about |= {"seconds": time.perf_counter() - start, "load_after": contention.load_average()}
    command = f"rmc bench --suite {name} --backend {backend} --device {device}"
    command += "" if against is None else f" --against {','.join(against)}"
    command += "".join(f" --threads {count}" for count in threads or ())
    result = SuiteResult(name, about, absent, list(results.values()), command)
    if out_dir is not None:
        result.write(out_dir / f"bench-{name}.json")
    return result
