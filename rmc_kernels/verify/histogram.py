"""How errors are spread below the limit: a histogram of all tensors' ratios, per backend and dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rmc_kernels.verify.check import CaseResult
from rmc_kernels.verify.limits import LARGEST_FACTOR, RMS_FACTOR

#: Bins below the limit, all of one width; what is past it is in one more.
BINS = 8


@dataclass(frozen=True)
class Histogram:
    """Errors of one backend in one dtype, as multiples of the eager ones.

    Attributes:
        backend, device, dtype: whose.
        rms, largest: how many tensors are in each bin, `BINS` of them up to the limit and one past it.
    """

    backend: str
    device: str
    dtype: str
    rms: tuple[int, ...]
    largest: tuple[int, ...]

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON, with the edges of the bins; the last bin has no upper edge."""
        return {
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
            "rms": {"edges": edges(RMS_FACTOR), "counts": list(self.rms)},
            "largest": {"edges": edges(LARGEST_FACTOR), "counts": list(self.largest)},
        }


def edges(limit: float) -> list[float]:
    """Lower edges of the bins, the last of them the limit."""
    return [limit * number / BINS for number in range(BINS + 1)]


def histograms(results: Iterable[CaseResult]) -> list[Histogram]:
    """One per backend, device and dtype, in the order they were run; of every tensor that was compared."""
    found: dict[tuple[str, str, str], tuple[Counter[int], Counter[int]]] = {}
    for result in results:
        if result.comparisons:
            rms, largest = found.setdefault((result.backend, result.device, result.case.dtype), (Counter(), Counter()))
            rms.update(_bin(compared.rms_ratio, RMS_FACTOR) for compared in result.comparisons.values())
            largest.update(_bin(compared.largest_ratio, LARGEST_FACTOR) for compared in result.comparisons.values())
    return [Histogram(*key, _counts(rms), _counts(largest)) for key, (rms, largest) in found.items()]


def _bin(ratio: float, limit: float) -> int:
    """The bin of a ratio; the limit itself is still right, and infinity is past it."""
    return min(int(BINS * ratio / limit), BINS - 1) if ratio <= limit else BINS


def _counts(counter: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(counter.get(number, 0) for number in range(BINS + 1))
