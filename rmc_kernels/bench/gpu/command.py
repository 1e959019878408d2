"""`python -m rmc_kernels.bench.gpu STAGE`: argparse, since typer may not be there."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

from rmc_kernels.bench.gpu import report
from rmc_kernels.bench.gpu.device import Cuda, Device
from rmc_kernels.bench.gpu.stages import STAGES, Finding, Listener, Result
from rmc_kernels.bench.gpu.workload import Workload, full
from rmc_kernels.errors import in_short
from rmc_kernels.verify.check import refusal

#: Seconds of a stage: a machine that is lent may end a command after ten minutes, and all of them after thirty.
SECONDS = 420.0


def main(arguments: Sequence[str] | None = None, device: Device | None = None, workload: Workload | None = None) -> int:
    """Run stages, each as far as it gets, and write the report.

    Args:
        arguments: of the command line; those of this process if None.
        device: where; a GPU by CUDA if None.
        workload: how much; `workload.full` if None.

    Returns:
        The exit code: 0 where every stage passed, 1 where one did not, 2 where there is nothing to run on.
    """
    parser = argparse.ArgumentParser(prog="python -m rmc_kernels.bench.gpu", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all without")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the report")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of each stage")
    given = parser.parse_args(arguments)
    unknown = [stage for stage in given.stages if stage not in STAGES]
    if unknown:
        parser.error(f"STAGE takes some of {', '.join(STAGES)}; got {', '.join(unknown)}")
    place: Device = device or Cuda()
    workload = workload or full()
    missing = _missing(place, workload)
    if missing:
        print(f"{missing}; nothing was run", file=sys.stderr)
        return 2
    machine = report.machine(place)  # before anything can go wrong with the device
    log_at = report.path_of(place, given.out).with_suffix(".log")
    try:
        log_at.parent.mkdir(parents=True, exist_ok=True)
        opened = log_at.open("a", encoding="utf-8")
    except OSError as error:
        parser.error(f"--out takes a folder that can be written; got {given.out}: {error}")
    passed = []
    with opened as log:
        tell = partial(_tell, log)
        for stage in given.stages or STAGES:
            keep = partial(_keep, tell, partial(report.add, place, machine, stage, out=given.out))
            tell(f"==> {stage}")
            result = _run(stage, place, workload, given.seconds, Listener(tell, keep))
            passed.append(keep(result) and result.ok)
            verdict = "passed" if result.ok else "FAILED"
            tell(f"==> {stage} {verdict} in {result.seconds:.0f} s: {log_at.with_suffix('.md')}")
    return 0 if all(passed) else 1


def _missing(place: Device, workload: Workload) -> str | None:
    """Why nothing can run here, or None: no device, or no cell of the workload that the backend serves on it."""
    missing = place.missing()
    if missing is not None:
        return missing
    refusals = [refusal(case, place.backend, place.name) for case in workload.subjects]
    return refusals[0] if None not in refusals else None


def _keep(tell: Callable[[str], None], write: Callable[[Result], object], result: Result) -> bool:
    """Whether the result could be written; a full disk ends no stage, and the log may still have room."""
    try:
        write(result)
    except Exception as error:
        tell(f"the report could not be written: {in_short(error)}")
        return False
    return True


def _run(stage: str, device: Device, workload: Workload, seconds: float, listener: Listener) -> Result:
    """A stage; where the stage itself breaks, that is its result, and the next one is still run."""
    try:
        return STAGES[stage](device, workload, seconds, listener)
    except Exception as error:
        return Result([Finding(stage, "error", in_short(error), traceback.format_exc())], 0.0)


def _tell(log: TextIO, line: str) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)
