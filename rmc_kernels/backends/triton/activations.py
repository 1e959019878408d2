"""What steps keep for their backward pass: views of one block of bytes, and the forward pass that fills them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rmc_kernels.backends.protocol import Call
from rmc_kernels.backends.triton import launch, tiles
from rmc_kernels.backends.triton.device.forward_kept import forward_kept
from rmc_kernels.backends.triton.kept import MARKS, TrainingPlan
from rmc_kernels.backends.triton.parameters import Parameters
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


def training_plan(spec: CellSpec, tile: tiles.Tile, precision: str) -> TrainingPlan:
    """The plan of the kernels that train."""
    plan = launch.plan_of(spec, tile, precision)
    return TrainingPlan(
        **{field.name: getattr(plan, field.name) for field in fields(plan)},
        num_blocks=spec.num_blocks,
        projection=spec.has_output_projection,
    )


def without_padding(call: Call) -> Call:
    """With 0 past the lengths in x and the mask: a NaN there would reach the weights' gradients by a product with 0."""
    if call.lengths is None:
        return call
    running = torch.arange(call.steps, device=call.x.device) < call.lengths[:, None]
    x = torch.where(running.view(*running.shape, *([1] * (call.x.dim() - 2))), call.x, 0)
    mask = call.dropout_mask
    if mask is not None:
        mask = torch.where(running[..., None, None, None], mask, 0)
    return replace(call, x=x, dropout_mask=mask)


def unroll_kept(spec: CellSpec, call: Call) -> tuple[Tensor, Tensor]:
    """The memories [B, T, N, D] of a call, and the activations of its steps as bytes."""
    call = without_padding(call)
    memories = call.memory.new_empty(call.batch_size, call.steps, spec.mem_slots, spec.mem_size)
    activations = call.x.new_empty(activation_size(spec, call.batch_size, call.steps, call.x.dtype), dtype=torch.uint8)
    if memories.numel():
        with launch.device_of(call.device):
            tile, kind = launch.tile_of(spec, call), call.x.dtype
            plan = training_plan(spec, tile, launch.precision(kind))
            count, total = launch.programs(call, plan), kept_rows(spec, call.batch_size)
            kept = Activations.within(activations, plan, kind, call.steps, total)
            kept.clear_from(count * tile.rows)
            params = Parameters.of(spec, call)
            side = launch.input_side(spec, call.x, params)
            forward_kept[(count,)](
                memories, kept.kind, kept.wide, kept.marks, call.memory.contiguous(), side.rows, side.gates,
                *launch.options(call), *launch.weights(params), call.batch_size, call.steps, total,
                *launch.bounds(spec, plan), spec.input_bias, spec.forget_bias, plan=plan,
                **launch.compiler_options(tile),
            )  # fmt: skip
    return memories, activations


def activation_size(spec: CellSpec, batch_size: int, steps: int, dtype: torch.dtype) -> int:
    """See `Backend.activation_size`."""
    plan = training_plan(spec, tiles.PROJECTION, "ieee")
    return steps * kept_rows(spec, batch_size) * Activations.row_bytes(plan, dtype.itemsize)
