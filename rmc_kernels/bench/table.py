"""The figures as a table to read, and the notes without which it would mislead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rmc_kernels.bench.record import Figure, TimedCase

UNTIMED = {"parity failed": "[bold red]parity FAILED[/]", "error": "[bold red]ERROR[/]", "unavailable": "unavailable"}
#: Columns the table needs to be readable.
WIDTH = 136


def show(cases: Sequence[TimedCase], title: str, console: Console) -> None:
    """Print the table at its full width."""
    print_wide(render(cases, title), console)


def print_wide(table: Table, console: Console) -> None:
    """Print a table in `WIDTH` columns at least: a narrow terminal or a log wraps its lines, and cuts no figure off."""
    width = console.width
    console.width = max(width, WIDTH)
    try:
        console.print(table, crop=False)
    finally:
        console.width = width


def render(cases: Sequence[TimedCase], title: str) -> Table:
    """One section a case, one row a contestant."""
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    table.add_column("contestant", no_wrap=True)
    for header in ("µs/step", "± %", "best", "tokens/s", "x eager", "% peak", "x bound", "x 1t", "peak MB"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in cases:
        case = result.case
        lines = [f"[bold]{case.size}[/]", case.mode, f"{case.threads} thread{'s' if case.threads > 1 else ''}"]
        lines += ["[yellow]in doubt[/]"] if result.contention else []
        rows = [_row(result, figure) for figure in result.figures]
        for line, row in zip_longest(lines, rows, fillvalue=""):
            table.add_row(line, *row)
        table.add_section()
    return table


def _row(result: TimedCase, figure: Figure) -> tuple[str, ...]:
    if not figure.timed:
        return (figure.label, UNTIMED[figure.status])
    low, median, high = (1e6 * seconds / result.case.steps for seconds in figure.spread)
    speed_up, scaling = result.speed_up(figure), result.scaling(figure)
    share, bound = figure.share_of_peak, figure.times_bound(result.case)
    return (
        figure.label,
        f"{median:,.1f}",
        f"{50 * (high - low) / median:.0f}",
        f"{1e6 * figure.best / result.case.steps:,.1f}",
        f"{result.case.batch_size * 1e6 / median:,.0f}",
        f"{speed_up.median:.2f}" if speed_up else "",
        f"{100 * share:.0f}" if share is not None else "",
        f"{bound:.1f}" if bound is not None else "",
        f"{scaling.median:.2f}" if scaling else "",
        f"{figure.peak_bytes / 1e6:,.1f}" if figure.peak_bytes is not None else "",
    )


def notes(cases: Sequence[TimedCase], absent: Mapping[str, str], machine: Mapping[str, Any]) -> list[str]:
    """What the columns mean, who took no part, and where the machine was not quiet."""
    lines = [
        f"torch {machine['torch']}, Python {machine['python']}, rmc_kernels {machine['rmc_kernels']}, "
        f"{machine['cores']} cores, float32 unless said otherwise.",
        "µs/step: median over interleaved rounds, ± half the distance of the quartiles; CPU time of the process on one "
        "thread, wall time on more (2t: on two). x eager: times faster than the frozen eager loop on one thread, round "
        "by round; x 1t: than itself on one thread.",
        "% peak: counted FLOPs (backward 2 x forward, 3 x where the step is computed again) over the float32 FMA peak "
        "read beside each sample. peak MB: resident memory that one call needs at its peak beyond its arguments and "
        "parameters, results included. x bound (B=1): over the larger of FLOPs/peak and weight bytes/bandwidth.",
    ]
    figures = [(result.case.name, figure) for result in cases for figure in result.figures]
    if all(figure.share_of_peak is None for _, figure in figures):
        lines.append("Ceilings were not measured: that takes the C++ extension and the CPU.")
    if any(not figure.is_rmc for _, figure in figures):
        lines.append(
            "lstm, gru, transformer: nn.LSTM, nn.GRU and one causal nn.TransformerEncoderLayer of as many parameters, "
            "with `at D` of the width of a slot; other models, so without parity."
        )
    lines += [f"Backend {name} took no part: {reason}." for name, reason in absent.items()]
    lines += [f"IN DOUBT {result.case.name}: {'; '.join(result.contention)}." for result in cases if result.contention]
    untimed = [(name, figure) for name, figure in figures if figure.status != "timed"]
    lines += [f"{figure.status.upper()} {name}, {figure.label}: {figure.note}" for name, figure in untimed]
    return lines
