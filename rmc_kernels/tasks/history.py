"""What a training leaves behind: its curve, with everything needed to repeat it, as JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """One evaluation on the held-out examples.

    Attributes:
        update: optimizer updates so far; 0 is before training.
        examples: training examples seen so far.
        seconds: wall time since the training began, evaluations included.
        loss: mean cross entropy, in nats.
        accuracy: share of right answers.
    """

    update: int
    examples: int
    seconds: float
    loss: float
    accuracy: float


@dataclass
class History:
    """A training's curve and what made it.

    Attributes:
        task: the task's title.
        levels: accuracies that need no relational reasoning, by name.
        parameters: scalars in all parameters of the model.
        backend: the backend that ran; "torch" for an LSTM.
        model, training: the fields of the ModelConfig and the TrainingConfig.
        points: one per evaluation, in order.
    """

    task: str
    levels: Mapping[str, float]
    parameters: int
    backend: str
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    points: list[Point] = field(default_factory=list)

    @property
    def final(self) -> Point:
        """The last evaluation."""
        return self.points[-1]

    def margin(self, level: float) -> float:
        """How far the final accuracy is above `level`, in standard errors of that level on as many examples."""
        error = math.sqrt(level * (1 - level) / self.training["evaluation_examples"])
        return (self.final.accuracy - level) / error

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write `name`.json (everything) and `name`.csv (the points) into `folder`, and return both paths."""
        folder.mkdir(parents=True, exist_ok=True)
        as_json, as_csv = folder / f"{name}.json", folder / f"{name}.csv"
        as_json.write_text(json.dumps(asdict(self), indent=2) + "\n")
        with as_csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [column.name for column in fields(Point)])
            writer.writeheader()
            writer.writerows(asdict(point) for point in self.points)
        return [as_json, as_csv]
