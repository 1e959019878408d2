"""Jobs in processes of their own: one that crashes, hangs or breaks the GPU's context takes no other with it."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

Job = TypeVar("Job")
Value = TypeVar("Value")


class Done(NamedTuple, Generic[Job, Value]):
    """A job that was begun, or not.

    Attributes:
        job: which.
        value: what it gave; None where it failed.
        error: why it failed; empty where it did not.
        begun: whether there was time to begin it.
    """

    job: Job
    value: Value | None
    error: str = ""
    begun: bool = True


def run_all(
    function: Callable[[Job], Value], jobs: Sequence[Job], *, workers: int, deadline: float
) -> Iterator[Done[Job, Value]]:
    """Run every job, each as soon as it can; what was done, in the order in which it ends.

    Args:
        function: what is run, of a module.
        jobs: what for; they and the results are pickled.
        workers: processes side by side; 0 to run in this process.
        deadline: by `time.monotonic`, after which no job is begun; one that still runs then is ended, unless in this
            process.
    """
    if not workers:
        yield from _run_here(function, jobs, deadline)
        return
    waiting, running = list(jobs), dict[Connection, tuple[Job, BaseProcess]]()
    try:
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < deadline:
                job = waiting.pop(0)
                pipe, process = _start(function, job)
                running[pipe] = (job, process)
            ready = wait(list(running), max(0.0, deadline - time.monotonic())) if running else []
            if not ready:
                break
            answered: Any
            for answered in ready:
                yield _finished(answered, *running.pop(answered))
        for job, _ in running.values():
            yield Done(job, None, "it had not ended when the time was over")
        yield from (Done(job, None, begun=False) for job in waiting)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


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
            yield Done(job, None, reason(error))


def _start(function: Callable[[Job], Value], job: Job) -> tuple[Connection, BaseProcess]:
    """A process of its own, spawned: a forked one could not use CUDA."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, function, job))
    process.start()
    theirs.close()  # so that its death is the end of the pipe
    return ours, process


def _child(pipe: Connection, function: Callable[[Job], Value], job: Job) -> None:
    try:
        value: Value | None = function(job)
        error = ""
    except Exception as raised:
        traceback.print_exc()
        value, error = None, reason(raised)
    pipe.send((value, error))


def _finished(pipe: Connection, job: Job, process: BaseProcess) -> Done[Job, Value]:
    try:
        value, error = pipe.recv()
    except EOFError:
        process.join()
        value, error = None, f"its process died with exit code {process.exitcode}"
    except Exception as broken:  # what it sent cannot be read
        value, error = None, reason(broken)
    process.join()
    pipe.close()
    return Done(job, value, error)


def reason(error: Exception) -> str:
    """The exception in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
