"""Peak memory of one call: what it needs beyond its arguments and parameters, results included.

On a CPU no allocator can tell it, since oneDNN and our C++ kernels allocate for themselves, so the system is asked for
the peak of resident memory. That needs a process in which nothing was freed before: each call runs in a child of a fork
server that has imported everything and computed nothing. Linux only. On a GPU it is torch's own count.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import Pool
from pathlib import Path
from types import TracebackType

import torch

from rmc_kernels.bench.cases import Case
from rmc_kernels.bench.contestants import Contestant, line_up, timed
from rmc_kernels.bench.problem import draw

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: What the server imports; torch.autograd.grad imports the second one when first called, for half a second.
PRELOAD = [__name__, "torch.fx.experimental.symbolic_shapes"]
#: Seconds after which a child that was killed, for memory as a rule, is given up.
PATIENCE = 120.0


@dataclass(frozen=True)
class Order:
    """A line-up as a child process can make it again; see `line_up`."""

    case: Case
    against: Sequence[str]
    backend_names: Sequence[str]
    saved: bool
    at_width: bool

    def contestants(self) -> list[Contestant]:
        """The line-up."""
        return line_up(self.case, self.against, self.backend_names, saved=self.saved, at_width=self.at_width)


def available(device: str) -> bool:
    """Whether peak memory can be measured here."""
    return device == "cuda" or (STATUS.exists() and os.access(CLEAR, os.W_OK))


def measurable(contestant: Contestant) -> bool:
    """Whether a contestant's peak says something.

    More threads add working memory only, compiling would be the peak, and a graph's memory is taken when it is made.
    """
    return contestant.threads == 1 and contestant.name not in ("compile", "graph")


class Meter:
    """Measures peak memory; a context, since it keeps a server on the CPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._pool: Pool | None = None

    def __enter__(self) -> Meter:
        """Nothing starts before it is needed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The server ends."""
        if self._pool is not None:
            self._pool.terminate()

    def peak(self, order: Order, number: int) -> int | None:
        """Bytes that one call of contestant `number` of the line-up needs; None where they could not be measured."""
        if self._device == "cuda":
            try:
                return device_peak(order, number)
            except RuntimeError:  # out of memory: what was timed is not to be lost
                return None
        if self._pool is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOAD)
            self._pool = context.Pool(1, maxtasksperchild=1)
        try:
            return self._pool.apply_async(resident_peak, (order, number)).get(PATIENCE)
        except (multiprocessing.TimeoutError, MemoryError, RuntimeError):
            return None


def resident_peak(order: Order, number: int) -> int:
    """Growth of this process's resident memory during one call, at its peak; for a fresh process with little in it."""
    contestant = order.contestants()[number]
    torch.set_num_threads(contestant.threads)
    least = replace(order.case, batch_size=1, steps=1)
    timed(replace(order, case=least).contestants()[number].bind(draw(least)), least.mode)()  # what libraries keep
    call = timed(contestant.bind(draw(order.case)), order.case.mode)
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    CLEAR.write_text("5")  # the peak starts over
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def device_peak(order: Order, number: int) -> int:
    """Growth of the memory that torch has allocated on the GPU during one call, at its peak."""
    call = timed(order.contestants()[number].bind(draw(order.case, device="cuda")), order.case.mode)
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _status(name: str) -> int:
    """A field of this process's status, in bytes."""
    lines = (line.split() for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines())
    return next(1024 * int(words[1]) for words in lines if words and words[0] == f"{name}:")
