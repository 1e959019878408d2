"""RMC against an LSTM of as many parameters, trained equally long, over several seeds: does the RMC learn?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from rmc_kernels.tasks.history import History
from rmc_kernels.tasks.jobs import Job, News, train_all
from rmc_kernels.tasks.models import CORES
from rmc_kernels.tasks.presets import Preset
from rmc_kernels.tasks.progress import TrainingProgress

#: Standard errors by which every RMC run has to be above a level to count as above it.
MARGIN = 5.0


@dataclass(frozen=True)
class Comparison:
    """The runs of both models, seed by seed."""

    histories: tuple[History, ...]

    def runs(self, core: str) -> list[History]:
        """The runs of one model, in the order of their seeds."""
        return [history for history in self.histories if history.model["core"] == core]

    @property
    def levels(self) -> dict[str, float]:
        """The task's levels."""
        return dict(self.histories[0].levels)

    @property
    def left_behind(self) -> dict[str, bool]:
        """For each level, whether every single RMC run ended `MARGIN` standard errors above it."""
        return {name: min(run.margin(at) for run in self.runs("rmc")) >= MARGIN for name, at in self.levels.items()}

    @property
    def learnt(self) -> bool:
        """Whether every RMC run left every level behind that needs no relational reasoning."""
        return all(self.left_behind.values())


def compare(preset: Preset, seeds: Sequence[int], console: Console) -> Comparison:
    """Train both models from every seed, a process on every core, with a progress bar each."""
    jobs = [
        Job(preset.task, replace(preset.model, core=core), replace(preset.training, seed=seed))
        for core in CORES
        for seed in seeds
    ]
    processes = min(
        len(jobs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with TrainingProgress(console) as progress:
        bars = [
            progress.add(f"{job.model.core.upper()} seed {job.training.seed}", job.training.updates) for job in jobs
        ]

        def watch(news: News) -> None:
            progress.show(bars[news.job], news.point.update, news.point)

        return Comparison(tuple(train_all(jobs, processes, watch)))


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print every run's accuracy and cost, the levels, and the verdict."""
    first = comparison.histories[0]
    sizes = ", ".join(f"{core.upper()} {comparison.runs(core)[0].parameters:,} parameters" for core in CORES)
    table = Table("model", "seed", title=f"{first.task}\n{sizes}")
    for title in ("updates", "seconds", "accuracy", *(f"above {name}" for name in comparison.levels)):
        table.add_column(title, justify="right")
    for run in comparison.histories:
        table.add_row(
            run.model["core"].upper(), str(run.training["seed"]), f"{run.final.update:,}", f"{run.final.seconds:.0f}",
            f"{run.final.accuracy:.1%}", *(f"{run.margin(level):+.0f} s.e." for level in comparison.levels.values()),
        )  # fmt: skip
    for name, level in comparison.levels.items():
        table.add_row(name, "", "", "", f"{level:.1%}", *[""] * len(comparison.levels), style="dim")
    console.print(table)
    for name, behind in comparison.left_behind.items():
        verdict = "[green]yes[/]" if behind else "[bold red]NO[/]"
        console.print(f"every RMC seed at least {MARGIN:g} standard errors above {name}: {verdict}")
