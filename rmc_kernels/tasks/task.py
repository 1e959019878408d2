"""What the training loop needs to know of a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Examples: `inputs` [B, T, I] float32, and the class to answer after the last step, `targets` [B] int64."""

    inputs: Tensor
    targets: Tensor


class Task(Protocol):
    """A sequence classification task that makes its own examples."""

    @property
    def title(self) -> str:
        """The task in a few words, for headings and plots."""

    @property
    def input_size(self) -> int:
        """Features of one step."""

    @property
    def classes(self) -> int:
        """Number of answers."""

    @property
    def levels(self) -> Mapping[str, float]:
        """Accuracies that need no relational reasoning, by name; "chance" is always among them."""

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """`batch_size` fresh examples; the same generator state gives the same examples."""
