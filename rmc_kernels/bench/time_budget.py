"""How long each case may take, so that a suite ends in time on a slow or busy machine, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

#: Seconds of a case for which no time is left: its fewest rounds are run.
LEAST = 1e-3


class TimeBudget:
    """Hands out time to cases in turn.

    What else a case takes besides its rounds (parity, warm-up, memory) is foreseen from the cases before: so much for
    each second of rounds that was wanted.

    Args:
        wanted: seconds of rounds for each case.
        limit: seconds for all of it.
        now: a clock.
    """

    def __init__(self, wanted: Sequence[float], limit: float, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._wanted = wanted
        self._limit = limit
        self._now = now
        self._start = now()
        self._given = 0.0

    def allowance(self, number: int) -> float:
        """Seconds that the rounds of case `number`, which starts now, may take: above 0, at most what was wanted."""
        elapsed = self._now() - self._start
        done, ahead = sum(self._wanted[:number]), sum(self._wanted[number:])
        besides = max(0.0, elapsed - self._given) / done if done else 0.0
        share = (self._limit - elapsed) / ahead - besides
        given = max(LEAST, self._wanted[number] * min(1.0, share))
        self._given += given
        return given
