"""What a verification found: all results, summed up per backend, variant and dtype, and as JSON."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rmc_kernels.verify.check import CaseResult
from rmc_kernels.verify.histogram import histograms
from rmc_kernels.verify.limits import Comparison


@dataclass(frozen=True)
class Line:
    """The cases of one backend, device, variant and dtype.

    Attributes:
        cases: how many were run.
        misses: how many of them missed.
        explained: how many are right only with ReLU inputs on the other side of 0.
        worst_rms, worst_largest: the comparison with the worst ratio of each kind and its tensor; None without any.
    """

    backend: str
    device: str
    variant: str
    dtype: str
    cases: int
    misses: int
    explained: int
    worst_rms: tuple[str, Comparison] | None
    worst_largest: tuple[str, Comparison] | None


@dataclass(frozen=True)
class Report:
    """All results of one verification.

    Attributes:
        results: one per case and backend.
        seconds: how long it took.
        left_out: built-in cases that a time budget had no time for.
    """

    results: Sequence[CaseResult]
    seconds: float
    left_out: int = 0

    @property
    def ok(self) -> bool:
        """Whether something was verified and nothing missed."""
        return not self.misses and any(result.status == "right" for result in self.results)

    @property
    def misses(self) -> list[CaseResult]:
        """The results that missed."""
        return [result for result in self.results if result.status == "miss"]

    @property
    def not_served(self) -> dict[tuple[str, str, str, str], int]:
        """How many cases were not served, by (backend, device, dtype, reason)."""
        counts: dict[tuple[str, str, str, str], int] = {}
        for result in self.results:
            if result.status == "not served":
                key = (result.backend, result.device, result.case.dtype, result.reason)
                counts[key] = counts.get(key, 0) + 1
        return counts

    def lines(self) -> list[Line]:
        """One line per backend, device, variant and dtype, in the order they were run."""
        groups: dict[tuple[str, str, str, str], list[CaseResult]] = {}
        for result in self.results:
            if result.status != "not served":
                key = (result.backend, result.device, result.case.spec.variant, result.case.dtype)
                groups.setdefault(key, []).append(result)
        return [_line(*key, results) for key, results in groups.items()]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "ok": self.ok,
            "seconds": self.seconds,
            "left_out": self.left_out,
            "histograms": [one.as_dict() for one in histograms(self.results)],
            "results": [_result(result) for result in self.results],
        }


def reproducer(result: CaseResult) -> str:
    """The command line that runs one case again."""
    return (
        f"rmc verify --backend {result.backend} --device {result.device} "
        f"--case {shlex.quote(result.case.as_json())} --seed {result.seed}"
    )


def _line(backend: str, device: str, variant: str, dtype: str, results: list[CaseResult]) -> Line:
    compared = [item for result in results for item in result.comparisons.items()]
    return Line(
        backend,
        device,
        variant,
        dtype,
        cases=len(results),
        misses=sum(result.status == "miss" for result in results),
        explained=sum(bool(result.flips) for result in results),
        worst_rms=max(compared, key=lambda item: item[1].rms_ratio, default=None),
        worst_largest=max(compared, key=lambda item: item[1].largest_ratio, default=None),
    )


def _result(result: CaseResult) -> dict[str, Any]:
    return {
        "backend": result.backend,
        "device": result.device,
        "seed": result.seed,
        "case": result.case.as_json(),
        "status": result.status,
        "reason": result.reason,
        "draws": result.draws,
        "flips": list(result.flips),
        "tensors": {
            name: {
                "elements": found.errors.elements,
                "rms": _number(found.errors.rms),
                "largest": _number(found.errors.largest),
                "eager_rms": found.eager.rms,
                "eager_largest": found.eager.largest,
                "ok": found.ok,
            }
            for name, found in result.comparisons.items()
        },
        "reproduce": reproducer(result),
    }


def _number(value: float) -> float | None:
    """JSON has no infinity: None."""
    return value if math.isfinite(value) else None
