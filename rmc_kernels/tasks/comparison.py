"""Models of as many parameters, trained equally long, over several seeds: what does each learn?"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
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
from rmc_kernels.tasks.training import TrainingConfig, check_device, checkpoint_to_resume, settings

#: Standard errors by which every RMC run has to be above a level to count as above it.
MARGIN = 5.0
#: Folder, inside that of the runs, of those that chose a learning rate.
TUNING = "tuning"


@dataclass(frozen=True)
class Comparison:
    """The runs of every model, seed by seed, and those that chose each model's learning rate."""

    histories: tuple[History, ...]
    tuning: tuple[History, ...] = ()

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
    folder: Path | None = None,
    rates: Sequence[float] = (),
    command: str = "",
) -> Comparison:
    """Train each model from every seed, with a progress bar each.

    Args:
        preset: the task, the RMC that sets the sizes, and how to train.
        seeds: of the runs of each model.
        console: where the bars go.
        cores: the models.
        processes: runs at a time; None for one on every core of the machine.
        folder: of the runs' checkpoints and curves; a run goes on from its checkpoint if it exists, and a finished one
            stays as it is. None for none.
        rates: learning rates that each model tries, from a seed that is none of `seeds`; its runs take the one that
            did best on the held-out examples. Empty for the preset's.
        command: the command line that repeats it, if there is one.

    Raises:
        OSError: a file cannot be read or written, or is one of a run without a checkpoint.
        TypeError, ValueError: what is asked for cannot be, or `folder` has a run of other settings. Nothing is trained.
    """
    check_device(preset.training.device)

    def job(core: Core, rate: float, seed: int, tuning: bool = False) -> Job:
        model = replace(preset.model, core=core)
        training = replace(preset.training, seed=seed, learning_rate=rate)
        if folder is None:
            return Job(preset.task, model, training, command=command)
        name = run_name(preset.task, model, training)
        path = folder / TUNING / f"{name}-lr{rate:g}.pt" if tuning else folder / f"{name}.pt"
        return Job(preset.task, model, training, path, command)

    best = dict.fromkeys(cores, preset.training.learning_rate)
    tunings = [job(core, rate, max(seeds) + 1, True) for core in cores for rate in rates]
    for tuning in tunings:
        _refuse_another_run([tuning])
    for core in cores:
        for seed in seeds:
            _refuse_another_run([job(core, rate, seed) for rate in rates or [best[core]]])
    tried: list[History] = []
    if tunings:
        tried = _side_by_side(tunings, console, processes)
        best = {core: best_rate([run for run in tried if run.model["core"] == core]) for core in cores}
    # Seed by seed, so that what an interruption leaves is as many runs of each model.
    found = _side_by_side([job(core, best[core], seed) for seed in seeds for core in cores], console, processes)
    return Comparison(tuple(sorted(found, key=lambda run: cores.index(run.model["core"]))), tuple(tried))


def _refuse_another_run(candidates: Sequence[Job]) -> None:
    """Raise ValueError unless a candidate for a run begins it, or may go on from the run's checkpoint."""
    errors = []
    for job in candidates:
        try:
            return _check(job)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _check(job: Job) -> None:
    """Raise ValueError where the checkpoint that a job would go on from is not what the job itself would have made.

    It is not where settings differ, or where the learning rates so far do: a falling schedule goes by the number of
    updates, which a checkpoint may otherwise differ in.
    """
    if job.checkpoint is None:
        return
    loaded = checkpoint_to_resume(job.checkpoint, settings(job.task, job.model, job.training))
    for point in loaded["points"][1:] if loaded else []:
        update, got, wanted = point["update"], point["learning_rate"], job.training.rate(point["update"])
        if not math.isclose(got, wanted, rel_tol=1e-9):
            raise ValueError(
                f"updates must be as many as {job.checkpoint} was trained for, got {job.training.updates}: "
                f"a {job.training.schedule} schedule of so many has a learning rate of {wanted:g} at update {update}, "
                f"not {got:g}"
            )


def best_rate(runs: Sequence[History]) -> float:
    """The learning rate of the run that did best; one that diverged did worst."""

    def score(run: History) -> float:
        found = run.final.accuracy if run.measure == "accuracy" else -run.final.loss
        return found if math.isfinite(run.final.loss) else -math.inf

    rate: float = max(runs, key=score).training["learning_rate"]
    return rate


def _side_by_side(jobs: Sequence[Job], console: Console, processes: int | None) -> list[History]:
    """Run the jobs, with a bar each."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with TrainingProgress(console) as progress:
        bars = [
            progress.add(
                f"{job.model.core.upper()} lr {job.training.learning_rate:g} seed {job.training.seed}",
                job.training.updates,
            )
            for job in jobs
        ]

        def watch(news: News) -> None:
            point = news.point
            speed = point.tokens / point.seconds
            progress.show(bars[news.job], point.update, speed, jobs[news.job].task.measure, point)

        return train_all(jobs, min(len(jobs), processes or available), watch)


def run_name(task: Task, model: ModelConfig, training: TrainingConfig) -> str:
    """What a run's files are called."""
    return f"{task.name}-{model.core}-seed{training.seed}"


def show_tuning(comparison: Comparison, console: Console) -> None:
    """Print what every model reached with every learning rate, and which one its runs took."""
    rates = dict.fromkeys(f"{run.training['learning_rate']:g}" for run in comparison.tuning)
    seed, measure = comparison.tuning[0].training["seed"], comparison.tuning[0].measure
    console.print(f"[bold]{measure} by learning rate[/], seed {seed}")
    table = Table("model", *rates, "taken")
    for core in comparison.cores:
        tried = [run.measured for run in comparison.tuning if run.model["core"] == core]
        table.add_row(core, *tried, f"{comparison.runs(core)[0].training['learning_rate']:g}")
    console.print(table)


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
        table.add_row(
            run.model["core"], str(run.training["seed"]), f"{run.final.update:,}", f"{run.final.seconds:.0f}",
            run.measured, *(f"{run.margin(level):+.0f} s.e." for level in levels.values()),
        )  # fmt: skip
    for name, level in levels.items():
        table.add_row(name, "", "", "", f"{level:.1%}", *[""] * len(levels), style="dim")
    console.print(table)
    if accurate and "rmc" in comparison.cores:
        for name, behind in comparison.left_behind.items():
            verdict = "[green]yes[/]" if behind else "[bold red]NO[/]"
            console.print(f"every RMC seed at least {MARGIN:g} standard errors above {name}: {verdict}")
