"""Nth farthest (Santoro et al. 2018, arXiv:1806.01822, section 4.1): compare the distances between what was seen.

`N` vectors come one a step, in random order, each with its label. Every step also carries the question: which label
has the vector that is the n-th farthest from the vector labelled m? Only the answer after the last step counts, so the
vectors have to be kept, and every distance from m be compared with every other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from rmc_kernels import errors
from rmc_kernels.tasks.models import ModelConfig, SequenceModel, build
from rmc_kernels.tasks.task import HELD_OUT_SEED, Batch, FreshExamples, answered_at_the_end

#: Batches that the curriculum's running mean of the loss reaches back.
MEMORY = 50


def farthest(vectors: Tensor, n: Tensor, m: Tensor) -> Tensor:
    """The label of the vector that is n-th farthest from the vector labelled m, in Euclidean distance.

    Args:
        vectors: [B, N, d]; a vector's label is its index.
        n: [B] int64; 0 asks for the farthest, N - 1 for the nearest, which is m itself.
        m: [B] int64, a label.

    Returns:
        [B] int64. Of vectors equally far the lower label counts as farther.
    """
    reference = vectors.take_along_dim(m[:, None, None], dim=1)
    distances = (vectors - reference).square().sum(-1)
    ranked = distances.argsort(dim=1, descending=True, stable=True)
    return ranked.take_along_dim(n[:, None], dim=1)[:, 0]


@dataclass(frozen=True)
class NthFarthest:
    """The generator; the paper's size is the default.

    A step's input is `[vector (d) | its label, one-hot (N) | n, one-hot (N) | m, one-hot (N)]`, the sequence has N
    steps, and the vectors are drawn from U(-1, 1)^d.

    The curriculum begins with three vectors of one coordinate, the others 0 and their labels unused. Once the loss, a
    running mean, is below half of what it is without distances, or after `patience` batches, the next stage has twice
    the coordinates or, where these are all, one more vector. Held-out sequences are always of full size.

    Attributes:
        objects: Vectors N of a sequence.
        dims: Coordinates d of a vector.
        curriculum: grow for the curriculum, none for full size from the start.
        patience: Batches of a stage of the curriculum, at most.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    objects: int = 8
    dims: int = 16
    curriculum: str = "none"
    patience: int = 1000

    name: ClassVar[str] = "nth-farthest"
    carries: ClassVar[bool] = False
    measure: ClassVar[str] = "accuracy"
    vocabulary: ClassVar[tuple[str, ...]] = ()
    part_levels: ClassVar[Mapping[str, float]] = {}

    def __post_init__(self) -> None:
        errors.positive_int("objects", self.objects, minimum=2)
        for name in ("dims", "patience"):
            errors.positive_int(name, getattr(self, name))
        errors.one_of("curriculum", self.curriculum, ("grow", "none"))

    @property
    def title(self) -> str:
        """The task and its size."""
        return f"Nth farthest, {self.objects} objects in {self.dims}-d"

    @property
    def input_size(self) -> int:
        """Features of one step: `d + 3 N`."""
        return self.dims + 3 * self.objects

    @property
    def levels(self) -> Mapping[str, float]:
        """What can be had without comparing distances.

        "chance" guesses among all labels. "no distances" uses what the question alone gives away: the nearest to m is m
        itself (1/N of the questions), and no other answer is m, which leaves one of N - 1.
        """
        return {"chance": 1 / self.objects, "no distances": 2 / self.objects}

    def model(self, config: ModelConfig) -> SequenceModel:
        """The model that `config` describes, of exactly its sizes."""
        return build(config, self.objects, input_size=self.input_size)

    def source(self, batch_size: int, seed: int) -> Curriculum:
        """Training batches of `batch_size` sequences."""
        return Curriculum(self, batch_size, seed)

    def held_out(self, batch_size: int, examples: int) -> dict[str, list[Batch]]:
        """`examples` sequences of N vectors."""
        batch = self.sample(examples, torch.Generator().manual_seed(HELD_OUT_SEED))
        parts = zip(batch.inputs.split(batch_size), batch.targets.split(batch_size), strict=True)
        return {"": [Batch(*part) for part in parts]}

    def captions(self, batch: Batch, row: int) -> list[str]:
        """The labels in their order; the last tells the question."""
        inputs = batch.inputs[row, :, self.dims :]
        labels, n, m = (hot.argmax(-1).tolist() for hot in inputs.split(self.objects, dim=-1))
        return [*map(str, labels[:-1]), f"{labels[-1]}; no. {n[0] + 1} farthest from {m[0]}?"]

    @property
    def stages(self) -> list[tuple[int, int]]:
        """Vectors and coordinates of each stage of the curriculum; the last is the task itself."""
        if self.curriculum == "none":
            return [(self.objects, self.dims)]
        vectors = range(min(3, self.objects), self.objects + 1)
        widths = [1 << power for power in range((self.dims - 1).bit_length())]
        return [(vectors[0], width) for width in widths] + [(count, self.dims) for count in vectors]

    def sample(self, batch_size: int, generator: torch.Generator, vectors: int = 0, width: int = 0) -> Batch:
        """Fresh sequences and, after the last step, the labels asked for.

        Args:
            batch_size: sequences B.
            generator: of the random numbers.
            vectors: steps of a sequence; 0 for all N.
            width: coordinates that are not 0; 0 for all d.

        Returns:
            Inputs [B, vectors, d + 3N].
        """
        count, width = vectors or self.objects, width or self.dims
        points = torch.rand(batch_size, count, width, generator=generator) * 2 - 1
        n, m = torch.randint(count, (2, batch_size), generator=generator)
        order = torch.rand(batch_size, count, generator=generator).argsort(dim=1)
        question = one_hot(torch.stack([n, m], dim=1), self.objects).flatten(1)
        parts = [
            pad(points.take_along_dim(order[..., None], dim=1), (0, self.dims - width)),
            one_hot(order, self.objects),
            question[:, None].expand(-1, count, -1),
        ]
        return answered_at_the_end(torch.cat(parts, dim=-1), farthest(points, n, m))


class Curriculum(FreshExamples):
    """Training batches of a `NthFarthest`, stage by stage."""

    def __init__(self, task: NthFarthest, batch_size: int, seed: int) -> None:
        super().__init__(lambda generator: task.sample(batch_size, generator, *task.stages[self.stage]), seed)
        self.stages, self.patience = task.stages, task.patience
        self._enter(0)

    def heard(self, loss: float) -> None:
        """Go to the next stage where this one is learnt or has had its time."""
        self.batches += 1
        self.mean += (loss - self.mean) / MEMORY
        learnt = self.mean < self._without_distances / 2
        if (learnt or self.batches == self.patience) and self.stage + 1 < len(self.stages):
            self._enter(self.stage + 1)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, and how far the curriculum is."""
        return {**super().state_dict(), "stage": self.stage, "batches": self.batches, "mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self.stage, self.batches, self.mean = state["stage"], state["batches"], state["mean"]

    def _enter(self, stage: int) -> None:
        self.stage, self.batches = stage, 0
        self.mean = self._without_distances

    @property
    def _without_distances(self) -> float:
        """The loss of who answers m where n says so, and one of the others evenly where not."""
        vectors: int = self.stages[self.stage][0]
        return (1 - 1 / vectors) * math.log(vectors - 1)
