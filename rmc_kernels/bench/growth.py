"""Curves as plots: time or memory of a call over one size, both logarithmic, with fitted slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter

from rmc_kernels.bench.palette import looks
from rmc_kernels.bench.scaling import NAMES, Curve, Point

#: Quantity -> the axis label and what a unit of it is.
LABELS = {"seconds": ("time of a call (ms)", 1e-3), "peak_bytes": ("peak memory of a call (MB)", 1e6)}
COLUMNS = 2


def draw(curves: Sequence[Curve], quantity: str) -> Canvas | None:
    """A panel for each axis and setting; None where no curve has a slope in `quantity`, of `LABELS`."""
    panels: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        if curve.slope(quantity) is not None:
            panels.setdefault((curve.axis, curve.setting), []).append(curve)
    if not panels:
        return None
    rows = math.ceil(len(panels) / COLUMNS)
    canvas = Canvas(figsize=(7.2 * min(COLUMNS, len(panels)), 3.7 * rows), layout="constrained")
    axes = canvas.subplots(rows, min(COLUMNS, len(panels)), squeeze=False).flatten()
    for ax, ((axis, setting), chosen) in zip(axes, panels.items(), strict=False):
        _panel(ax, chosen, quantity)
        ax.set_title(setting, fontsize=10)
        ax.set_xlabel(f"{axis}: {NAMES[axis]}")
        ax.set_ylabel(LABELS[quantity][0])
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return canvas


def _panel(ax: Axes, curves: Sequence[Curve], quantity: str) -> None:
    look = looks(curve.contestant for curve in curves)
    for curve in curves:
        points = [(point.size, *_value(point, quantity)) for point in curve.points]
        sizes, low, middle, high = zip(*(point for point in points if point[2] > 0), strict=True)
        drawn = look[curve.contestant]
        ax.plot(
            sizes, middle, color=drawn.colour, marker=drawn.marker, linestyle=drawn.line, markersize=5, linewidth=1.5,
            markerfacecolor="white" if drawn.line == "--" else drawn.colour,
            label=f"{curve.contestant}: {curve.slope(quantity):.2f}, {curve.last_slope(quantity):.2f}",
        )  # fmt: skip
        ax.fill_between(sizes, low, high, color=drawn.colour, alpha=0.15, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sorted({point.size for curve in curves for point in curve.points}))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(
        title=f"slope in {curves[0].axis}: fitted, at the end", loc="upper left", bbox_to_anchor=(1.01, 1.0),
        frameon=False, fontsize=8, title_fontsize=8, alignment="left",
    )  # fmt: skip


def _value(point: Point, quantity: str) -> tuple[float, float, float]:
    """Low, middle and high in the unit of the axis."""
    unit = LABELS[quantity][1]
    if quantity == "seconds":
        return (point.seconds.low / unit, point.seconds.median / unit, point.seconds.high / unit)
    return ((point.peak_bytes or 0) / unit,) * 3
