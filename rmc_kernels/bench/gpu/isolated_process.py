"""Jobs in processes of their own: one that crashes, hangs or breaks the GPU's context takes no other with it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

from rmc_kernels.errors import in_short

#: Seconds in which a process that has answered, or was killed, is to end.
PATIENCE = 10.0
#: `prctl` of Linux: the signal that a process gets when its parent dies.
_PARENT_DIES = 1

Job = TypeVar("Job")
Value = TypeVar("Value")


class Done(NamedTuple, Generic[Job, Value]):
    """A job that was begun, or not.

    Attributes:
        job: which.
        value: what it gave; None where it failed.
        error: why it failed; empty where it did not.
        begun: whether there was time to begin it.
        trace: where and from what; empty where it did not fail by an exception.
    """

    job: Job
    value: Value | None
    error: str = ""
    begun: bool = True
    trace: str = ""


def run_all(
    function: Callable[[Job], Value],
    jobs: Sequence[Job],
    *,
    workers: int,
    deadline: float,
    limit: float = float("inf"),
) -> Iterator[Done[Job, Value]]:
    """Run every job, each as soon as it can; what was done, in the order in which it ends.

    Args:
        function: what is run, of a module.
        jobs: what for; they and the results are pickled.
        workers: processes side by side; 0 to run in this process.
        deadline: by `time.monotonic`, after which no job is begun; one that still runs then is ended, unless in this
            process.
        limit: seconds of a job, after which it is ended, likewise.
    """
    if not workers:
        yield from _run_here(function, jobs, deadline)
        return
    waiting, running = list(jobs), dict[Connection, tuple[Job, BaseProcess, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < deadline:
                job = waiting.pop(0)
                pipe, process = _start(function, job)
                running[pipe] = (job, process, min(deadline, time.monotonic() + limit))
            if not running:
                break
            soonest = min(end for _, _, end in running.values())
            answered: Any
            for answered in wait(list(running), max(0.0, soonest - time.monotonic())):
                job, process, _ = running.pop(answered)
                yield _finished(answered, job, process)
            for pipe, (job, process, end) in list(running.items()):
                if time.monotonic() >= end:
                    del running[pipe]
                    _end(process)
                    over = "when the time was over" if end == deadline else f"after {limit:.0f} s"
                    yield Done(job, None, f"it had not ended {over}")
        yield from (Done(job, None, begun=False) for job in waiting)
    finally:
        for _, process, _ in running.values():
            _end(process)


def _run_here(
    function: Callable[[Job], Value], jobs: Sequence[Job], deadline: float
) -> Iterator[Done[Job, Value]]:  # fmt: skip
    for job in jobs:
        if time.monotonic() >= deadline:
            yield Done(job, None, begun=False)
            continue
        try:
            yield Done(job, function(job))
        except Exception as error:  # a job that fails is a result
            yield Done(job, None, in_short(error), trace=traceback.format_exc())


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join(PATIENCE)  # within a driver's call not even that ends it


def _start(function: Callable[[Job], Value], job: Job) -> tuple[Connection, BaseProcess]:
    """A process of its own, spawned: a forked one could not use CUDA."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, function, job))
    process.start()
    theirs.close()  # so that its death is the end of the pipe
    return ours, process


def _child(pipe: Connection, function: Callable[[Job], Value], job: Job) -> None:
    if sys.platform == "linux":  # else it would go on using the GPU
        ctypes.CDLL(None).prctl(_PARENT_DIES, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:  # which died before that
            os._exit(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there is a process for each job already
    try:
        value: Value | None = function(job)
        error = trace = ""
    except Exception as raised:
        value, error, trace = None, in_short(raised), traceback.format_exc()
    pipe.send((value, error, trace))


def _finished(pipe: Connection, job: Job, process: BaseProcess) -> Done[Job, Value]:
    trace = ""
    try:
        value, error, trace = pipe.recv()
    except EOFError:
        process.join(PATIENCE)
        value, error = None, f"its process died with exit code {process.exitcode}"
    except Exception as broken:  # what it sent cannot be read
        value, error = None, in_short(broken)
    process.join(PATIENCE)
    if process.is_alive():  # what it had to say is here; a library's cleaning up may hang
        _end(process)
    pipe.close()
    return Done(job, value, error, trace=trace)
