"""Every plot of a result: which there are, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rmc_kernels.bench import bars, growth, roofline
from rmc_kernels.bench.record import Figure, Spread, TimedCase
from rmc_kernels.bench.scaling import curves


def draw_all(cases: Sequence[TimedCase], folder: Path, prefix: str) -> list[Path]:
    """Write every plot that the results allow, as PNG; the paths written.

    Cases of a curve are drawn as curves, the others as bars and on the roofline.
    """
    found = curves(cases)
    single = [case for case in cases if not any(curve.holds(case.case) for curve in found)]
    canvases = {
        "speedup": bars.draw(
            single, "times faster than eager PyTorch on one thread (x, log scale)", _speed_up, log=True
        ),
        "peak": bars.draw(single, "share of the float32 FMA peak of its threads (%)", _share_of_peak, log=False),
        "roofline": roofline.draw(single),
        "scaling": growth.draw(found, "seconds"),
        "memory": growth.draw(found, "peak_bytes"),
    }
    written = []
    for name, canvas in canvases.items():
        if canvas is not None:
            written.append(folder / f"{prefix}-{name}.png")
            canvas.savefig(written[-1], dpi=130, bbox_inches="tight")
    return written


def _speed_up(case: TimedCase, figure: Figure) -> Spread | None:
    return case.speed_up(figure) if figure.label != "eager" else None


def _share_of_peak(case: TimedCase, figure: Figure) -> Spread | None:
    return Spread.of([100 * share for share in figure.shares_of_peak]) if figure.fma else None
