"""Accuracy curves as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from rmc_kernels.tasks.history import History, Point

#: Name and colour of each core; Okabe and Ito's colours, which the colour-blind tell apart.
CORES = {"rmc": ("RMC", "#0072B2"), "lstm": ("LSTM", "#D55E00")}
LEVEL_STYLES = ("--", ":")


def plot_accuracy(histories: Sequence[History], path: Path) -> Path:
    """Draw accuracy against updates for runs of one task: a thin line per run, a thick one for each model's mean."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for core, (name, colour) in CORES.items():
        runs = [history for history in histories if history.model["core"] == core]
        if not runs:
            continue
        for run in runs:
            axes.plot(*_curve([[point] for point in run.points]), color=colour, linewidth=0.8, alpha=0.55)
        evaluations = list(zip(*(run.points for run in runs), strict=False))
        label = f"{name}, {runs[0].parameters:,} parameters" + (f",\nmean of {len(runs)} seeds" if runs[1:] else "")
        axes.plot(*_curve(evaluations), color=colour, linewidth=2.2, label=label)
    for (name, level), style in zip(histories[0].levels.items(), LEVEL_STYLES, strict=True):
        axes.axhline(100 * level, color="0.3", linestyle=style, linewidth=1.2, zorder=3, label=f"{name} ({level:.1%})")
    axes.set(title=histories[0].task, xlabel="updates", ylabel="accuracy on held-out examples (%)", ylim=(0, 102))
    axes.set_xlim(left=0, right=max(run.final.update for run in histories))
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _curve(evaluations: Sequence[Sequence[Point]]) -> tuple[list[int], list[float]]:
    """Updates, and the mean accuracy in percent of the points of each evaluation."""
    return [points[0].update for points in evaluations], [
        100 * mean(p.accuracy for p in points) for points in evaluations
    ]
