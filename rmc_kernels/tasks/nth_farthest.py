"""Nth farthest (Santoro et al. 2018, arXiv:1806.01822, section 4.1): compare the distances between what was seen.

`N` vectors come one a step, in random order, each with its label. Every step also carries the question: which label
has the vector that is the n-th farthest from the vector labelled m? Only the answer after the last step counts, so the
vectors have to be kept, and every distance from m be compared with every other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rmc_kernels import errors
from rmc_kernels.tasks.task import Batch


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

    Attributes:
        objects: vectors `N` of a sequence.
        dims: coordinates `d` of a vector.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    objects: int = 8
    dims: int = 16

    def __post_init__(self) -> None:
        errors.positive_int("objects", self.objects, minimum=2)
        errors.positive_int("dims", self.dims)

    @property
    def title(self) -> str:
        """The task and its size."""
        return f"Nth farthest, {self.objects} objects in {self.dims}-d"

    @property
    def input_size(self) -> int:
        """Features of one step: `d + 3 N`."""
        return self.dims + 3 * self.objects

    @property
    def classes(self) -> int:
        """Labels: `N`."""
        return self.objects

    @property
    def levels(self) -> Mapping[str, float]:
        """What can be had without comparing distances.

        "chance" guesses among all labels. "no distances" uses what the question alone gives away: the nearest to m is m
        itself (1/N of the questions), and no other answer is m, which leaves one of N - 1.
        """
        return {"chance": 1 / self.objects, "no distances": 2 / self.objects}

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """`batch_size` fresh sequences [B, N, d + 3N] and the labels asked for [B]."""
        device, shape = generator.device, (batch_size, self.objects)
        vectors = torch.rand(*shape, self.dims, generator=generator, device=device) * 2 - 1
        n, m = torch.randint(self.objects, (2, batch_size), generator=generator, device=device)
        order = torch.rand(shape, generator=generator, device=device).argsort(dim=1)
        question = one_hot(torch.stack([n, m], dim=1), self.objects).flatten(1).expand(self.objects, -1, -1)
        parts = [
            vectors.take_along_dim(order[..., None], dim=1),
            one_hot(order, self.objects),
            question.transpose(0, 1),
        ]
        return Batch(torch.cat(parts, dim=-1), farthest(vectors, n, m))
