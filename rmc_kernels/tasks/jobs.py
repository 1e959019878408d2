"""Trainings side by side: independent runs, each in a process of one thread.

That uses the cores of a CPU far better than one run on all of them: the operations of a small model are too short to
be shared out.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from rmc_kernels.tasks.files import claimed
from rmc_kernels.tasks.history import History, Point
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.task import Task
from rmc_kernels.tasks.training import Trainer, TrainingConfig

#: Seconds that a process is given to end when it is told to.
GRACE = 10.0


@dataclass(frozen=True)
class Job:
    """One training: which model learns which task, and how.

    With a checkpoint it goes on from there, and leaves its curve beside it. `command` is the line that repeats it.
    """

    task: Task
    model: ModelConfig
    training: TrainingConfig
    checkpoint: Path | None = None
    command: str = ""


class News(NamedTuple):
    """The job number `job` has reached `point`."""

    job: int
    point: Point


class Done(NamedTuple):
    """The job number `job` has ended."""

    job: int
    history: History


def train_all(jobs: Sequence[Job], processes: int, watch: Callable[[News], None]) -> list[History]:
    """Train every job, `processes` of them at a time, started in order; `watch` hears of every evaluation.

    Where one fails, or this process is interrupted, the others end too. Their checkpoints stay.

    Raises:
        OSError, TypeError, ValueError: a job asks for what cannot be, or a file of it cannot be read or written.
        ChildProcessError: a process was ended from outside, such as by the system for want of memory.
        RuntimeError: a training failed in another way; the message is the traceback of its process.
    """
    waiting, found = iter(enumerate(jobs)), dict[int, History]()
    with _workers(min(processes, len(jobs))) as workers:
        for pipe in workers:
            pipe.send(next(waiting))
        while len(found) < len(jobs):
            ready = wait(list(workers))
            for pipe in [pipe for pipe in workers if pipe in ready]:
                answer = _answer(pipe, workers[pipe])
                if isinstance(answer, News):
                    watch(answer)
                    continue
                found[answer.job] = answer.history
                if (job := next(waiting, None)) is not None:
                    pipe.send(job)
    return [found[number] for number in range(len(jobs))]


def _answer(pipe: Connection, worker: BaseProcess) -> News | Done:
    try:
        answer: News | Done | Exception = pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.join()
        raise ChildProcessError(f"the process of a training ended with exit code {worker.exitcode}") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextmanager
def _workers(count: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Processes that train what they are sent, by the connection to each; they end with the block."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            worker: BaseProcess = context.Process(target=_work, args=(theirs,), daemon=True)
            with _uninterrupted():
                worker.start()
                workers[ours] = worker
            theirs.close()
        yield workers
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join(GRACE)
            if worker.exitcode is None:
                worker.kill()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold SIGINT back: here for the block, in a process started meanwhile for good, which is to be ended from here."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- in the process of a job --------------------------------------------------------------------------------------


def _work(pipe: Connection) -> None:
    """Train what comes through `pipe`, and answer with `News` and then with `Done` or an exception."""
    ended = threading.Event()

    def end(number: int, frame: object) -> None:
        ended.set()
        sys.exit(1)  # by way of what removes unfinished files

    signal.signal(signal.SIGTERM, end)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while not ended.is_set():  # torch.save makes an error of its own of an exit that passes through it
            number, job = pipe.recv()
            pipe.send(_answer_to(number, job, pipe))
    except Exception:
        if not ended.is_set():
            raise
    sys.exit(1)


def _answer_to(number: int, job: Job, pipe: Connection) -> Done | Exception:
    try:
        return Done(number, _train(number, job, pipe))
    except (OSError, TypeError, ValueError) as error:
        return error
    except Exception:
        return RuntimeError(f"a training failed in its process:\n{traceback.format_exc()}")


def _end_with_parent() -> None:
    """Left alone, a job would go on and write the checkpoint that the command, called again, goes on from."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(number: int, job: Job, pipe: Connection) -> History:
    def watch(trainer: Trainer) -> None:
        if trainer.evaluated:
            pipe.send(News(number, trainer.history.final))

    with claimed(job.checkpoint) if job.checkpoint is not None else nullcontext():
        trainer = Trainer(job.task, job.model, job.training, job.checkpoint, resume=True, command=job.command)
        try:
            return trainer.run(watch)
        except (TypeError, ValueError) as error:  # what the job asks for is right by now
            raise RuntimeError("the training failed") from error
