"""The roofline: speed over arithmetic intensity, below the ceilings that were read beside the samples."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from rmc_kernels.bench.cases import MODES, Case
from rmc_kernels.bench.palette import looks
from rmc_kernels.bench.record import Figure, TimedCase

#: One a case.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p", "h")
#: Tile products of bf16 that make one float32 product of the AMX kernels; see docs/cpu-backend.md.
PRODUCTS = 6
#: One a size of the weights.
LINES = ("-", "--", "-.", ":")
CEILING, FAINT = "0.25", "0.55"


def draw(results: Sequence[TimedCase]) -> Canvas | None:
    """A panel for each mode with the cell's implementations on one thread; None where there are no ceilings."""
    panels = {
        mode: [result for result in results if result.case.mode == mode and result.case.threads == 1 and _shown(result)]
        for mode in MODES
    }
    panels = {mode: chosen for mode, chosen in panels.items() if chosen}
    if not panels:
        return None
    canvas = Canvas(figsize=(6.2 * len(panels), 5.2), layout="constrained")
    look = looks(figure.contestant for chosen in panels.values() for result in chosen for figure in _shown(result))
    sizes = list(dict.fromkeys(result.case.size for chosen in panels.values() for result in chosen))
    markers = {size: MARKERS[number % len(MARKERS)] for number, size in enumerate(sizes)}
    for ax, (mode, chosen) in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for result in chosen:
            for figure in _shown(result):
                ax.plot(
                    intensity(result.case, figure), figure.flops / median(figure.seconds) / 1e9, linestyle="",
                    marker=markers[result.case.size], markersize=8, color=look[figure.contestant].colour,
                    markeredgecolor="black", markeredgewidth=0.5,
                )  # fmt: skip
        _ceilings(ax, chosen)
        ax.set_title(f"{mode}, one thread")
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=8, color=drawn.colour, label=name)
        for name, drawn in look.items()
    ]
    handles += [
        Line2D([], [], linestyle="", marker=marker, markersize=8, color="white", markeredgecolor="black", label=size)
        for size, marker in markers.items()
    ]
    canvas.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return canvas


def intensity(case: Case, figure: Figure) -> float:
    """FLOPs for each byte of weights that has to be read: once a step forward, and once more backward."""
    passes = 1 if case.mode == "forward" else 2
    return figure.flops / (passes * case.steps * case.weight_bytes)


def _shown(result: TimedCase) -> list[Figure]:
    return [figure for figure in result.figures if figure.is_rmc and figure.fma and figure.threads == 1]


def _ceilings(ax: Axes, results: Sequence[TimedCase]) -> None:
    """Medians over all samples of the panel; a slope for each size of the weights, since caches differ."""
    figures = [figure for result in results for figure in _shown(result)]
    peak = median(value for figure in figures for value in figure.fma)
    tiles = median(value for figure in figures for value in figure.amx or [0.0])
    rates: dict[int, list[float]] = {}
    for result in results:
        for figure in _shown(result):
            rates.setdefault(result.case.weight_bytes, []).extend(figure.bandwidth)
    slopes = {weights: median(found) for weights, found in sorted(rates.items())}
    reach = [intensity(result.case, figure) for result in results for figure in _shown(result)]
    left, right = min(*reach, peak / max(slopes.values())) / 4, 2 * max(reach)

    def level(value: float, text: str, line: str) -> None:
        ax.axhline(value, color=CEILING, linestyle=line, linewidth=1.2)
        ax.annotate(f"{text}: {value:,.0f} GFLOP/s", (right, value), (-4, 3), textcoords="offset points", ha="right",
                    fontsize=8, color=CEILING)  # fmt: skip

    level(peak, "float32 FMA peak", "-")
    if tiles:
        level(tiles / PRODUCTS, f"AMX bf16 tile peak / {PRODUCTS}", "--")
    for number, (weights, rate) in enumerate(slopes.items()):
        ax.plot(
            [left, peak / rate], [rate * left, peak], color=FAINT, linewidth=1.5, linestyle=LINES[number % len(LINES)],
            label=f"{weights / 1e6:.1f} MB at {rate:.0f} GB/s",
        )  # fmt: skip
    ax.legend(title="weights read by one thread", loc="lower right", fontsize=8, title_fontsize=8, frameon=False)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(left, right)
    ax.set_xlabel("FLOPs per byte of weights read")
    ax.set_ylabel("GFLOP/s (counted FLOPs over time)")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
