"""The processes that torchrun starts, or the only one: who this is, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """The number of this process; 0 is the one that writes and tells."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def started_together() -> bool:
    """Whether torchrun started this process and others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_device(device: str) -> str:
    """The device of this process: under torchrun each has a GPU of its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if started_together() and device.startswith("cuda") else device


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the other processes if torchrun started this one; `device` is this one's own."""
    if not started_together() or dist.is_initialized():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
        # A thread of gloo's lets go of a collective's tensors after the collective has returned. Where that was the
        # last thing that a process did, Python had ended by then and torch aborted: 4 of 30 trainings of a few steps.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def summed(numbers: list[float], device: str) -> list[float]:
    """Each number summed over the processes."""
    if world() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gathered(value: Any) -> list[Any]:
    """In process 0, every process's value in order; in the others, an empty list."""
    if world() == 1:
        return [value]
    values: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []
