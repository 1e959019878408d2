"""Two results of the same suite side by side: ratios of times with confidence intervals, regressions flagged.

Two runs are hours apart, on a machine whose speed changes. So a sample is not taken as it is, but relative to what was
measured beside it: eager PyTorch in the same round, or where eager took no part the FMA peak read before the sample.

A result whose samples were left out has medians only, of ratios to the same yardsticks: they give the ratio of two
results, and no interval around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from rmc_kernels.bench.contestants import YARDSTICK
from rmc_kernels.bench.record import Figure, TimedCase
from rmc_kernels.bench.suite import SuiteResult
from rmc_kernels.bench.table import print_wide

Verdict = Literal["slower", "faster", "more memory", "lost", "same"]
REGRESSIONS: tuple[Verdict, ...] = ("slower", "more memory", "lost")
#: Of the intervals; some dozen are looked at, and chance alone should flag none.
CONFIDENCE = 0.99
RESAMPLES = 2000
#: Growth of peak memory that counts, as a factor and in bytes: pages and allocators make for some.
MEMORY_FACTOR, MEMORY_BYTES = 1.1, 1 << 20


class Interval(NamedTuple):
    """A ratio of medians with its confidence interval."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Change:
    """One contestant of this package in one case, old and new.

    Attributes:
        case: its name.
        contestant: label of the figures.
        relative_to: what times are relative to: "eager", "FMA peak" or "nothing".
        ratio: new time over old time; None where the new one was not timed.
        memory: new peak memory over the old one, or None.
        verdict: "slower" and "faster" where the whole interval is past the threshold.
        sampled: whether both have samples; without them there is no interval: its ends are the ratio itself.
    """

    case: str
    contestant: str
    relative_to: str
    ratio: Interval | None
    memory: float | None
    verdict: Verdict
    sampled: bool = True


def compare(old: SuiteResult, new: SuiteResult, threshold: float = 0.1) -> list[Change]:
    """What changed for this package's contestants that were timed in `old` and whose case is in `new`.

    Args:
        old: a result of any suite.
        new: another, whose cases are matched by name.
        threshold: the share by which a time may grow.
    """
    cases = {result.case.name: result for result in new.cases}
    return [
        _change(before, cases[before.case.name], figure, threshold)
        for before in old.cases
        if before.case.name in cases
        for figure in before.figures
        if figure.contestant.startswith("rmc ") and figure.timed
    ]


def interval(old: Sequence[float], new: Sequence[float]) -> Interval:
    """Median of `new` over median of `old`, with an interval by bootstrap.

    Neighbouring samples share the state of the core, so blocks of them are drawn, a circle of samples being cut into
    blocks as long as the cube root of their number. The seed is fixed: the same samples give the same interval.
    """
    generator = np.random.default_rng(0)
    ratios = _medians(new, generator) / _medians(old, generator)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(np.median(new) / np.median(old)), float(high))


