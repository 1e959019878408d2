"""Learning rates over the course of a training."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")


def rate_factor(schedule: Schedule, update: int, updates: int, warmup: int) -> float:
    """What the learning rate is multiplied by at `update`, 1 to `updates`.

    It rises linearly from 0 over `warmup` updates; then it is constant, or falls to 0 at the end linearly or as half a
    cosine.
    """
    if update <= warmup:
        return update / warmup
    left = (updates - update) / max(1, updates - warmup)
    if schedule == "linear":
        return left
    return 1.0 if schedule == "constant" else 0.5 - 0.5 * math.cos(math.pi * left)
