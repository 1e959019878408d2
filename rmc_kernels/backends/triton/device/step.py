"""One step forward by the phases of the forward kernel, with all kept that its backward pass reads."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.attention import Projected, attend
from rmc_kernels.backends.triton.device.operands import buffer_rows, memory_rows, normal_rows
from rmc_kernels.backends.triton.device.phases import (
    enter_block,
    gate_terms,
    hidden_layer,
    last_layer,
    project_heads,
    project_qkv,
)
from rmc_kernels.backends.triton.kept import MARKS as _MARKS

MARKS = tl.constexpr(_MARKS)
#: Where mean and rstd of each norm stand among the marks of a block.
QKV = tl.constexpr(1)
ATTENTION = tl.constexpr(3)
MLP = tl.constexpr(5)


class Weights(NamedTuple):
    """Pointers to the parameters of the recurrence, shaped as `forward` has them; None where the variant has none."""

    qkv_weight: tl.tensor
    qkv_bias: tl.tensor
    qkv_gamma: tl.tensor
    qkv_beta: tl.tensor
    heads_weight: tl.tensor
    heads_bias: tl.tensor
    attention_gamma: tl.tensor
    attention_beta: tl.tensor
    mlp_weight: tl.tensor
    mlp_bias: tl.tensor
    mlp_gamma: tl.tensor
    mlp_beta: tl.tensor
    gate_weight: tl.tensor
    gate_bias: tl.tensor


class Kept(NamedTuple):
    """Where a step's activations are; see `TrainingPlan`.

    Attributes:
        kind: [R] pointers to rows in the compute dtype.
        wide: [R] pointers to rows in float32.
        marks: pointer to the marks of the tile's first row; the next mark of a row is `total` further, the next block
            `MARKS` times that.
        total: rows of a step, int64.
    """

    kind: tl.tensor
    wide: tl.tensor
    marks: tl.tensor
    total: tl.tensor


@triton.jit
def rows_before(rows, t, steps, memory, memories, plan: tl.constexpr):
    """[R] pointers to the memory before step `t` of a sequence whose memories are known; arguments as in `backward`."""
    before = memory + rows.memory * plan.D
    if t > 0:
        step = rows.element * steps + (t - 1)
        before = memories + (step * plan.N + tl.minimum(rows.slot, plan.N - 1)) * plan.D
    return before


@triton.jit
def is_reset(resets, step, alive):
    """[R], whether an element starts over before its step `step`, [R]; `alive` as in `update`."""
    reset = tl.load(resets + step) != 0
    if alive is not None:
        reset = reset & alive
    return reset


@triton.jit
def kept_of(kind, wide, marks, step, total, rows, plan: tl.constexpr):
    """The `Kept` of a step.

    Args:
        kind: [steps, total, kind width]; see `TrainingPlan`.
        wide: [steps, total, wide width].
        marks: [steps, blocks, MARKS, total].
        step: int64.
        total: rows of a step; those of all programs at least.
        rows: `Rows`.
    """
    row = step * total + rows.scratch
    of_tile = marks + step * total * (plan.num_blocks * MARKS) + tl.program_id(0) * plan.blocks.rows
    return Kept(kind + row * plan.kind_width, wide + row * plan.wide_width, of_tile, tl.cast(total, tl.int64))


@triton.jit
def input_rows(rows, step, inputs, plan: tl.constexpr):
    """[R] pointers to what stands in `inputs` of step `step`, [R]; arguments as in `forward`."""
    if plan.inputs_in_tile:
        at = inputs + (step * plan.n + tl.maximum(rows.slot - plan.N, 0)) * plan.D
    else:
        at = inputs + step * plan.F
    return at


@triton.jit
def factor_rows(rows, step, mask, plan: tl.constexpr):
    """Pointers to the first head's factors of attention weights, [R, R], and to those of the row outside, [R].

    Args:
        step: [R], of the sequence.
        mask: as in `forward`.
    """
    slot = tl.minimum(rows.slot, plan.N - 1)
    first_head = mask + (step * (plan.heads * plan.N) + slot) * plan.S
    return first_head[:, None] + rows.slot[None, :], first_head + plan.N


@triton.jit
def kept_statistics(kept, which, block, plan: tl.constexpr):
    """Mean and rstd, [R] each, that were kept of a norm of a block: `QKV`, `ATTENTION` or `MLP`."""
    at = kept.marks + (block * MARKS + which) * kept.total + tl.arange(0, plan.blocks.rows)
    return tl.load(at), tl.load(at + kept.total)


@triton.jit
def _keep(kept, which, block, mean, rstd, plan: tl.constexpr):
    at = kept.marks + (block * MARKS + which) * kept.total + tl.arange(0, plan.blocks.rows)
    tl.store(at, mean)
    tl.store(at + kept.total, rstd)


@triton.jit
def activate(
    rows, same, memory, inputs, factors, factors_outside, weights, kept, blocks_bound, layers_bound, bounds,
    plan: tl.constexpr,
):  # fmt: skip
    """Every phase of a step but `update`; ends with a barrier.

    Args:
        rows, same: of `tile_rows`.
        memory: the `Memory` that comes in.
        inputs: of `input_rows`.
        factors, factors_outside: of `factor_rows`; None without a mask.
        weights, kept: `Weights`, `Kept`.
        blocks_bound, layers_bound, bounds, plan: see `forward`.
    """
    D: tl.constexpr = plan.D
    operand: tl.constexpr = buffer_rows if plan.inputs_in_tile else memory_rows
    residual: tl.constexpr = operand if plan.residual else None
    if plan.G:
        gate_terms(memory, weights.gate_weight, weights.gate_bias, kept.wide + plan.gates_at, bounds, plan)
    for block in range(blocks_bound):
        kind = kept.kind + block * plan.block_kind
        z = kept.wide + block * plan.block_wide
        candidate = z + plan.candidate_at
        hidden = kind + plan.hidden_at
        if plan.inputs_in_tile:
            captured = z + plan.entered_at
            before = tl.maximum(block - 1, 0)
            mean, rstd = kept_statistics(kept, MLP, before, plan)
            left = (mean, rstd, weights.mlp_gamma, weights.mlp_beta, before * D)
            enter_block(
                memory, inputs, rows.is_memory == 0, candidate - plan.block_wide, left, block == 0, captured,
                bounds, plan,
            )  # fmt: skip
            tl.debug_barrier()
        else:
            captured = memory
        mean, rstd = project_qkv(
            operand, captured, weights.qkv_weight + block * (plan.F * D), weights.qkv_bias + block * plan.F, kind,
            kept.marks + block * MARKS * kept.total + tl.arange(0, plan.blocks.rows), bounds, plan,
        )  # fmt: skip
        _keep(kept, QKV, block, mean, rstd, plan)
        tl.debug_barrier()

        outside = None if plan.inputs_in_tile else inputs
        projected = Projected(
            kind, kept.marks + block * MARKS * kept.total, mean, rstd, weights.qkv_gamma, weights.qkv_beta,
            block * plan.F, outside,
        )  # fmt: skip
        if plan.projection:
            attend(
                projected, same, factors, factors_outside, None, captured, kind + plan.heads_at, bounds, plan,
            )  # fmt: skip
            tl.debug_barrier()
            project_heads(
                buffer_rows, kind + plan.heads_at, weights.heads_weight, weights.heads_bias, residual, captured, z,
                bounds, plan,
            )  # fmt: skip
        else:
            mean, rstd = attend(
                projected, same, factors, factors_outside, residual, captured, z, bounds, plan,
            )  # fmt: skip
            _keep(kept, ATTENTION, block, mean, rstd, plan)
        tl.debug_barrier()

        mean, rstd = kept_statistics(kept, ATTENTION, block, plan)
        norm = (mean, rstd, weights.attention_gamma, weights.attention_beta, block * D)
        normal = (z, norm)
        if plan.layers > 1:
            hidden_layer(normal_rows, normal, weights.mlp_weight, weights.mlp_bias, hidden, bounds, plan)
            tl.debug_barrier()
        if plan.layers > 2:
            for layer in range(1, layers_bound - 1):
                hidden_layer(
                    buffer_rows, hidden + (layer - 1) * D, weights.mlp_weight + layer * (D * D),
                    weights.mlp_bias + layer * D, hidden + layer * D, bounds, plan,
                )  # fmt: skip
                tl.debug_barrier()
        last: tl.constexpr = plan.layers - 1
        relu = hidden + last * D if plan.ends_in_relu else None
        if plan.layers > 1:
            mean, rstd = last_layer(
                buffer_rows, hidden + (plan.layers - 2) * D, weights.mlp_weight + last * (D * D),
                weights.mlp_bias + last * D, z, norm, candidate, bounds, plan, relu,
            )  # fmt: skip
        else:
            mean, rstd = last_layer(
                normal_rows, normal, weights.mlp_weight, weights.mlp_bias, z, norm, candidate, bounds, plan, relu,
            )  # fmt: skip
        _keep(kept, MLP, block, mean, rstd, plan)
        tl.debug_barrier()
