"""The progress bars of trainings: updates, the last evaluation, tokens per second, time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rmc_kernels.tasks.history import Point


class TrainingProgress(Progress):
    """One bar per training; `add` makes one, `show` moves it."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )

    def add(self, name: str, updates: int) -> TaskID:
        """A bar for a training of `updates` updates, whose clock starts with its first news."""
        return self.add_task(name, total=updates, start=False, state="")

    def show(self, bar: TaskID, update: int, tokens_per_second: float, measure: str, point: Point) -> None:
        """Move a bar to `update`; `point` is the latest evaluation."""
        if not self.tasks[bar].started:
            self.start_task(bar)
        found = f"{point.accuracy:.1%}" if measure == "accuracy" else f"perplexity {point.perplexity:,.1f}"
        self.update(bar, completed=update, state=f"{found}, {tokens_per_second:,.0f} tokens/s")
