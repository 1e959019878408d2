"""`rmc demo`: the whole of it in a few minutes: what is here, verified, timed, and an RMC that learns."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from rmc_kernels import info
from rmc_kernels.bench.suite import run_suite
from rmc_kernels.tasks.comparison import compare, show_comparison
from rmc_kernels.tasks.exits import one_line
from rmc_kernels.tasks.files import replacing
from rmc_kernels.tasks.plots import plot_curves
from rmc_kernels.tasks.presets import PRESETS
from rmc_kernels.verify import run as run_verification
from rmc_kernels.verify.command import show as show_report

SEEDS = (0, 1, 2)
#: A run that takes longer, on a slow machine, ends before its last update; the table tells how many it made.
SECONDS_OF_A_RUN = 80.0


@dataclass(frozen=True)
class Finding:
    """What a stage found.

    Attributes:
        ok: whether all is well.
        summary: the finding in a line.
        data: the finding in full, ready for JSON.
        files: what the stage left behind.
    """

    ok: bool
    summary: str
    data: dict[str, Any]
    files: tuple[Path, ...] = ()


def demo(out: Annotated[Path, typer.Option(help="Folder for the plots and results.json.")] = Path("demo")) -> None:
    """Verify, time and train a Relational Memory Core in a few minutes. Exit code 1 where one of these fails."""
    console = Console()
    with one_line(OSError):
        out.mkdir(parents=True, exist_ok=True)
    stages = {"info": _info, "verify": _verify, "bench": _bench, "training": _training}
    findings: dict[str, Finding] = {}
    seconds: dict[str, float] = {}
    for number, (name, stage) in enumerate(stages.items(), start=1):
        console.rule(f"[bold]{number}/{len(stages)} {name}")
        start = time.perf_counter()
        with one_line(OSError):
            findings[name] = stage(out, console)
        seconds[name] = time.perf_counter() - start
    ok = all(finding.ok for finding in findings.values())
    results = out / "results.json"
    record = {name: {"ok": found.ok, "seconds": seconds[name], **found.data} for name, found in findings.items()}
    with one_line(OSError), replacing(results) as file:
        file.write((json.dumps({"ok": ok, **record}, indent=1) + "\n").encode())
    console.rule("[bold]summary")
    console.print(_summary(findings, seconds))
    for path in (*(path for found in findings.values() for path in found.files), results):
        console.print(f"written: {path}", soft_wrap=True)
    raise typer.Exit(0 if ok else 1)


def _summary(findings: dict[str, Finding], seconds: dict[str, float]) -> Table:
    table = Table("stage", "verdict", "found")
    table.add_column("seconds", justify="right")
    for name, found in findings.items():
        verdict = "[green]good[/]" if found.ok else "[bold red]FAILED[/]"
        table.add_row(name, verdict, found.summary, f"{seconds[name]:.0f}")
    table.add_row("all", "", "", f"{sum(seconds.values()):.0f}")
    return table


def _info(out: Path, console: Console) -> Finding:
    """Versions, the machine, and which backend serves what."""
    info.info()
    facts = info.facts()
    serving = sorted({row["runs"] for row in facts["backends"]})
    return Finding(True, f"torch {facts['versions']['torch']}; backends in use: {', '.join(serving)}", facts)


def _verify(out: Path, console: Console) -> Finding:
    """A few cases of every variant, on every backend that runs here, against float64."""
    columns = (TextColumn("against float64"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=1.0)
        report = run_verification(quick=True, progress=lambda _, share: progress.update(bar, completed=share))
    show_report(report, console)
    right = sum(result.status == "right" for result in report.results)
    return Finding(report.ok, f"{right} cases right, {len(report.misses)} missed", report.as_dict())


def _bench(out: Path, console: Console) -> Finding:
    """A few sizes beside eager PyTorch."""
    result = run_suite("demo", console=console)
    result.show(console)
    for note in result.notes():
        console.print(note, markup=False, highlight=False, style="dim")
    as_json, *plots = result.write(out / "bench-demo.json")
    verdict = "" if result.ok else ", parity FAILED"
    return Finding(result.ok, f"{len(result.cases)} cases{verdict}", json.loads(as_json.read_text()), tuple(plots))


def _training(out: Path, console: Console) -> Finding:
    """The RMC and an LSTM of as many parameters learn Nth farthest, from three seeds each."""
    preset = PRESETS["nth-farthest"]["small"]
    limited = replace(preset, training=replace(preset.training, seconds=SECONDS_OF_A_RUN))
    found = compare(limited, SEEDS, console)
    show_comparison(found, console)
    accuracy = {core: [run.final.accuracy for run in found.runs(core)] for core in ("rmc", "lstm")}
    summary = f"accuracy: RMC {mean(accuracy['rmc']):.1%} (worst seed {min(accuracy['rmc']):.1%}), " + ", ".join(
        [f"LSTM {mean(accuracy['lstm']):.1%}", *(f"{name} {level:.1%}" for name, level in found.levels.items())]
    )
    data = {"levels": found.levels, "left_behind": found.left_behind, "runs": [asdict(run) for run in found.histories]}
    return Finding(found.learnt, summary, data, (plot_curves(found.histories, out / "accuracy.png"),))
