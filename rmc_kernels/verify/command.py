"""`rmc verify`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rmc_kernels.info import facts
from rmc_kernels.verify.cases import Case
from rmc_kernels.verify.check import CaseResult
from rmc_kernels.verify.histogram import BINS, Histogram, edges, histograms
from rmc_kernels.verify.limits import LARGEST_FACTOR, RMS_FACTOR, Comparison
from rmc_kernels.verify.report import Report, reproducer
from rmc_kernels.verify.runner import Progress as OnResult
from rmc_kernels.verify.runner import run

#: Misses that are shown in full; the JSON has them all.
SHOWN_MISSES = 10
SHOWN_TENSORS = 4
#: Characters of the longest bar of a histogram.
BAR = 24


def verify(
    backend: Annotated[list[str], typer.Option(help="Backend; may be repeated. Default: all.")] = [],  # noqa: B006
    variant: Annotated[list[str], typer.Option(help="Variant; may be repeated. Default: all.")] = [],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="float32, bfloat16 or float16; may be repeated.")] = [],  # noqa: B006
    device: Annotated[list[str], typer.Option(help="cpu or cuda; may be repeated. Default: all.")] = [],  # noqa: B006
    quick: Annotated[bool, typer.Option("--quick", help="A few cases only.")] = False,
    time_budget: Annotated[float, typer.Option(help="Seconds: the cases of --quick, then random ones.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws and of the random cases.")] = 0,
    case: Annotated[Optional[str], typer.Option(help="Verify this one case, as a miss prints it.")] = None,  # noqa: UP045
    histogram: Annotated[bool, typer.Option("--histogram", help="Show how errors are spread below the limit.")] = False,
    json_path: Annotated[Optional[Path], typer.Option("--json", help="Write every result there.")] = None,  # noqa: UP045
) -> None:
    """Verify every backend against float64: outputs and every gradient.

    The error of each tensor may be at most 2 times (RMS) and 4 times (largest) that of plain eager PyTorch in the same
    dtype. Exit code 1 on a miss, 2 on a wrong argument.
    """
    console = Console()
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        cases = None if case is None else [Case.from_json(case)]
        with _progress(console) as on_result:
            report = run(
                backends=backend, variants=variant, dtypes=dtype, devices=device, quick=quick, cases=cases,
                time_budget=time_budget, seed=seed, progress=on_result,
            )  # fmt: skip
    except (TypeError, ValueError) as error:
        console.print(f"rmc verify: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    show(report, console)
    if histogram:
        show_histograms(histograms(report.results), console)
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": facts(), **report.as_dict()}, indent=1) + "\n")
        console.print(f"All {len(report.results)} results: {json_path}", markup=False)
    if not report.ok:
        raise typer.Exit(1)


def show(report: Report, console: Console) -> None:
    """Print a report: a table, what was not served, ReLU inputs that crossed 0, misses, the verdict."""
    table = Table(title="Worst errors against float64, as multiples of those of eager PyTorch")
    for name in ("backend", "variant", "dtype"):
        table.add_column(name, no_wrap=True)
    table.add_column("cases", justify="right")
    table.add_column(f"RMS, limit {RMS_FACTOR:g}", overflow="fold")
    table.add_column(f"largest, limit {LARGEST_FACTOR:g}", overflow="fold")
    table.add_column("verdict")
    for line in report.lines():
        name = line.backend if line.device == "cpu" else f"{line.backend} on {line.device}"
        verdict = f"[red]{line.misses} missed[/]" if line.misses else "[green]right[/]"
        verdict += f", {line.explained} with ReLU flips" if line.explained else ""
        rms = _worst(line.worst_rms, lambda compared: compared.rms_ratio)
        largest = _worst(line.worst_largest, lambda compared: compared.largest_ratio)
        table.add_row(name, line.variant, line.dtype, str(line.cases), rms, largest, verdict)
    console.print(table)
    for (name, place, dtype, reason), count in report.not_served.items():
        console.print(f"not served: {name} on {place}, {dtype}, {count} cases: {reason}", markup=False)
    for result in report.results:
        if result.flips:
            _show_flips(result, console)
    for result in report.misses[:SHOWN_MISSES]:
        _show_miss(result, console)
    if len(report.misses) > SHOWN_MISSES:
        console.print(f"... and {len(report.misses) - SHOWN_MISSES} more misses")
    if report.left_out:
        console.print(f"The time was too short for {report.left_out} built-in cases.", style="yellow")
    ran = sum(result.status != "not served" for result in report.results)
    verdict = (
        "[green]right[/]" if report.ok else ("[red]MISSED[/]" if report.misses else "[red]nothing was verified[/]")
    )
    console.print(f"{verdict}: {ran} cases, {len(report.misses)} misses, {report.seconds:.0f} s")


def show_histograms(found: Sequence[Histogram], console: Console) -> None:
    """Print one table for each backend and dtype: a bar for each bin, its length the share of the tensors."""
    for one in found:
        where = "" if one.device == "cpu" else f" on {one.device}"
        table = Table(title=f"{one.backend}{where}, {one.dtype}: errors of {sum(one.rms)} tensors over the eager ones")
        for name in ("RMS", "tensors", "", "largest", "tensors", ""):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        columns = ((one.rms, edges(RMS_FACTOR)), (one.largest, edges(LARGEST_FACTOR)))
        for number in range(BINS + 1):
            row: list[str] = []
            for counts, lower in columns:
                past = number == BINS
                row.append(f"past {lower[number]:g}" if past else f"{lower[number]:.2f} to {lower[number + 1]:.2f}")
                row += [str(counts[number]), ("[red]{}[/]" if past else "{}").format(_bar(counts[number], sum(counts)))]
            table.add_row(*row)
        console.print(table)


def _bar(count: int, total: int) -> str:
    """Never empty where there is something."""
    return "█" * max(round(BAR * count / total), 1) if count else ""


@contextmanager
def _progress(console: Console) -> Iterator[OnResult]:
    columns = (TextColumn("verify"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("drawing cases", total=1.0)

        def on_result(result: CaseResult, share: float) -> None:
            case = result.case
            bar.update(task, completed=share, description=f"{result.backend} {case.spec.variant} {case.dtype}")
            if result.status == "miss":
                bar.console.print(f"miss: {reproducer(result)}", style="red", markup=False, soft_wrap=True)

        yield on_result


def _worst(found: tuple[str, Comparison] | None, ratio: Callable[[Comparison], float]) -> str:
    return "" if found is None else f"{ratio(found[1]):.2f} {found[0]}"


def _show_flips(result: CaseResult, console: Console) -> None:
    console.print(
        f"right with ReLU inputs on the other side of 0: {result.backend}, {result.case.as_json()}", markup=False
    )
    for flip in result.flips:
        console.print(f"  {flip}", markup=False)


def _show_miss(result: CaseResult, console: Console) -> None:
    console.print(f"\nmissed on {result.draws} draws: {result.reason}", style="red", markup=False)
    for name, found in list(result.misses.items())[:SHOWN_TENSORS]:
        console.print(f"  {name}: {found}", markup=False)
    console.print(f"  {reproducer(result)}", markup=False, soft_wrap=True)
