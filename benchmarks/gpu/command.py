"""`python -m rmc_kernels.benchmarks.gpu STAGE`: argparse, since typer may not be there."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rmc_kernels.benchmarks.gpu import apart, report
from rmc_kernels.benchmarks.gpu.device import Cuda, Device
from rmc_kernels.benchmarks.gpu.plan import Plan, full
from rmc_kernels.benchmarks.gpu.stages import STAGES, Finding, Result

#: Seconds of a stage: a machine that is lent may end a command after ten minutes.
SECONDS = 540.0


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
    missing = place.missing() or (None if find_spec("triton") else "triton is not installed")
    if missing:
        print(f"{missing}; nothing was run", file=sys.stderr)
        return 2
    plan = plan or full()
    passed = []
    for stage in given.stages or STAGES:
        print(f"==> {stage}", flush=True)
        result = _run(stage, place, plan, given.seconds)
        passed.append(result.ok)
        written = report.add(place, stage, result, given.out)
        verdict = "passed" if result.ok else "FAILED"
        print(f"==> {stage} {verdict} in {result.seconds:.0f} s: {', '.join(map(str, written))}", flush=True)
    return 0 if all(passed) else 1


def _run(stage: str, device: Device, plan: Plan, seconds: float) -> Result:
    """A stage; where the stage itself breaks, that is its result, and the next one is still run."""
    try:
        return STAGES[stage](device, plan, seconds, lambda line: print(line, flush=True))
    except Exception as error:
        traceback.print_exc()
        return Result([Finding(stage, "error", apart.reason(error))], 0.0)
