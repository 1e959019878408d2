"""What a training leaves behind: its curve, with everything needed to repeat it, as JSON and CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rmc_kernels.tasks.files import replacing


@dataclass(frozen=True)
class Point:
    """One evaluation on the held-out examples.

    Attributes:
        update: optimizer updates so far; 0 is before training.
        examples: training sequences seen so far.
        seconds: wall time of the training, evaluations included; where it was interrupted, of all its stretches.
        loss: mean cross entropy of an answer, in nats.
        accuracy: share of right answers.
        tokens: steps of training sequences so far.
        cpu_seconds: CPU time of this process.
        training_loss: mean of the training losses since the evaluation before; None at the first.
        learning_rate: of the last update.
    """

    update: int
    examples: int
    seconds: float
    loss: float
    accuracy: float
    tokens: int = 0
    cpu_seconds: float = 0.0
    training_loss: float | None = None
    learning_rate: float = 0.0

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


@dataclass
class History:
    """A training's curve and what made it.

    Attributes:
        task: the task's title.
        levels: accuracies to compare with, by name.
        parameters: scalars in all parameters of the model.
        backend: the backend that ran; "torch" for a core that is no RMC.
        model, training: the fields of the ModelConfig and the TrainingConfig.
        points: one per evaluation, in order.
        options: the task's name and fields.
        answers: how many held-out answers an evaluation asks for.
        parts: accuracy of the last evaluation in each part of the task, where it has several.
        part_levels: the last of the levels in each part.
        measure: what to show of it, "accuracy" or "perplexity".
        command: the command line that repeats it, if there is one.
        machine: where it ran.
    """

    task: str
    levels: Mapping[str, float]
    parameters: int
    backend: str
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    points: list[Point] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)
    answers: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    part_levels: Mapping[str, float] = field(default_factory=dict)
    measure: str = "accuracy"
    command: str = ""
    machine: str = ""

    @property
    def final(self) -> Point:
        """The last evaluation."""
        return self.points[-1]

    @property
    def measured(self) -> str:
        """The last evaluation's measure, for tables."""
        return f"{self.final.accuracy:.1%}" if self.measure == "accuracy" else f"{self.final.perplexity:,.2f}"

    def margin(self, level: float) -> float:
        """How far the final accuracy is above `level`, in standard errors of that level on as many answers.

        A level of 0 or 1 has none: accuracies above it are infinitely far above, those below infinitely far below.
        """
        error = math.sqrt(level * (1 - level) / self.answers)
        above = self.final.accuracy - level
        return above / error if error else math.copysign(math.inf, above) if above else 0.0

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write `name`.json (everything, and its SHA-256) and `name`.csv (the points) into `folder`.

        Whoever opens one, at any time, finds the old file or the new one.

        Returns:
            Both paths.

        Raises:
            OSError: the disk is full or refuses a file. The old one is as it was.
        """
        record = asdict(self)
        rows = io.StringIO(newline="")
        writer = csv.DictWriter(rows, [column.name for column in fields(Point)])
        writer.writeheader()
        writer.writerows(record["points"])
        paths = [folder / f"{name}.json", folder / f"{name}.csv"]
        texts = [json.dumps({**record, "sha256": _digest(record)}, indent=1) + "\n", rows.getvalue()]
        for path, text in zip(paths, texts, strict=True):
            with replacing(path) as file:
                file.write(text.encode())
        return paths

    @classmethod
    def read(cls, path: Path) -> History:
        """The history that `write` put into a JSON file. Earlier versions wrote no SHA-256, and none is asked of it.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it is no such file, or is no longer what was written.
        """
        try:
            record = json.loads(path.read_bytes())
            damaged = record.pop("sha256", None) not in (None, _digest(record))
            history = cls(**{**record, "points": [Point(**point) for point in record["points"]]})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must be a record of `rmc train`, got another file or a damaged one") from error
        if damaged:
            raise ValueError(f"{path} is damaged, its checksum is another: restore a copy, or train again")
        return history


def _digest(record: Mapping[str, Any]) -> str:
    """The SHA-256 of a history's fields."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
