"""The figures as a table to read, and the notes without which it would mislead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from rmc_kernels.benchmarks.record import CaseResult, Figure, Spread

UNTIMED = {"parity failed": "[bold red]parity FAILED[/]", "error": "[bold red]ERROR[/]", "unavailable": "unavailable"}


def render(cases: Sequence[CaseResult], title: str) -> Table:
    """One section a case, one row a contestant."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("contestant", no_wrap=True)
    for header in ("µs/step", "quartiles", "best", "tokens/s", "x eager", "% FMA peak", "x bound"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("notes", overflow="fold")
    for result in cases:
        table.add_section()
        table.add_row(f"[bold]{result.case.name}[/]" + (" [yellow](contended)[/]" if result.contention else ""))
        for figure in result.figures:
            table.add_row(f"  {figure.label}", *_cells(result, figure))
    return table


def _cells(result: CaseResult, figure: Figure) -> tuple[str, ...]:
    if not figure.seconds:
        return (UNTIMED[figure.status], *[""] * 6, figure.note)
    low, median, high = (1e6 * seconds / result.case.steps for seconds in Spread.of(figure.seconds))
    best = 1e6 * min(figure.seconds) / result.case.steps
    tokens = result.case.batch_size * 1e6 / median
    speed_up, scaling = result.speed_up(figure), result.scaling(figure)
    share, bound = figure.share_of_peak, figure.times_bound(result.case)
    notes = [] if figure.is_rmc else [figure.note]
    if scaling is not None:
        notes.append(f"{scaling.median:.2f} x its one thread")
    return (
        f"{median:,.1f}",
        f"{low:,.1f}-{high:,.1f}",
        f"{best:,.1f}",
        f"{tokens:,.0f}",
        f"{speed_up.median:.2f}" if speed_up else "",
        f"{100 * share:.0f}" if share is not None else "",
        f"{bound:.1f}" if bound is not None else "",
        "; ".join(notes),
    )


def notes(cases: Sequence[CaseResult], absent: Mapping[str, str], machine: Mapping[str, Any]) -> list[str]:
    """What the columns mean, who took no part, and where the machine was not quiet."""
    lines = [
        "Medians over interleaved rounds. One thread: CPU time of the process; more: wall time. x eager: against eager "
        "PyTorch on one thread, round by round. % FMA peak: counted FLOPs (backward 2 x forward, 3 x where the step "
        "is computed again) over the float32 peak read beside each sample. x bound (B=1): over the larger of "
        "FLOPs/peak and weight bytes/bandwidth.",
        f"torch {machine['torch']}, Python {machine['python']}, rmc_kernels {machine['rmc_kernels']}, "
        f"{machine['cores']} cores.",
    ]
    if not any(figure.fma for result in cases for figure in result.figures):
        lines.append("Ceilings were not measured: that takes the C++ extension and the CPU.")
    lines += [f"Backend {name} took no part: {reason}." for name, reason in absent.items()]
    lines += [f"CONTENDED {result.case.name}: {'; '.join(result.contention)}." for result in cases if result.contention]
    for result in cases:
        failed = [figure for figure in result.figures if figure.status in ("parity failed", "error")]
        lines += [f"{figure.status.upper()} {result.case.name}, {figure.label}: {figure.note}" for figure in failed]
    return lines
