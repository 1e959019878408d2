"""What the training loop needs to know of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from rmc_kernels.tasks.models import IGNORE, ModelConfig, SequenceModel

#: Seed of held-out examples, the same for every model and training seed, which are below 2**32.
HELD_OUT_SEED = 2**32 + 1806


class Batch(NamedTuple):
    """Sequences and what is asked of them.

    Attributes:
        inputs: [B, T, I] float32, [B, T] int64 tokens, or [B, T, W] int64 with the W tokens of a step.
        targets: [B, T] int64, the class to answer after that step; `IGNORE` where nothing is asked.
    """

    inputs: Tensor
    targets: Tensor

    def rows(self, first: int, stride: int) -> Batch:
        """Every `stride`-th sequence from `first` on: one process's share of a batch."""
        return Batch(self.inputs[first::stride], self.targets[first::stride])

    def to(self, device: str) -> Batch:
        """The batch on `device`."""
        return Batch(self.inputs.to(device), self.targets.to(device))

    @property
    def asked(self) -> int:
        """Answers asked for."""
        return int((self.targets != IGNORE).sum())


class Source(Protocol):
    """Training batches without end, from a position that can be kept and restored."""

    def next(self) -> Batch:
        """The next batch."""

    def heard(self, loss: float) -> None:
        """The mean loss of the batch that came last; a curriculum goes by it."""

    def state_dict(self) -> dict[str, Any]:
        """The position: tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state_dict` gave."""


class Task(Protocol):
    """Sequences to learn from, and held-out ones to be judged by: a dataclass, whose fields are its settings."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str:
        """The task's name on the command line."""

    @property
    def title(self) -> str:
        """The task in a few words, for headings and plots."""

    @property
    def levels(self) -> Mapping[str, float]:
        """Accuracies to compare with, by name: what can be had without the skill that the task is about."""

    @property
    def part_levels(self) -> Mapping[str, float]:
        """The last of the levels in each part of the task; empty where there is one part."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """What the tokens stand for; empty where a step is no token."""

    @property
    def measure(self) -> str:
        """What plots and tables show: "accuracy" or "perplexity"."""

    @property
    def carries(self) -> bool:
        """Whether batches follow one another in time, so that the memory is carried from each to the next."""

    def model(self, config: ModelConfig) -> SequenceModel:
        """The model that `config` describes for this task, of exactly its sizes."""

    def source(self, batch_size: int, seed: int) -> Source:
        """Training batches of `batch_size` sequences; the same seed gives the same ones."""

    def held_out(self, batch_size: int, examples: int) -> Mapping[str, list[Batch]]:
        """Batches to evaluate on, the same at every call, by the part of the task that they belong to.

        `examples` sequences where the task can make as many as it is asked for.
        """

    def captions(self, batch: Batch, row: int) -> list[str]:
        """A few characters for each step of a sequence, for pictures."""


class FreshExamples:
    """Training batches drawn anew every time."""

    def __init__(self, sample: Callable[[torch.Generator], Batch], seed: int) -> None:
        self.sample, self.generator = sample, torch.Generator().manual_seed(seed)

    def next(self) -> Batch:
        """The next batch."""
        return self.sample(self.generator)

    def heard(self, loss: float) -> None:
        """Nothing follows from it."""

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a generator's state."""
        self.generator.set_state(state["generator"])


def answered_at_the_end(inputs: Tensor, answers: Tensor) -> Batch:
    """Sequences [B, T, ...] of which only the answer after the last step, [B], is asked."""
    targets = torch.full(inputs.shape[:2], IGNORE)
    targets[:, -1] = answers
    return Batch(inputs, targets)
