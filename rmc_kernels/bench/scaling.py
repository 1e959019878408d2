"""How figures grow with one size: curves found among the cases of a result, and the slopes of lines through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

from rmc_kernels.bench.cases import SYMBOLS, Case
from rmc_kernels.bench.record import Figure, Spread, TimedCase

#: Symbol of each size that a curve may run along, and what it is.
NAMES = {"B": "batch size", "T": "steps", "N": "memory slots", "D": "width of a slot", "H": "heads"}
#: Fewer points are no curve.
FEWEST_POINTS = 3


@dataclass(frozen=True)
class Point:
    """A contestant at one size.

    Attributes:
        size: of the axis.
        seconds: of one call.
        flops: of one call, counted.
        peak_bytes: peak memory of one call, or None.
    """

    size: int
    seconds: Spread
    flops: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Curve:
    """One contestant along one axis, all else alike.

    Attributes:
        axis: of `NAMES`.
        case: the case of the smallest size.
        contestant: label of the figures.
        points: smallest size first.
    """

    axis: str
    case: Case
    contestant: str
    points: tuple[Point, ...]

    @property
    def setting(self) -> str:
        """What is alike, in a line."""
        return self.case.name.replace(f"{self.axis}={getattr(self.case, SYMBOLS[self.axis])} ", "")

    def slope(self, quantity: str) -> float | None:
        """Slope of log(quantity) over log(size) by least squares, and so the exponent of growth; None if not known.

        Args:
            quantity: "seconds", "flops" or "peak_bytes".
        """
        found = self._known(quantity)
        return slope(found) if len(found) >= FEWEST_POINTS else None

    def last_slope(self, quantity: str) -> float | None:
        """Likewise, between the two largest sizes: nearer to where the curve is going."""
        found = self._known(quantity)
        return slope(found[-2:]) if len(found) >= FEWEST_POINTS else None

    def holds(self, case: Case) -> bool:
        """Whether `case` is one of the curve's."""
        field = SYMBOLS[self.axis]
        size = getattr(case, field)
        return replace(self.case, **{field: size}) == case and any(point.size == size for point in self.points)

    def _known(self, quantity: str) -> list[tuple[float, float]]:
        """(size, value) where there is a value above 0."""
        values = {
            "seconds": [point.seconds.median for point in self.points],
            "flops": [float(point.flops) for point in self.points],
            "peak_bytes": [float(point.peak_bytes or 0) for point in self.points],
        }[quantity]
        return [(point.size, value) for point, value in zip(self.points, values, strict=True) if value > 0]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the least-squares line through log(y) over log(x); at least two points, all above 0."""
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    x_mean, y_mean = fmean(xs), fmean(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread


def curves(results: Sequence[TimedCase]) -> list[Curve]:
    """Every curve in the results: cases that differ in one size alone, at three sizes or more; for each contestant."""
    found = []
    for axis in NAMES:
        groups: dict[tuple[tuple[str, object], ...], dict[int, TimedCase]] = {}
        for result in results:
            sizes = asdict(result.case)
            size = sizes.pop(SYMBOLS[axis])
            groups.setdefault(tuple(sizes.items()), {})[size] = result
        for group in groups.values():
            if len(group) >= FEWEST_POINTS:
                found += _of_group(axis, [group[size] for size in sorted(group)])
    return found


def _of_group(axis: str, results: Sequence[TimedCase]) -> list[Curve]:
    labels = dict.fromkeys(figure.label for result in results for figure in result.figures)
    found = []
    for label in labels:
        points = [
            _point(getattr(result.case, SYMBOLS[axis]), figure)
            for result in results
            for figure in result.figures
            if figure.label == label and figure.timed
        ]
        if len(points) >= FEWEST_POINTS:
            found.append(Curve(axis, results[0].case, label, tuple(points)))
    return found


def _point(size: int, figure: Figure) -> Point:
    return Point(size, figure.spread, figure.flops, figure.peak_bytes)
