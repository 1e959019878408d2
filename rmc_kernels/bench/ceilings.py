"""What the machine can do at this moment: the ceilings that are measured beside every sample."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from rmc_kernels.backends.extension import native as _C  # None without a compiler: no ceilings, and the table says so

#: CPU time of one reading of the FMA peak, the AMX peak and the bandwidth, in seconds.
FMA_SECONDS, AMX_SECONDS, BANDWIDTH_SECONDS = 0.01, 0.004, 0.004
#: Seconds between two looks at whether the process is quiet, and until waiting for that is given up.
QUIET_LOOK, QUIET_PATIENCE = 0.002, 0.05


@dataclass(frozen=True)
class Ceilings:
    """One reading.

    Attributes:
        fma: float32 multiply-add peak of one thread, the mean of those that run at once, GFLOP/s.
        gemm: what torch reaches in a large float32 product, GFLOP/s a thread; never above a true FMA peak.
        amx: bf16 tile peak of one thread, GFLOP/s; 0 without AMX.
        bandwidth: of one thread reading a buffer as large as the weights, GB/s.
        stretch: wall time over CPU time of the FMA loop, which does nothing but compute: 1 on an idle machine.
    """

    fma: float
    gemm: float
    amx: float
    bandwidth: float
    stretch: float


def available() -> bool:
    """Whether ceilings can be measured here."""
    return _C is not None


def read(threads: int, weight_bytes: int) -> Ceilings:
    """Measure the ceilings with `threads` threads at once, to which torch is set."""
    gemm = _gemm()
    wait_until_quiet()
    with ThreadPoolExecutor(threads) as pool:
        spins = list(pool.map(lambda _: _spin(), range(threads)))
    return Ceilings(
        fma=sum(rate for rate, _ in spins) / threads,
        gemm=gemm / threads,
        amx=_C.peak_amx(AMX_SECONDS),
        bandwidth=_C.bandwidth(max(4096, weight_bytes), BANDWIDTH_SECONDS),
        stretch=max(stretch for _, stretch in spins),
    )


def wait_until_quiet() -> None:
    """Wait until no thread of this process computes, `QUIET_PATIENCE` at most.

    The threads of torch's OpenMP go on spinning after an operator, here for 10 ms, on the cores of whatever is timed
    next: two threads made a forward pass of 18 ms 1.55 to 1.65 times as fast, and 1.85 times with this.
    """
    end = time.perf_counter() + QUIET_PATIENCE
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(QUIET_LOOK)
        if time.process_time() - before < QUIET_LOOK / 4:
            return


def _spin() -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.thread_time()
    rate = _C.peak_fma(FMA_SECONDS)
    return rate, (time.perf_counter() - wall) / (time.thread_time() - cpu)


def _gemm() -> float:
    a, b = torch.ones(256, 256), torch.ones(256, 768)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * a.numel() * b.shape[1] / best / 1e9


def features() -> dict[str, bool]:
    """Instruction set extensions, and whether this process may use them; empty if not known."""
    return _C.cpu_features() if available() else {}
