"""Small benchmark cases, and how to run one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rmc_kernels.benchmarks import ceilings, suite, timing
from rmc_kernels.benchmarks.cases import SUITES, Case, Suite
from rmc_kernels.benchmarks.ceilings import Ceilings
from rmc_kernels.benchmarks.contestants import (
    Contestant,
    line_up,
)
from rmc_kernels.benchmarks.record import CaseResult

SMALL = Case(4, 3, 3, 16, 2, 5)
SMALL_TRAINING = replace(SMALL, mode="forward+backward")
ALL_CASES = tuple(dict.fromkeys(case for chosen in SUITES.values() for case in chosen.cases))
BRIEF = 1e-9
QUIET = Ceilings(fma=100.0, gemm=65.0, amx=1000.0, bandwidth=50.0, stretch=1.0)


def run_small(monkeypatch: pytest.MonkeyPatch, *extra: Contestant, case: Case = SMALL) -> CaseResult:
    """`run_case` with the eager loop and some further contestants, one round."""
    contestants = [*line_up(case, [], [], both_modes=False), *extra]
    monkeypatch.setattr(suite, "line_up", lambda *args: contestants)
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(ceilings, "read", lambda threads, weight_bytes: QUIET)
    return suite.run_case(case, Suite((case,), (), BRIEF), [], "cpu", 0.0, lambda share: None)
