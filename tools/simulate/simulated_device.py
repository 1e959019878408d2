"""A GPU for `rmc_kernels.bench.gpu` where there is none: compiled kernels run in tools.ptxsim, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rmc_kernels.bench.gpu.device import Call, Results
from rmc_kernels.bench.memory import Order
from rmc_kernels.bench.timing import Call as Timed
from rmc_kernels.bench.timing import Clock, Reading

#: Time that a call is said to take, in seconds.
NO_TIME = 1.0


class Simulated:
    """See `Device`; to be used within `simulated`."""

    name = "cpu"
    backend = "triton"
    alone = True
    stood_in = (
        "the GPU: PTX, compiled for sm_80, ran in a simulator (not SASS, no time), torch's operators on the CPU",
        "CUDA graphs: a replay makes the call again",
        "streams: there is one, and nothing is late on it",
        "waiting for the device: nothing would have noticed it",
        "time: a constant, one second a call; memory: not measured",
    )

    def __init__(self, target: str) -> None:
        self.title = f"Simulated {target}"
        self.meter = self

    def missing(self) -> str | None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"name": self.title, "nvidia_smi": None}

    def capture(self, call: Call) -> tuple[Results, Callable[[], None]]:
        results = call()

        def replay() -> None:
            for name, value in call().items():
                results[name].copy_(value)

        return results, replay

    def on_a_late_stream(self, late: Callable[[], None], call: Call) -> Results:
        late()
        return call()

    def refusing_to_wait(self) -> AbstractContextManager[None]:
        return nullcontext()

    def second(self) -> str | None:
        return None

    def clock(self, device: str, threads: int) -> tuple[str, Clock]:
        return "a constant, as there is no time", _without_time

    def clocks(self, work: Callable[[], object]) -> str:
        return ""

    def peak(self, order: Order, number: int) -> int | None:
        return None


def _without_time(call: Timed, count: int) -> Reading:
    call()
    return Reading(NO_TIME * count, NO_TIME * count)
