"""`rmc bench`: the command line of the benchmarks."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from rmc_kernels import backends
from rmc_kernels.bench import compare as comparison
from rmc_kernels.bench import profiling, report, summary, use_cases
from rmc_kernels.bench.cases import SUITES, Case
from rmc_kernels.bench.contestants import RIVALS
from rmc_kernels.bench.gpu import report as gpu
from rmc_kernels.bench.suite import SuiteResult, run_suite

bench = typer.Typer(invoke_without_command=True, no_args_is_help=False)
Result = Annotated[Path, typer.Argument(help="JSON or CSV that `rmc bench` wrote.", exists=True, dir_okay=False)]


@bench.callback()
def run(
    context: typer.Context,
    suite: Annotated[str, typer.Option(help=f"One of: {', '.join(SUITES)}.")] = "quick",
    backend: Annotated[str, typer.Option(help="all, or one of: triton, cpu, reference.")] = "all",
    against: Annotated[str | None, typer.Option(help=f"For every case, of: {','.join(RIVALS)}.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="PATH.json, or a folder; plots go beside it.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Only cases of so many threads; may be repeated.")] = None,
) -> None:
    """Time the cell against eager PyTorch and other models, beside what the machine can do.

    Exit code 1 where a contestant failed parity or broke, 2 on a wrong argument.
    """
    if context.invoked_subcommand is not None:
        return
    console = Console()
    rivals = None if against is None else [name.strip() for name in against.split(",") if name.strip()]
    for name, values, takes in (
        ("suite", [suite], tuple(SUITES)),
        ("backend", [backend], ("all", *backends.CHOICES[1:])),
        ("device", [device], ("cpu", "cuda")),
        ("against", rivals or [], RIVALS),
    ):
        for value in values:
            if value not in takes:
                raise typer.BadParameter(f"--{name} takes one of {', '.join(takes)}; got {value!r}")
    if device == "cuda" and not torch.cuda.is_available():
        console.print(
            f"There is no GPU: torch {torch.__version__} sees no CUDA device. Nothing was timed.", style="red"
        )
        raise typer.Exit(1)
    result = run_suite(suite, console=console, backend=backend, against=rivals, device=device, threads=threads)
    result.show(console)
    for note in result.notes():
        console.print(
            note, markup=False, highlight=False, style="red" if note.startswith(("PARITY", "ERROR")) else None
        )
    if out is not None:
        for path in result.write(out if out.suffix == ".json" else out / f"bench-{suite}.json"):
            console.print(f"written: {path}", highlight=False)
    raise typer.Exit(0 if result.ok else 1)


@bench.command()
def compare(
    old: Result,
    new: Result,
    threshold: Annotated[float, typer.Option(min=0, help="Share by which a time may grow.")] = 0.1,
) -> None:
    """Set two results side by side: exit code 1 where something got slower, larger or was lost.

    A time counts as slower where the whole confidence interval of new over old is past the threshold. There is an
    interval where both have their samples; without, the ratio of the medians counts.
    """
    before, after = read(old), read(new)
    changes = comparison.compare(before, after, threshold)
    console = Console()
    comparison.show(changes, before, after, console)
    if not changes:
        console.print("The two have no case of this package in common.", style="red")
    bad = not changes or any(change.verdict in comparison.REGRESSIONS for change in changes)
    raise typer.Exit(1 if bad else 0)


@bench.command()
def summarize(
    result: Result,
    out: Annotated[Path, typer.Argument(help="PATH.csv to write, or PATH.json, which may be the same file.")],
) -> None:
    """Write a result of `rmc bench` or `make gpu` with medians, quartiles and counts in place of its samples."""
    text, as_csv = result.read_text(encoding="utf-8"), out.suffix == ".csv"
    if gpu.is_report(text):
        if as_csv:
            raise typer.BadParameter(f"OUT must be PATH.json for a report of `make gpu`, got {out}")
        short = gpu.without_samples(text) + "\n"
    else:
        found = read(result)
        short = summary.to_csv(found) if as_csv else found.without_samples().to_json() + "\n"
    out.write_text(short, encoding="utf-8")
    typer.echo(f"written: {out}")


@bench.command()
def profile(
    case: Annotated[str, typer.Argument(help='Such as "B=16 T=16 N=8 D=256, forward+backward, 1 thread".')],
    contestant: Annotated[str, typer.Option(help=f"One of: {', '.join(profiling.CONTESTANTS)}.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="To go on for, after one call.")] = 1.0,
) -> None:
    """See where the time of a case goes: phases of the C++ kernels, or operators of torch."""
    try:
        found = profiling.profile(Case.from_text(case), contestant, seconds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    profiling.show(found, Console())


@bench.command(name="report")
def write_report(
    result: Result,
    documents: Annotated[list[Path] | None, typer.Argument(help="Markdown files with markers.", exists=True)] = None,
) -> None:
    """Write figures into documents, between `<!-- bench NAME -->` and `<!-- /bench -->`; without any, print them."""
    found = read(result)
    if not documents:
        typer.echo(report.everything(found))
    for path in documents or ():
        try:
            text = report.render(path.read_text(encoding="utf-8"), found)
        except ValueError as error:
            raise typer.BadParameter(f"{path}: {error}") from None
        path.write_text(text, encoding="utf-8")
        typer.echo(f"written: {path}")


@bench.command(name="uses")
def time_uses(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Of: {', '.join(use_cases.USE_CASES)}; all without.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="For each case.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="PATH.csv or PATH.json to write.")] = None,
    document: Annotated[Path | None, typer.Option(help="Markdown file with <!-- uses -->.", exists=True)] = None,
) -> None:
    """Time half types, one step at a time, a step of training, and another process on a core."""
    for name in names or ():
        if name not in use_cases.USE_CASES:
            raise typer.BadParameter(f"names takes some of {', '.join(use_cases.USE_CASES)}; got {name!r}")
    console, figures = Console(), []
    for name in names or use_cases.USE_CASES:
        console.print(f"timing: {use_cases.USE_CASES[name].title}")
        figures += use_cases.USE_CASES[name].figures(seconds)
    console.print(use_cases.markdown(figures), markup=False, highlight=False)
    if out is not None:
        written = use_cases.as_csv(figures) if out.suffix == ".csv" else use_cases.as_json(figures)
        out.write_text(written, encoding="utf-8")
    if document is not None:
        document.write_text(use_cases.within(document.read_text(encoding="utf-8"), figures), encoding="utf-8")


def read(path: Path) -> SuiteResult:
    """The result in a file."""
    try:
        text = path.read_text(encoding="utf-8")
        return summary.from_csv(text) if summary.is_csv(text) else SuiteResult.from_json(text)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise typer.BadParameter(f"{path} is no result of `rmc bench`: {error}") from None
