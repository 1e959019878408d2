"""`rmc_kernels.verify.kernel` in the simulator, of faulty kernels: python -m tests.triton.faulty_kernel FAULT JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from unittest.mock import patch

from rmc_kernels.backends.triton.device import phases
from rmc_kernels.verify import baseline, kernel
from tools.simulate.simulated import simulated


def _wrong() -> None:
    """A memory gate that is a thousandth off."""
    source = phases.update.src
    changed = source.replace("+ forget_bias)", "+ forget_bias + 0.001)")
    assert changed != source
    phases.update._unsafe_update_src(changed)


def _crash(*arguments: object, **options: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang(*arguments: object, **options: object) -> None:
    time.sleep(3600)


def main(fault: str, request: str) -> None:
    if fault == "wrong":
        _wrong()
    launch = {"crash": _crash, "hang": _hang}.get(fault)
    few = dict.fromkeys(baseline.FEWEST_DRAWS, 4)
    with patch.object(baseline, "FEWEST_DRAWS", few), simulated("sm_80", races=False):
        if launch is None:
            print(json.dumps({"fault": kernel.fault(**json.loads(request))}))
            return
        with patch("tools.simulate.simulated.launch", launch):
            kernel.fault(**json.loads(request))


if __name__ == "__main__":
    main(*sys.argv[1:])
