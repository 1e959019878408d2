"""`python -m rmc_kernels.benchmarks.gpu STAGE`: argparse, since typer may not be there."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from rmc_kernels.backends import BACKENDS
from rmc_kernels.benchmarks.gpu import report
from rmc_kernels.benchmarks.gpu.device import Cuda, Device
from rmc_kernels.benchmarks.gpu.plan import Plan, full
from rmc_kernels.benchmarks.gpu.stages import STAGES, Finding, Result
from rmc_kernels.errors import in_short

#: Seconds of a stage: a machine that is lent may end a command after ten minutes, and all of them after thirty.
SECONDS = 420.0


def main(arguments: Sequence[str] | None = None, device: Device | None = None, plan: Plan | None = None) -> int:
    """Run stages, each as far as it gets, and write the report.

    Args:
        arguments: of the command line; those of this process if None.
        device: where; a GPU by CUDA if None.
        plan: how much; `plan.full` if None.

    Returns:
        The exit code: 0 where every stage passed, 1 where one did not, 2 where there is nothing to run on.
    """
    parser = argparse.ArgumentParser(prog="python -m rmc_kernels.benchmarks.gpu", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all without")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the report")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of each stage")
    given = parser.parse_args(arguments)
    unknown = [stage for stage in given.stages if stage not in STAGES]
    if unknown:
        parser.error(f"STAGE takes some of {', '.join(STAGES)}; got {', '.join(unknown)}")
    place: Device = device or Cuda()
    missing = place.missing() or BACKENDS[place.backend].unavailable()
    if missing:
        print(f"{missing}; nothing was run", file=sys.stderr)
        return 2
    plan = plan or full()
    machine = report.machine(place)  # before anything can go wrong with the device
    log_at = report.path_of(place, given.out).with_suffix(".log")
    log_at.parent.mkdir(parents=True, exist_ok=True)
    passed = []
    with log_at.open("a", encoding="utf-8") as log:  # what a killed run leaves
        for stage in given.stages or STAGES:
            _tell(log, f"==> {stage}")
            result = _run(stage, place, plan, given.seconds, lambda line: _tell(log, line))
            passed.append(result.ok)
            written = report.add(place, machine, stage, result, given.out)
            verdict = "passed" if result.ok else "FAILED"
            _tell(log, f"==> {stage} {verdict} in {result.seconds:.0f} s: {', '.join(map(str, written))}")
    return 0 if all(passed) else 1


def _run(stage: str, device: Device, plan: Plan, seconds: float, tell: Callable[[str], None]) -> Result:
    """A stage; where the stage itself breaks, that is its result, and the next one is still run."""
    try:
        return STAGES[stage](device, plan, seconds, tell)
    except Exception as error:
        return Result([Finding(stage, "error", in_short(error), traceback.format_exc())], 0.0)


def _tell(log: TextIO, line: str) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)
