"""A training's curve as it grows, for TensorBoard where that is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rmc_kernels.tasks.training import Trainer

Watch = Callable[["Trainer"], None]


def tensorboard(folder: Path) -> Watch:
    """Writes every evaluation into `folder` for TensorBoard, against the updates.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # optional
    except ModuleNotFoundError as error:
        raise ValueError("--tensorboard requires tensorboard: pip install tensorboard") from error

    writer = SummaryWriter(str(folder))

    def watch(trainer: Trainer) -> None:
        if not trainer.evaluated:
            return
        point = asdict(trainer.history.final)
        update = point.pop("update")
        for name, value in point.items():
            if value is not None:
                writer.add_scalar(name, value, update)
        for part, accuracy in trainer.history.parts.items():
            writer.add_scalar(f"accuracy/{part}", accuracy, update)
        writer.flush()

    return watch
