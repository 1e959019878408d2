"""Reasons to distrust a figure, said beside it: something else used the machine, or a ceiling is none."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

from rmc_kernels.bench.timing import Sample

#: Wall over CPU time from which threads count as waiting for a core.
STRETCH = 1.1
#: Spread (90th less 10th percentile, over the median) from which the cores count as changing speed.
SPREAD = 0.15
#: Load average, beyond our own, from which other processes count as running.
LOAD = 0.5
#: How far a GEMM may seem to be above the FMA peak, by noise.
ABOVE_PEAK = 1.05


def reasons(samples: Sequence[Sample], load: float | None) -> list[str]:
    """What speaks against `samples`; empty if nothing does.

    Args:
        samples: of one case.
        load: load average before the suite began, None where the system has none.
    """
    found = []
    ceilings = [sample.ceilings for sample in samples if sample.ceilings is not None]
    if ceilings:
        stretch = statistics.fmean(c.stretch for c in ceilings)
        if stretch > STRETCH:
            found.append(f"threads waited for a core: wall time {stretch:.2f} x CPU time")
        spread = relative_spread([c.fma for c in ceilings])
        if spread > SPREAD:
            found.append(f"cores changed speed: FMA peak spread {100 * spread:.0f} %")
        fma, gemm = (statistics.median(getattr(c, name) for c in ceilings) for name in ("fma", "gemm"))
        if gemm > ABOVE_PEAK * fma:
            found.append(f"the FMA peak is none: {fma:.0f} GFLOP/s, and a GEMM ran at {gemm:.0f}")
    if load is not None and load > LOAD:
        found.append(f"other processes were running: load average {load:.1f} at the start")
    return found


def relative_spread(values: Sequence[float]) -> float:
    """90th less 10th percentile, over the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return (deciles[-1] - deciles[0]) / statistics.median(values)


def load_average() -> float | None:
    """Runnable processes, averaged over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
