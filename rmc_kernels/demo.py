"""`rmc demo`: the whole of it in a few minutes: what is installed, verified, timed, and an RMC that learns."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rmc_kernels import CellSpec, __version__, explain
from rmc_kernels.benchmarks.suite import run_suite
from rmc_kernels.tasks import comparison
from rmc_kernels.tasks.plots import plot_accuracy
from rmc_kernels.tasks.presets import NTH_FARTHEST
from rmc_kernels.verify.runner import run as run_verify

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Stage:
    """What a stage of the demo found.

    Attributes:
        ok: whether all is well.
        summary: the finding in a line.
        data: the finding in full, ready for JSON.
        files: what it left behind.
    """

    ok: bool
    summary: str
    data: dict[str, Any]
    files: tuple[Path, ...] = ()


def demo(out: Annotated[Path, typer.Option(help="Folder for the plots and results.json.")] = Path("demo")) -> None:
    """Verify, time and train a Relational Memory Core in a few minutes; exit code 1 where one of them fails."""
    console = Console()
    stages: dict[str, Callable[[Path, Console], Stage]] = {
        "info": info, "verify": verify, "bench": bench, "training": training,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Stage] = {}
    seconds: dict[str, float] = {}
    for name, stage in stages.items():
        console.rule(f"[bold]{len(found) + 1}/{len(stages)} {name}")
        start = time.perf_counter()
        found[name] = stage(out, console)
        seconds[name] = time.perf_counter() - start
    ok = all(stage.ok for stage in found.values())
    results = out / "results.json"
    kept = {name: {"ok": stage.ok, "seconds": seconds[name], **stage.data} for name, stage in found.items()}
    results.write_text(json.dumps({"ok": ok, **kept}, indent=2) + "\n")
    console.rule("[bold]summary")
    console.print(_summary(found, seconds))
    console.print(f"everything in numbers: {results}")
    raise typer.Exit(0 if ok else 1)


def _summary(found: dict[str, Stage], seconds: dict[str, float]) -> Table:
    table = Table("stage", "", "found", "files")
    table.add_column("seconds", justify="right")
    for name, stage in found.items():
        verdict = "[green]ok" if stage.ok else "[bold red]FAILED"
        table.add_row(name, verdict, stage.summary, "\n".join(map(str, stage.files)), f"{seconds[name]:.0f}")
    return table


def info(out: Path, console: Console) -> Stage:
    """Which versions are here, and which backend runs."""
    preset = NTH_FARTHEST["small"]
    spec = CellSpec.sonnet(preset.task.input_size, preset.model.slots, preset.model.head_size, preset.model.heads)
    explanation = explain(spec, torch.zeros(1))
    data = {
        "rmc_kernels": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "machine": platform.machine(), "cores": os.cpu_count(), "backend": explanation.backend,
        "not_used": dict(explanation.reasons),
    }  # fmt: skip
    for name in ("rmc_kernels", "torch", "python", "machine", "cores"):
        console.print(f"{name}: {data[name]}")
    console.print(f"backends for a float32 cell on the CPU:\n{explanation}")
    return Stage(True, f"backend {explanation.backend}, torch {torch.__version__}", data)


def verify(out: Path, console: Console) -> Stage:
    """Every backend that runs here against float64."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("every backend against float64", total=1.0)
        report = run_verify(quick=True, progress=lambda _, share: progress.update(bar, completed=share))
    cases = sum(line.cases for line in report.lines())
    backends = sorted({line.backend for line in report.lines()})
    summary = f"{cases} cases on {', '.join(backends)}: {len(report.misses)} missed"
    console.print(summary)
    return Stage(report.ok, summary, report.as_dict())


def bench(out: Path, console: Console) -> Stage:
    """A few sizes against eager PyTorch."""
    result = run_suite("demo", console=console)
    console.print(result.table())
    for note in result.notes():
        console.print(note, markup=False, highlight=False, style="dim")
    return Stage(result.ok, f"{len(result.cases)} cases timed", json.loads(result.to_json()), ())


def training(out: Path, console: Console) -> Stage:
    """The RMC and an LSTM of as many parameters learn Nth farthest, from three seeds each."""
    found = comparison.compare(NTH_FARTHEST["small"], SEEDS, console)
    console.print(comparison.table(found))
    worst = {core: min(run.final.accuracy for run in found.runs(core)) for core in ("rmc", "lstm")}
    summary = f"RMC at least {worst['rmc']:.1%}"
    return Stage(
        found.learnt, summary, {"runs": [asdict(history) for history in found.histories]},
        (plot_accuracy(found.histories, out / "accuracy.png"),),
    )  # fmt: skip
