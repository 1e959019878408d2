"""What the machine can do at this moment: the ceilings that are measured beside every sample."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

try:
    from rmc_kernels import _C
except ImportError:  # installed without a compiler: there are no ceilings, and the table says so
    _C = None  # type: ignore[assignment]

#: CPU time of one reading of the FMA peak, the AMX peak and the bandwidth, in seconds.
FMA_SECONDS, AMX_SECONDS, BANDWIDTH_SECONDS = 0.01, 0.004, 0.004


@dataclass(frozen=True)
class Ceilings:
    """One reading.

    Attributes:
        fma: float32 multiply-add peak of one thread, the mean of those that run at once, GFLOP/s.
        amx: bf16 tile peak of one thread, GFLOP/s; 0 without AMX.
        bandwidth: of one thread reading a buffer as large as the weights, GB/s.
        stretch: wall time over CPU time of the FMA loop, which does nothing but compute: 1 on an idle machine.
    """

    fma: float
    amx: float
    bandwidth: float
    stretch: float


def available() -> bool:
    """Whether ceilings can be measured here."""
    return _C is not None


def read(threads: int, weight_bytes: int) -> Ceilings:
    """Measure the ceilings with `threads` threads at once."""
    with ThreadPoolExecutor(threads) as pool:
        spins = list(pool.map(lambda _: _spin(), range(threads)))
    return Ceilings(
        fma=sum(rate for rate, _ in spins) / threads,
        amx=_C.peak_amx(AMX_SECONDS),
        bandwidth=_C.bandwidth(max(4096, weight_bytes), BANDWIDTH_SECONDS),
        stretch=max(stretch for _, stretch in spins),
    )


def _spin() -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.thread_time()
    rate = _C.peak_fma(FMA_SECONDS)
    return rate, (time.perf_counter() - wall) / (time.thread_time() - cpu)


def features() -> dict[str, bool]:
    """Instruction set extensions, and whether this process may use them; empty if not known."""
    return _C.cpu_features() if available() else {}
