"""What a step keeps for its backward pass, as tensors: views of the one block of bytes that autograd holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rmc_kernels.backends.triton import tiles
from rmc_kernels.backends.triton.kept import MARKS, TrainingPlan
from rmc_kernels.spec import CellSpec


@dataclass(frozen=True)
class Activations:
    """Attributes: see `TrainingPlan`.

    kind: [steps, rows, kind width].
    wide: [steps, rows, wide width], float32.
    marks: [steps, blocks, MARKS, rows], float32.
    """

    kind: Tensor
    wide: Tensor
    marks: Tensor

    @staticmethod
    def row_bytes(plan: TrainingPlan, itemsize: int) -> int:
        """Bytes of one row of one step."""
        return 4 * (plan.wide_width + plan.num_blocks * MARKS) + itemsize * plan.kind_width

    @classmethod
    def within(cls, memory: Tensor, plan: TrainingPlan, dtype: torch.dtype, steps: int, rows: int) -> Activations:
        """Views of [steps * rows * row_bytes] uint8."""
        count = steps * rows
        sizes = [4 * count * plan.wide_width, 4 * count * plan.num_blocks * MARKS]
        wide, marks, kind = memory.tensor_split([sizes[0], sum(sizes)])
        return cls(
            kind.view(dtype).view(steps, rows, plan.kind_width),
            wide.view(torch.float32).view(steps, rows, plan.wide_width),
            marks.view(torch.float32).view(steps, plan.num_blocks, MARKS, rows),
        )

    def clear_from(self, row: int) -> None:
        """Put 0 into the rows from `row` on, which no program fills: sums over all rows must not meet a NaN there."""
        self.kind[:, row:] = 0
        self.wide[:, row:] = 0
        self.marks[..., row:] = 0

    @classmethod
    def empty(cls, like: Tensor, plan: TrainingPlan, steps: int, rows: int) -> Activations:
        """Fresh ones of `like`'s dtype and device."""
        size = steps * rows * cls.row_bytes(plan, like.element_size())
        return cls.within(like.new_empty(size, dtype=torch.uint8), plan, like.dtype, steps, rows)


def kept_rows(spec: CellSpec, batch_size: int) -> int:
    """Rows of which activations are kept: a whole number of tiles, whichever tile is chosen."""
    return -(-batch_size * tiles.padded_rows(spec) // tiles.MOST_ROWS) * tiles.MOST_ROWS
