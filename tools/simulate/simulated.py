"""Triton's launches on CPU tensors, compiled for a GPU and run by `tools.ptxsim`; and what a run of a cell has to meet.

with simulated("sm_80", schedule="warp", seed=1) as reports:
    kernel[grid](...)
assert not any(report.races for report in reports)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any
from unittest.mock import patch

from rmc_kernels.backends.triton import tiles
from tools.offline import Launch, offline
from tools.ptxsim import Program, Report, Schedule, launch

#: Rows from which on a product on sm_90 takes wgmma, which is not simulated.
_WGMMA_ROWS = 64


@contextmanager
def simulated(target: str, schedule: Schedule = "lockstep", seed: int = 0, **options: Any) -> Iterator[list[Report]]:
    """Launches compile for `target` and run; yields a report for each. On sm_90 the input side has tiles of 32 rows.

    Args:
        target: see `offline`.
        schedule, seed: see `ptxsim.Machine`.
        options: others of `ptxsim.launch`.
    """
    reports: list[Report] = []

    def run(found: Launch) -> None:
        reports.append(
            launch(
                _compiled(found.file("ptx").read_text()), found.grid, found.arguments,
                warps=found.metadata.num_warps, shared=found.metadata.shared, schedule=schedule, seed=seed, **options,
            )
        )  # fmt: skip

    with ExitStack() as stack:
        if target == "sm_90":
            small = replace(tiles.PROJECTION, rows=_WGMMA_ROWS // 2)
            stack.enter_context(patch.object(tiles, "PROJECTION", small))
        stack.enter_context(offline(target, run))
        yield reports


@lru_cache(maxsize=16)
def _compiled(ptx: str) -> Program:
    """Kept, since translating takes longer than many a run."""
    return Program(ptx)
