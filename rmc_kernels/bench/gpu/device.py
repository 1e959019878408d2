"""What of the GPU and of CUDA's run time the stages use: the one seam between them and a machine without a GPU."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from rmc_kernels.bench import memory
from rmc_kernels.bench.case_run import Meter
from rmc_kernels.bench.timing import Clock, clock_for

Results = Mapping[str, Tensor]
Call = Callable[[], Results]

#: What is asked of nvidia-smi.
QUERIES = (
    "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw",
    "power.limit", "temperature.gpu",
)  # fmt: skip
#: What is asked while the GPU works; and what holds its clocks down, as bits, by the name that newer drivers have for
#: it and by the older one. A driver refuses a whole query for one name that it does not know.
WHILE_BUSY = ("pstate", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
HELD_DOWN_BY = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
#: Calls before a capture, as torch's notes on CUDA graphs ask for.
WARM_UPS = 3
#: Size and number of the products that keep a stream busy for some tenths of a second.
DELAY_WIDTH, DELAY_PRODUCTS = 8192, 12
#: Seconds of work before clocks are read, which an idle GPU has lowered; that it raises them within so long is assumed.
BUSY_SECONDS = 1.0


class Device(Protocol):
    """Where the stages run.

    Attributes:
        name: of the torch device.
        backend: that is looked at.
        alone: whether jobs run in this process, one after the other.
    """

    name: str
    backend: str
    alone: bool

    @property
    def title(self) -> str:
        """For the report."""

    @property
    def stood_in(self) -> tuple[str, ...]:
        """What something else stands in for, a line each; empty on a GPU."""

    @property
    def meter(self) -> Meter:
        """Of memory."""

    def missing(self) -> str | None:
        """Why nothing can run here, or None."""

    def facts(self) -> dict[str, Any]:
        """The device and its driver, as plain data."""

    def capture(self, call: Call) -> tuple[Results, Callable[[], None]]:
        """Capture a call in a CUDA graph: its results, and what replays it into them."""

    def on_a_late_stream(self, late: Callable[[], None], call: Call) -> Results:
        """`late`, after a long wait, and then the call, on a stream that is not the default one."""

    def refusing_to_wait(self) -> Any:
        """A context in which an operation that waits for the device raises."""

    def second(self) -> str | None:
        """Name of a device that is not the current one, or None."""

    def clock(self, device: str, threads: int) -> tuple[str, Clock]:
        """See `timing.clock_for`."""

    def clocks(self, work: Callable[[], object]) -> str:
        """Clocks, power and temperature while the device does `work`, again and again; empty where nothing tells."""


class Cuda:
    """A GPU, by torch.cuda."""

    name = "cuda"
    backend = "triton"
    stood_in: tuple[str, ...] = ()
    alone = False
    meter = memory.Meter("cuda")

    @cached_property
    def title(self) -> str:
        """The device's name; a device that was lost since then does not tell it any more."""
        return torch.cuda.get_device_name()

    def missing(self) -> str | None:
        """See `Device`."""
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no GPU"
        return None

    def facts(self) -> dict[str, Any]:
        """See `Device`."""
        about = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "name": self.title,
            "count": torch.cuda.device_count(),
            "capability": list(torch.cuda.get_device_capability()),
            "processors": about.multi_processor_count,
            "memory_bytes": about.total_memory,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "cuDNN in float32": "TF32 allowed" if torch.backends.cudnn.allow_tf32 else "no TF32",
            "products in float32": torch.get_float32_matmul_precision(),
            "nvidia_smi": nvidia_smi(self._identity, QUERIES),
        }

    @property
    def _identity(self) -> str:
        """As nvidia-smi knows it, whose numbers are not those of CUDA_VISIBLE_DEVICES."""
        about = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"GPU-{about.uuid}" if hasattr(about, "uuid") else str(torch.cuda.current_device())

    def capture(self, call: Call) -> tuple[Results, Callable[[], None]]:
        """See `Device`."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        return results, graph.replay

    def on_a_late_stream(self, late: Callable[[], None], call: Call) -> Results:
        """See `Device`. Streams made by torch do not wait for the default one."""
        busy = torch.randn(DELAY_WIDTH, DELAY_WIDTH, device=self.name) / DELAY_WIDTH
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(DELAY_PRODUCTS):
                busy = busy @ busy
            late()
            results = call()
        torch.cuda.synchronize()
        return results

    @contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        """See `Device`."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def second(self) -> str | None:
        """See `Device`."""
        others = [i for i in range(torch.cuda.device_count()) if i != torch.cuda.current_device()]
        return f"cuda:{others[0]}" if others else None

    def clock(self, device: str, threads: int) -> tuple[str, Clock]:
        """See `Device`."""
        return clock_for(device, threads)

    def clocks(self, work: Callable[[], object]) -> str:
        """See `Device`."""
        warm = time.monotonic() + BUSY_SECONDS
        with ThreadPoolExecutor(1) as pool:
            while time.monotonic() < warm:
                work()
                torch.cuda.synchronize()
            answer = pool.submit(_under_load, self._identity)
            while not answer.done():
                work()
                torch.cuda.synchronize()
        return ", ".join(f"{name} {value}" for name, value in answer.result().items())


def _under_load(which: str) -> dict[str, str]:
    found = nvidia_smi(which, WHILE_BUSY) or {}
    return found | next((held for name in HELD_DOWN_BY if (held := nvidia_smi(which, (name,)))), {})


def nvidia_smi(which: str, queries: Sequence[str]) -> dict[str, str] | None:
    """What nvidia-smi answers of a GPU, by query; None where it is not there or fails.

    Args:
        which: number or UUID of the GPU.
        queries: names of `nvidia-smi --help-query-gpu`.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(queries)}", "--format=csv,noheader", f"--id={which}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in found.strip().split(",")]
    return dict(zip(queries, values, strict=True)) if len(values) == len(queries) else None
