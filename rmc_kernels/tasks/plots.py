"""Learning curves as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from rmc_kernels.tasks.files import replacing
from rmc_kernels.tasks.history import History, Point

#: Name and colour of each core; Okabe and Ito's colours, which the colour-blind tell apart.
CORES = {
    "rmc": ("RMC", "#0072B2"),
    "lstm": ("LSTM", "#D55E00"),
    "gru": ("GRU", "#009E73"),
    "transformer": ("Transformer", "#CC79A7"),
}
LEVEL_STYLES = ("--", ":")
#: Of a core's learning rates, where it has several.
RATE_STYLES = ("-", "--", "-.", ":")


def groups(runs: Sequence[History]) -> list[list[History]]:
    """Runs that differ in their seed only, in the order of `CORES`."""
    found: dict[tuple[str, float], list[History]] = {}
    for core in CORES:
        for run in runs:
            if run.model["core"] == core:
                found.setdefault((core, run.training["learning_rate"]), []).append(run)
    return list(found.values())


def model_label(same: Sequence[History], runs: Sequence[History]) -> str:
    """The model of a group of `runs`, with its learning rate if the model has several."""
    core, rate = same[0].model["core"], same[0].training["learning_rate"]
    alone = len({run.training["learning_rate"] for run in runs if run.model["core"] == core}) == 1
    return CORES[core][0] if alone else f"{CORES[core][0]} at {rate:g}"


def plot_curves(histories: Sequence[History], path: Path) -> Path:
    """Draw accuracy or perplexity against updates for runs of one task: a thin line per run, thick ones for means."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    drawn: dict[str, int] = {}
    for runs in groups(histories):
        core = runs[0].model["core"]
        colour, style = CORES[core][1], RATE_STYLES[drawn.setdefault(core, 0) % len(RATE_STYLES)]
        drawn[core] += 1
        for run in runs:
            axes.plot(*_curve(run.measure, [[p] for p in run.points]), style, color=colour, linewidth=0.8, alpha=0.55)
        evaluations = list(zip(*(run.points for run in runs), strict=False))
        name = model_label(runs, histories) + f", {runs[0].parameters:,} parameters"
        name += f",\nmean of {len(runs)} seeds" if runs[1:] else ""
        axes.plot(*_curve(runs[0].measure, evaluations), style, color=colour, linewidth=2.2, label=name)
    first = histories[0]
    axes.set(title=first.task, xlabel="updates")
    if first.measure == "accuracy":
        for (name, level), style in zip(first.levels.items(), LEVEL_STYLES, strict=False):
            label = f"{name} ({level:.1%})"
            axes.axhline(100 * level, color="0.3", linestyle=style, linewidth=1.2, zorder=3, label=label)
        axes.set(ylabel="accuracy on held-out examples (%)", ylim=(0, 102))
    else:
        axes.set(ylabel="perplexity of held-out text", yscale="log")
    axes.set_xlim(left=0, right=max(1, *(run.final.update for run in histories)))
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return write_figure(figure, path, dpi=100)


def write_figure(figure: Figure, path: Path, dpi: int) -> Path:
    """Write a picture in the format that the path's ending names, and return the path; OSError where that fails."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=dpi)
    return path


def _curve(measure: str, evaluations: Sequence[Sequence[Point]]) -> tuple[list[int], list[float]]:
    """Updates, and the mean of the points of each evaluation, accuracies in percent."""

    def value(point: Point) -> float:
        return 100 * point.accuracy if measure == "accuracy" else point.perplexity

    return [points[0].update for points in evaluations], [mean(map(value, points)) for points in evaluations]
