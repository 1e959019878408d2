"""RMC against an LSTM of as many parameters, trained equally long, over several seeds: does the RMC learn?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

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

    @cached_property
    def left_behind(self) -> dict[str, bool]:
        """For each level, whether every single RMC run ended `MARGIN` standard errors above it."""
        levels = self.histories[0].levels
        return {name: min(run.margin(at) for run in self.runs("rmc")) >= MARGIN for name, at in levels.items()}

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


def table(comparison: Comparison) -> Table:
    """Every run's accuracy, margins and cost."""
    levels = comparison.histories[0].levels
    grid = Table("model", "seed", title=comparison.histories[0].task)
    for title in ("parameters", "updates", "seconds", "accuracy", *(f"above {name}" for name in levels)):
        grid.add_column(title, justify="right")
    for history in comparison.histories:
        final, training = history.final, history.training
        margins = [f"{history.margin(level):+.0f} s.e." for level in levels.values()]
        grid.add_row(
            history.model["core"].upper(), str(training["seed"]), f"{history.parameters:,}", f"{final.update:,}",
            f"{final.seconds:.0f}", f"{final.accuracy:.1%}", *margins,
        )  # fmt: skip
    for name, level in levels.items():
        grid.add_row(name, "", "", "", "", f"{level:.1%}", *[""] * len(levels), style="dim")
    return grid
