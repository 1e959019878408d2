"""What the project asks of the C++ backend in float32, to hold a result against; no test asserts a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rmc_kernels.bench.cases import MODES, Case
from rmc_kernels.bench.record import Figure, TimedCase


@dataclass(frozen=True)
class Measure:
    """What is asked for.

    Attributes:
        shown: format of a value.
        at_least: whether a target is to be reached from below; else it is not to be exceeded.
        of: the value of a figure in its case; None where it cannot be told.
    """

    shown: str
    at_least: bool
    of: Callable[[TimedCase, Figure], float | None]

    def met(self, value: float, target: float) -> bool:
        """Whether the value is as asked."""
        return value >= target if self.at_least else value <= target


class Target(NamedTuple):
    """What one case has to reach, and what the project aims at."""

    case: Case
    measure: Measure
    least: float
    aim: float | None

    def verdict(self, value: float) -> str:
        """Whether the case missed the target, met it, or met the aim, too."""
        if not self.measure.met(value, self.least):
            return "missed"
        return "at the aim" if self.aim is not None and self.measure.met(value, self.aim) else "met"


def _scaling(case: TimedCase, figure: Figure) -> float | None:
    spread = case.scaling(figure)
    return None if spread is None else spread.median


SHARE = Measure("{:.0%} of the FMA peak", True, lambda case, figure: figure.share_of_peak)
BOUND = Measure("{:.1f} x the bound", False, lambda case, figure: figure.times_bound(case.case))
SCALING = Measure("{:.2f} x one thread", True, _scaling)

#: (batch, steps, slots, D) -> measure, and for each mode of `MODES` the target and the aim.
_ONE_THREAD = {
    (16, 16, 8, 256): (SHARE, ((0.65, 0.85), (0.50, 0.75))),
    (64, 16, 8, 256): (SHARE, ((0.65, 0.85), (0.50, 0.75))),
    (64, 16, 4, 128): (SHARE, ((0.55, 0.75), (0.45, 0.65))),
    (1, 32, 8, 256): (BOUND, ((3.0, 2.0), (4.0, 2.5))),
    (1, 32, 4, 128): (BOUND, ((4.0, 2.0), (5.0, 2.5))),
}
_TWO_THREADS = (1.7, 1.6)

TARGETS: tuple[Target, ...] = (
    *(
        Target(Case(*sizes, mode=mode), measure, *values)
        for sizes, (measure, by_mode) in _ONE_THREAD.items()
        for mode, values in zip(MODES, by_mode, strict=True)
    ),
    *(
        Target(Case(*sizes, threads=2, mode=mode), SCALING, least, None)
        for sizes in _ONE_THREAD
        if sizes[0] >= 16
        for mode, least in zip(MODES, _TWO_THREADS, strict=True)
    ),
)
