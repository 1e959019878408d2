"""Small benchmark cases, and how to run one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from rmc_kernels.bench import case_run, ceilings, memory
from rmc_kernels.bench.cases import SUITES, Case, Group
from rmc_kernels.bench.ceilings import Ceilings
from rmc_kernels.bench.contestants import Contestant, line_up
from rmc_kernels.bench.record import Figure, TimedCase

SMALL = Case(4, 3, 3, 16, 2, 5)
SMALL_TRAINING = replace(SMALL, mode="forward+backward")
ALL_CASES = tuple(dict.fromkeys(case for chosen in SUITES.values() for case in chosen.cases))
BRIEF = 1e-9
QUIET = Ceilings(fma=100.0, gemm=65.0, amx=1000.0, bandwidth=50.0, stretch=1.0)


class CountOps(TorchDispatchMode):
    """Counts dispatched operations, and those of them that are no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Collection[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.ops += 1
        self.kernels += not func.is_view
        return func(*args, **(kwargs or {}))


def figure(
    name: str,
    seconds: list[float],
    *,
    threads: int = 1,
    flops: int = 10**9,
    fma: float = 100.0,
    peak_bytes: int | None = None,
) -> Figure:
    """A timed figure with made-up samples."""
    count = len(seconds)
    return Figure(
        name, threads, flops, "CPU time" if threads == 1 else "wall time", "timed", severity=0.5, seconds=seconds,
        wall=seconds, fma=[fma] * count, gemm=[90.0] * count, amx=[0.0] * count, bandwidth=[10.0] * count,
        peak_bytes=peak_bytes, is_rmc=name.startswith(("rmc", "eager")), parameters=1000,
    )  # fmt: skip


def run_small(monkeypatch: pytest.MonkeyPatch, *extra: Contestant, case: Case = SMALL) -> TimedCase:
    """`run_case` with the eager loop and some further contestants, two rounds."""
    contestants = [*line_up(case, ["eager"], []), *extra]
    monkeypatch.setattr(memory, "line_up", lambda *args, **options: contestants)
    monkeypatch.setattr(ceilings, "read", lambda threads, weight_bytes: QUIET)
    group = Group((case,), (), BRIEF, fewest_rounds=2)
    with memory.Meter("cpu") as meter:
        return case_run.run_case(case, group, [], "cpu", 0.0, meter, lambda share: None)