def show(changes: Sequence[Change], old: SuiteResult, new: SuiteResult, console: Console) -> None:
    """Print a table, what makes the two hard to compare, and the verdict."""
    table = Table(title=f"new over old; interval of {100 * CONFIDENCE:.0f} %", title_justify="left")
    table.add_column("case", no_wrap=True)
    table.add_column("contestant", no_wrap=True)
    for header in ("time", "interval", "peak memory"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("relative to", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for change in changes:
        time, span = ("", "")
        if change.ratio is not None:
            time = f"{change.ratio.middle:.3f}"
            span = f"{change.ratio.low:.3f} to {change.ratio.high:.3f}" if change.sampled else "none"
        memory = "" if change.memory is None else f"{change.memory:.2f}"
        style = "bold red" if change.verdict in REGRESSIONS else ("green" if change.verdict == "faster" else "")
        table.add_row(
            change.case, change.contestant, time, span, memory, change.relative_to, change.verdict, style=style
        )  # fmt: skip
    print_wide(table, console)
    for name in ("processor", "torch", "python", "cores"):
        if old.machine[name] != new.machine[name]:
            console.print(f"Not the same {name}: {old.machine[name]}, then {new.machine[name]}.", style="yellow")
    if not all(change.sampled for change in changes):
        console.print(
            "No interval where a result has no samples: there the verdict follows from medians alone.", style="yellow"
        )
    ratios = [change.ratio.middle for change in changes if change.ratio is not None]
    if ratios:
        mean = math.exp(fmean(math.log(ratio) for ratio in ratios))
        console.print(f"Geometric mean of the times: {mean:.3f}.", highlight=False)
    counts = {kind: sum(change.verdict == kind for change in changes) for kind in (*REGRESSIONS, "faster", "same")}
    console.print(", ".join(f"{count} {kind}" for kind, count in counts.items()), highlight=False)


def _change(before: TimedCase, after: TimedCase, old: Figure, threshold: float) -> Change:
    new = next((figure for figure in after.figures if figure.label == old.label and figure.timed), None)
    if new is None:
        return Change(before.case.name, old.label, "nothing", None, None, "lost")
    sampled = bool(old.seconds and new.seconds)
    if sampled:
        relative_to, then, now = _paired(before, old, after, new)
        ratio = interval(then, now)
    else:
        relative_to, middle = _of_medians(before, old, after, new)
        ratio = Interval(middle, middle, middle)
    memory = None
    if old.peak_bytes is not None and new.peak_bytes is not None:
        memory = new.peak_bytes / max(1, old.peak_bytes)
    verdict: Verdict = "same"
    if ratio.low > 1 + threshold:
        verdict = "slower"
    elif memory is not None and memory > MEMORY_FACTOR and _growth(old, new) > MEMORY_BYTES:
        verdict = "more memory"
    elif ratio.high < 1 / (1 + threshold):
        verdict = "faster"
    return Change(before.case.name, old.label, relative_to, ratio, memory, verdict, sampled)


def _paired(before: TimedCase, old: Figure, after: TimedCase, new: Figure) -> tuple[str, list[float], list[float]]:
    """What samples are made relative to, and the old and the new ones."""
    pairs = ((before, old), (after, new))
    eager = [_eager(result) for result, _ in pairs]
    if all(eager):
        then, now = (
            [one / other for one, other in zip(figure.seconds, base, strict=True)]
            for (_, figure), base in zip(pairs, eager, strict=True)
        )
        return "eager", then, now
    if old.fma and new.fma:
        then, now = ([t * peak for t, peak in zip(f.seconds, f.fma, strict=True)] for f in (old, new))
        return "FMA peak", then, now
    return "nothing", old.seconds, new.seconds


def _of_medians(before: TimedCase, old: Figure, after: TimedCase, new: Figure) -> tuple[str, float]:
    """What times are relative to, and new over old, of medians alone."""
    then, now = before.speed_up(old), after.speed_up(new)
    if then is not None and now is not None:
        return "eager", then.median / now.median
    if old.share_of_peak and new.share_of_peak:
        return "FMA peak", old.share_of_peak * new.flops / (new.share_of_peak * old.flops)
    return "nothing", new.spread.median / old.spread.median


def _eager(result: TimedCase) -> list[float]:
    found = (f.seconds for f in result.figures if f.contestant == YARDSTICK and f.threads == 1)
    return next(found, [])


def _growth(old: Figure, new: Figure) -> int:
    return (new.peak_bytes or 0) - (old.peak_bytes or 0)


def _medians(values: Sequence[float], generator: np.random.Generator) -> NDArray[np.float64]:
    """The medians of `RESAMPLES` samples drawn from the values in blocks."""
    count = len(values)
    length = max(1, round(count ** (1 / 3)))
    starts = generator.integers(count, size=(RESAMPLES, math.ceil(count / length), 1))
    places = ((starts + np.arange(length)) % count).reshape(RESAMPLES, -1)[:, :count]
    medians: NDArray[np.float64] = np.median(np.asarray(values)[places], axis=1)
    return medians
