"""Trainings side by side: independent runs, each in a process of one thread.

That uses the cores of a CPU far better than one run on all of them: the operations of a small model are too short to
be shared out.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import NamedTuple

import torch

from rmc_kernels.tasks.history import History, Point
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.task import Task
from rmc_kernels.tasks.training import Trainer, TrainingConfig


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


def train_all(jobs: Sequence[Job], processes: int, watch: Callable[[News], None]) -> list[History]:
    """Train every job, `processes` of them at a time, started in order; `watch` hears of every evaluation."""
    context = multiprocessing.get_context("spawn")
    queue: SimpleQueue[News] = context.SimpleQueue()
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(queue,)) as pool:
        futures = [pool.submit(_train, number, job) for number, job in enumerate(jobs)]
        for news in _arrivals(queue, futures):
            watch(news)
        return [future.result() for future in futures]


def _arrivals(queue: SimpleQueue[News], futures: Sequence[Future[History]]) -> Iterator[News]:
    """What comes out of `queue` until every future is done; a job's news is in the queue before its future is done."""
    done = False
    while not done:
        done = not wait(futures, timeout=0.2).not_done
        while not queue.empty():
            yield queue.get()


# -- in the process of a job --------------------------------------------------------------------------------------

_queue: SimpleQueue[News]


def _start(queue: SimpleQueue[News]) -> None:
    global _queue
    _queue = queue
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Left alone, a job would go on and write the checkpoint that the command, called again, goes on from."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(number: int, job: Job) -> History:
    trainer = Trainer(job.task, job.model, job.training, job.checkpoint, resume=True)
    trainer.history.command = job.command

    def watch(trainer: Trainer) -> None:
        if trainer.evaluated:
            _keep(trainer.history, job.checkpoint)
            _queue.put(News(number, trainer.history.final))

    history = trainer.run(watch)
    _keep(history, job.checkpoint)
    return history


def _keep(history: History, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        history.write(checkpoint.parent, checkpoint.stem)
