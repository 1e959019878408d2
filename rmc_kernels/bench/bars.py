"""Figures as bars: one panel for each mode, one bar a contestant, quartiles as whiskers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rmc_kernels.bench.cases import MODES, Mode
from rmc_kernels.bench.palette import Look, looks
from rmc_kernels.bench.record import Figure, Spread, TimedCase

Value = Callable[[TimedCase, Figure], Spread | None]


def draw(cases: Sequence[TimedCase], label: str, value: Value, *, log: bool) -> Canvas | None:
    """Grouped bars with quartiles, a panel for each mode; None where no figure has a value."""
    panels = {mode: [case for case in cases if case.case.mode == mode] for mode in MODES}
    panels = {mode: chosen for mode, chosen in panels.items() if any(_values(chosen, value))}
    if not panels:
        return None
    look = looks(figure.contestant for case in cases for figure in case.figures)
    rows = max(len(_values(chosen, value)) + len(chosen) for chosen in panels.values())
    canvas = Canvas(figsize=(6.5 * len(panels), 1.6 + 0.24 * rows))
    axes = canvas.subplots(1, len(panels), squeeze=False)[0]
    for ax, (mode, chosen) in zip(axes, panels.items(), strict=True):
        _panel(ax, mode, chosen, look, value, log)
        ax.set_xlabel(label)
    handles = {text: handle for ax in axes for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    above = (0.5, 1.0)
    canvas.legend(handles.values(), handles.keys(), loc="lower center", bbox_to_anchor=above, ncols=5, frameon=False)
    canvas.tight_layout()
    return canvas


def _panel(ax: Axes, mode: Mode, cases: Sequence[TimedCase], look: Mapping[str, Look], value: Value, log: bool) -> None:
    position, ticks = 0.0, []
    for case in cases:
        found = _values([case], value)
        ticks.append(position + (len(found) - 1) / 2)
        for figure, spread in found:
            whiskers = [[spread.median - spread.low], [spread.high - spread.median]]
            start = 1 if log else 0
            ax.barh(
                position, spread.median - start, left=start, height=0.85, color=look[figure.contestant].colour,
                hatch="//" if figure.threads > 1 else "", edgecolor="white", xerr=whiskers, ecolor="0.3",
                label=figure.label,
            )  # fmt: skip
            ax.annotate(f"{spread.median:.3g}", (max(spread.high, start), position), (4, 0), textcoords="offset points",
                        va="center", fontsize=8)  # fmt: skip
            position += 1
        position += 0.8
    ax.set_yticks(ticks, [_tick(case) for case in cases])
    ax.invert_yaxis()
    ax.set_title(mode)
    if log:
        ax.set_xscale("log")
        ax.axvline(1, color="0.3", linewidth=1)
        ax.xaxis.set_major_formatter("{x:g}")
    ax.margins(x=0.15)
    ax.spines[["top", "right"]].set_visible(False)


def _tick(case: TimedCase) -> str:
    threads = "" if case.case.threads == 1 else f"\n{case.case.threads} threads"
    return case.case.size.replace(" N=", "\nN=") + threads + ("\n(in doubt)" if case.contention else "")


def _values(cases: Sequence[TimedCase], value: Value) -> list[tuple[Figure, Spread]]:
    found = [(figure, value(case, figure)) for case in cases for figure in case.figures]
    return [(figure, spread) for figure, spread in found if spread is not None]
