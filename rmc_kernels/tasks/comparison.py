"""Models of as many parameters, trained equally long, over several seeds: what does each learn?"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rmc_kernels.tasks.cores import Core
from rmc_kernels.tasks.history import History
from rmc_kernels.tasks.jobs import Job, News, train_all
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.presets import Preset
from rmc_kernels.tasks.progress import TrainingProgress
from rmc_kernels.tasks.task import Task
from rmc_kernels.tasks.training import TrainingConfig

#: Standard errors by which every RMC run has to be above a level to count as above it.
MARGIN = 5.0


@dataclass(frozen=True)
class Comparison:
    """The runs of every model, seed by seed."""

    histories: tuple[History, ...]

    def runs(self, core: str) -> list[History]:
        """The runs of one model, in the order of their seeds."""
        return [history for history in self.histories if history.model["core"] == core]

    @property
    def cores(self) -> list[str]:
        """The models, in the order of their runs."""
        return list(dict.fromkeys(history.model["core"] for history in self.histories))

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


def compare(
    preset: Preset,
    seeds: Sequence[int],
    console: Console,
    cores: Sequence[Core] = ("rmc", "lstm"),
    processes: int | None = None,
    checkpoints: Callable[[str], Path] | None = None,
) -> Comparison:
    """Train each model from every seed, with a progress bar each.

    Args:
        preset: the task, the RMC that sets the sizes, and how to train.
        seeds: of the runs of each model.
        console: where the bars go.
        cores: the models.
        processes: runs at a time; None for one on every core of the machine.
        checkpoints: the checkpoint of a run by its name; a run goes on from it if it exists. None for none.
    """
    jobs = []
    for core in cores:
        for seed in seeds:
            model, training = replace(preset.model, core=core), replace(preset.training, seed=seed)
            kept = checkpoints(run_name(preset.task, model, training)) if checkpoints else None
            jobs.append(Job(preset.task, model, training, kept))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(len(jobs), processes or available)
    with TrainingProgress(console) as progress:
        bars = [
            progress.add(f"{job.model.core.upper()} seed {job.training.seed}", job.training.updates) for job in jobs
        ]

        def watch(news: News) -> None:
            point = news.point
            speed = point.tokens / point.seconds
            progress.show(bars[news.job], point.update, speed, preset.task.measure, point)

        return Comparison(tuple(train_all(jobs, processes, watch)))


def run_name(task: Task, model: ModelConfig, training: TrainingConfig) -> str:
    """What a run's files are called."""
    return f"{task.name}-{model.core}-seed{training.seed}"


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print every run's accuracy and cost, the levels, and the verdict."""
    first = comparison.histories[0]
    sizes = ", ".join(f"{core} {comparison.runs(core)[0].parameters:,} parameters" for core in comparison.cores)
    table = Table("model", "seed", title=f"{first.task}\n{sizes}")
    accurate = first.measure == "accuracy"
    levels = comparison.levels if accurate else {}
    for title in ("updates", "seconds", first.measure, *(f"above {name}" for name in levels)):
        table.add_column(title, justify="right")
    for run in comparison.histories:
        found = f"{run.final.accuracy:.1%}" if accurate else f"{run.final.perplexity:,.1f}"
        table.add_row(
            run.model["core"], str(run.training["seed"]), f"{run.final.update:,}", f"{run.final.seconds:.0f}", found,
            *(f"{run.margin(level):+.0f} s.e." for level in levels.values()),
        )  # fmt: skip
    for name, level in levels.items():
        table.add_row(name, "", "", "", f"{level:.1%}", *[""] * len(levels), style="dim")
    console.print(table)
    if accurate and "rmc" in comparison.cores:
        for name, behind in comparison.left_behind.items():
            verdict = "[green]yes[/]" if behind else "[bold red]NO[/]"
            console.print(f"every RMC seed at least {MARGIN:g} standard errors above {name}: {verdict}")
