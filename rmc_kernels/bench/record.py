"""What was measured, as data: figures of contestants, cases of figures; to JSON and back, with samples or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import median, quantiles
from typing import Any, Literal, NamedTuple

from rmc_kernels.bench.cases import Case
from rmc_kernels.bench.contestants import YARDSTICK
from rmc_kernels.bench.timing import Sample

Status = Literal["timed", "parity failed", "error", "unavailable"]
#: The contestant that all others are held against.
OURS = "rmc cpu"
#: Significant digits of what stays of samples: more than any table shows.
DIGITS = 7


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Statistics:
    """What stays of a timed figure without its samples; ratios are paired, round by round.

    Attributes:
        rounds: how many samples there were.
        seconds: of one call.
        best: the shortest of them.
        speed_up: see `TimedCase.speed_up`.
        scaling: see `TimedCase.scaling`.
        times_ours: see `TimedCase.times_ours`.
        share_of_peak: see `Figure.share_of_peak`.
        times_bound: see `Figure.times_bound`.
    """

    rounds: int
    seconds: Spread
    best: float
    speed_up: Spread | None = None
    scaling: Spread | None = None
    times_ours: float | None = None
    share_of_peak: float | None = None
    times_bound: float | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Statistics:
        """The statistics among what `TimedCase.as_dict` wrote of a figure, which are taken out."""
        values: dict[str, Any] = {}
        for name in (column.name for column in fields(cls) if column.name in data):
            values[name] = data.pop(name)
            if f"{name}_low" in data:
                values[name] = Spread(data.pop(f"{name}_low"), values[name], data.pop(f"{name}_high"))
        return cls(**values)


@dataclass(frozen=True)
class Figure:
    """One contestant in one case.

    Attributes:
        contestant: its name.
        threads: it was given.
        flops: of one call, counted.
        clock: what its samples are: "CPU time", "wall time" or "triton.testing.do_bench".
        status: "timed", or why there are no samples.
        note: the reason of any other status; for "timed", the tensor that used most of the parity criterion.
        is_rmc: whether it computes the cell; another model has other weights and no parity.
        parameters: how many the contestant has; 0 in records older than this field.
        peak_bytes: peak memory of one call beyond arguments and parameters; None where it was not measured.
        severity: share of the parity criterion that was used; None for another model or where it could not run.
        trace: of the exception behind an "error" or "unavailable", with those it comes from; empty without one.
        seconds, wall: of one call, sample by sample, by the contestant's clock and on the wall.
        fma, gemm, amx, bandwidth: the ceilings read before each sample (GFLOP/s, GB/s), or empty.
        statistics: what stays of the samples where they were left out, which are empty then.
    """

    contestant: str
    threads: int
    flops: int
    clock: str = "CPU time"
    status: Status = "timed"
    note: str = ""
    is_rmc: bool = True
    parameters: int = 0
    peak_bytes: int | None = None
    severity: float | None = None
    trace: str = ""
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    fma: list[float] = field(default_factory=list)
    gemm: list[float] = field(default_factory=list)
    amx: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    statistics: Statistics | None = None

    @property
    def timed(self) -> bool:
        """Whether there are times, as samples or as statistics."""
        return bool(self.seconds) or self.statistics is not None

    @property
    def rounds(self) -> int:
        """How many samples there are, or were."""
        return len(self.seconds) if self.statistics is None else self.statistics.rounds

    @property
    def spread(self) -> Spread:
        """Of the seconds of one call of a timed figure."""
        return Spread.of(self.seconds) if self.statistics is None else self.statistics.seconds

    @property
    def best(self) -> float:
        """Seconds of the shortest call of a timed figure."""
        return min(self.seconds) if self.statistics is None else self.statistics.best

    def then(self, later: Figure) -> Figure:
        """The figure with the samples of a later pass behind its own; what failed in either has failed."""
        if self.status != "timed" or later.status != "timed":
            return later if self.status == "timed" else self
        columns: dict[str, Any] = {name: [*getattr(self, name), *getattr(later, name)] for name in _SAMPLES}
        return replace(self, **columns)

    @property
    def label(self) -> str:
        """The name, with the threads where there are several."""
        return self.contestant if self.threads == 1 else f"{self.contestant} {self.threads}t"

    @property
    def shares_of_peak(self) -> list[float]:
        """FLOPs / time / FMA peak of its threads, 1 being the peak, sample by sample; empty if not known."""
        rounds = zip(self.seconds, self.fma, strict=False)  # without ceilings `fma` is empty
        return [self.flops / time / (1e9 * peak * self.threads) for time, peak in rounds]

    @property
    def share_of_peak(self) -> float | None:
        """Median of `shares_of_peak`; None if not known."""
        if self.statistics is not None:
            return self.statistics.share_of_peak
        return median(self.shares_of_peak) if self.fma else None

    def times_bound(self, case: Case) -> float | None:
        """Median over the rounds of time / the larger of FLOPs/peak and weight bytes/bandwidth; None if not known.

        It tells something for one batch element. Forward reads the weights once a step and backward once more; to read
        them more often is a choice.
        """
        if self.statistics is not None:
            return self.statistics.times_bound
        if not (self.fma and self.is_rmc and case.batch_size == 1):
            return None
        passes = 1 if case.mode == "forward" else 2
        weights = passes * case.steps * case.weight_bytes
        rounds = zip(self.seconds, self.fma, self.bandwidth, strict=True)
        return median(
            time / max(self.flops / (1e9 * peak * self.threads), weights / (1e9 * rate)) for time, peak, rate in rounds
        )


_CEILINGS = ("fma", "gemm", "amx", "bandwidth")
_SAMPLES = ("seconds", "wall", *_CEILINGS)


def timed_figure(figure: Figure, samples: Sequence[Sample]) -> Figure:
    """The figure with its samples filled in."""
    ceilings = [sample.ceilings for sample in samples if sample.ceilings is not None]
    columns: dict[str, Any] = {
        "seconds": [sample.seconds for sample in samples],
        "wall": [sample.wall for sample in samples],
        **{name: [getattr(c, name) for c in ceilings] for name in _CEILINGS},
    }
    return Figure(**asdict(figure) | columns)


@dataclass(frozen=True)
class TimedCase:
    """One case: its figures, and what speaks against them.

    Attributes:
        case: what was timed.
        figures: of the contestants.
        contention: reasons to distrust the figures; empty on a quiet machine.
    """

    case: Case
    figures: list[Figure]
    contention: list[str]

    def then(self, later: TimedCase) -> TimedCase:
        """The case with the samples of a later pass behind its own; of each kind of contention, the last."""
        figures = [one.then(other) for one, other in zip(self.figures, later.figures, strict=True)]
        kinds = {reason.partition(":")[0]: reason for reason in self.contention + later.contention}
        return replace(self, figures=figures, contention=list(kinds.values()))

    @property
    def ok(self) -> bool:
        """Whether nobody failed parity or broke."""
        return all(figure.status in ("timed", "unavailable") for figure in self.figures)

    def speed_up(self, figure: Figure) -> Spread | None:
        """How many times faster than eager PyTorch on one thread, over the rounds; None without both."""
        if figure.statistics is not None:
            return figure.statistics.speed_up
        return self._ratio(self._find(YARDSTICK), figure)

    def scaling(self, figure: Figure) -> Spread | None:
        """How many times faster than the same contestant on one thread; None for one thread."""
        if figure.statistics is not None:
            return figure.statistics.scaling
        return self._ratio(self._find(figure.contestant), figure) if figure.threads > 1 else None

    def times_ours(self, figure: Figure) -> float | None:
        """Its time over that of `OURS` on as many threads, the median over the rounds; None for ours, or without."""
        if figure.statistics is not None:
            return figure.statistics.times_ours
        ratio = None if figure.contestant == OURS else self._ratio(figure, self._find(OURS, figure.threads))
        return ratio and ratio.median

    def _find(self, contestant: str, threads: int = 1) -> Figure | None:
        return next((f for f in self.figures if f.contestant == contestant and f.threads == threads), None)

    @staticmethod
    def _ratio(base: Figure | None, figure: Figure | None) -> Spread | None:
        if base is None or figure is None or not (base.seconds and figure.seconds):
            return None
        return Spread.of([one / other for one, other in zip(base.seconds, figure.seconds, strict=True)])

    def summary(self, figure: Figure) -> dict[str, Any]:
        """What a reader wants of a figure; everything here follows from the samples."""
        if not figure.timed:
            return {}
        case, spread = self.case, figure.spread
        per_step = [1e6 * seconds / case.steps for seconds in spread]
        speed_up, scaling = self.speed_up(figure), self.scaling(figure)
        return {
            "us_per_step": per_step[1],
            "us_per_step_quartiles": [per_step[0], per_step[2]],
            "us_per_step_best": 1e6 * figure.best / case.steps,
            "tokens_per_second": case.batch_size * case.steps / spread.median,
            "speed_up": speed_up and speed_up.median,
            "speed_up_quartiles": speed_up and [speed_up.low, speed_up.high],
            "scaling": scaling and scaling.median,
            "share_of_fma_peak": figure.share_of_peak,
            "times_bound": figure.times_bound(case),
            "gflops": figure.flops / spread.median / 1e9,
        }

    def without_samples(self) -> TimedCase:
        """The case with statistics in place of samples, and without notes on what was timed."""

        def summarised(figure: Figure) -> Figure:
            if not figure.seconds:
                return figure
            found = Statistics(
                figure.rounds, figure.spread, figure.best, self.speed_up(figure), self.scaling(figure),
                self.times_ours(figure), figure.share_of_peak, figure.times_bound(self.case),
            )  # fmt: skip
            emptied: dict[str, Any] = {name: [] for name in _SAMPLES}
            return replace(figure, note="", statistics=found, **emptied)

        return replace(self, figures=[summarised(figure) for figure in self.figures])

    def as_dict(self) -> dict[str, Any]:
        """As plain data, each figure with its `summary`; without samples rounded, and short: no defaults, no sizes."""
        if any(figure.statistics is not None for figure in self.figures):
            figures = [short(figure) for figure in self.figures]
            return {"name": self.case.name, "figures": figures, "contention": self.contention}
        figures = []
        for figure in self.figures:
            stored = asdict(figure) | {"summary": self.summary(figure)}
            del stored["statistics"]
            figures.append(stored)
        return asdict(self) | {"name": self.case.name, "figures": figures}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TimedCase:
        """The case that `as_dict` wrote; summaries are computed again, not read."""
        figures = []
        for stored in data["figures"]:
            values = {name: value for name, value in stored.items() if name != "summary"}
            if "rounds" in values:
                values["statistics"] = Statistics.from_dict(values)
            figures.append(Figure(**values))
        case = Case(**data["case"]) if "case" in data else Case.from_text(data["name"])
        return cls(case, figures, data["contention"])


#: What a figure's fields are where nobody set them.
_DEFAULTS = asdict(Figure("", 0, 0))


def short(figure: Figure) -> dict[str, Any]:
    """What of a figure is not at its default, rounded, with the statistics among it."""
    shown = {name: value for name, value in asdict(figure).items() if value != _DEFAULTS[name]}
    shown |= shown.pop("statistics", {})
    for name, value in list(shown.items()):
        if isinstance(value, Spread):
            shown |= {name: value.median, f"{name}_low": value.low, f"{name}_high": value.high}
    return {name: _rounded(value) for name, value in shown.items() if value is not None}


def _rounded(value: Any) -> Any:
    """A float to `DIGITS`."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
