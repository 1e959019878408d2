"""One step forward by the phases of the forward kernel, with all kept that its backward pass reads."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.attention import Projected, attend
from rmc_kernels.backends.triton.device.operands import Memory, buffer_rows, memory_rows, normal_rows
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
        total: rows of a step.
    """

    kind: tl.tensor
    wide: tl.tensor
    marks: tl.tensor
    total: tl.tensor


class FromInput(NamedTuple):
    """What a step takes from outside the recurrence.

    Attributes:
        rows: [R] pointers to u [D] where input rows are in the tile, to the input row's normalised queries, keys and
            values [F] otherwise.
        gates: [R] pointers to the input's gate terms [G]; None without gates.
        factors: [R, R] pointers to the factors of the first head's attention weights; None without.
        factors_outside: [R] pointers to those of the row outside; None without.
    """

    rows: tl.tensor
    gates: tl.tensor
    factors: tl.tensor
    factors_outside: tl.tensor


@triton.jit
def _of_block(pointer, block, width):
    """The part of a stacked parameter that belongs to a block; None stays None."""
    if pointer is not None:
        pointer += block * width
    return pointer


@triton.jit
def incoming_memory(rows, t, steps, memory, memories, length, resets, reset_memory, plan: tl.constexpr):
    """The `Memory` that came into step `t` of a sequence whose memories are known.

    Args:
        length: [R] of the elements; None where all have all steps.

    The others are those of `backward`.
    """
    before = memory + rows.memory * plan.D
    if t > 0:
        step = rows.element * steps + (t - 1)
        before = memories + (step * plan.N + tl.minimum(rows.slot, plan.N - 1)) * plan.D
    reset = None
    reset_rows = None
    if resets is not None:
        reset = tl.load(resets + rows.element * steps + t) != 0
        if length is not None:
            reset = reset & (t < length)
        reset_rows = reset_memory + rows.memory * plan.D
    return Memory(before, reset, reset_rows, rows.is_memory if plan.inputs_in_tile else None)


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
    return Kept(kind + row * plan.kind_width, wide + row * plan.wide_width, of_tile, total)


@triton.jit
def from_input(rows, t, steps, inputs, input_gates, mask, plan: tl.constexpr):
    """The `FromInput` of step `t`; arguments as in `forward`."""
    step = rows.element * steps + t
    if plan.inputs_in_tile:
        at = inputs + (step * plan.n + tl.maximum(rows.slot - plan.N, 0)) * plan.D
    else:
        at = inputs + step * plan.F
    gates = None
    if input_gates is not None:
        gates = input_gates + step * plan.G
    factors = None
    factors_outside = None
    if mask is not None:
        slot = tl.minimum(rows.slot, plan.N - 1)
        first_head = mask + (step * (plan.heads * plan.N) + slot) * plan.S
        factors = first_head[:, None] + rows.slot[None, :]
        factors_outside = first_head + plan.N
    return FromInput(at, gates, factors, factors_outside)


@triton.jit
def kept_norm(kept, which, block, gamma, beta, WIDTH: tl.constexpr, plan: tl.constexpr):
    """A norm of a block, see `normalise`, with the mean and rstd that were kept.

    Args:
        which: `QKV`, `ATTENTION` or `MLP`.
        gamma, beta: of all blocks, [blocks, WIDTH]; None without that norm.
    """
    at = kept.marks + (block * MARKS + which) * kept.total + tl.arange(0, plan.blocks.rows)
    return tl.load(at), tl.load(at + kept.total), _of_block(gamma, block, WIDTH), _of_block(beta, block, WIDTH)


@triton.jit
def _keep(kept, which, block, mean, rstd, plan: tl.constexpr):
    at = kept.marks + (block * MARKS + which) * kept.total + tl.arange(0, plan.blocks.rows)
    tl.store(at, mean)
    tl.store(at + kept.total, rstd)


@triton.jit
def projected(kept, block, given, gamma, beta, plan: tl.constexpr):
    """The `Projected` of a block whose queries, keys and values are kept."""
    flaws = kept.marks + block * MARKS * kept.total
    mean, rstd, gamma, beta = kept_norm(kept, QKV, block, gamma, beta, plan.F, plan)
    outside = None if plan.inputs_in_tile else given.rows
    return Projected(kept.kind + block * plan.block_kind, flaws, mean, rstd, gamma, beta, outside)


@triton.jit
def activate(
    rows, same, memory, given, weights, kept, blocks_bound, layers_bound, bounds, plan: tl.constexpr,
):  # fmt: skip
    """Every phase of a step but `update`; ends with a barrier.

    Args:
        rows, same: of `tile_rows`.
        memory: the `Memory` that comes in.
        given: `FromInput`.
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
            left = kept_norm(kept, MLP, before, weights.mlp_gamma, weights.mlp_beta, D, plan)
            enter_block(
                memory, given.rows, rows.is_memory == 0, candidate - plan.block_wide, left, block == 0, captured,
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

        attended = projected(kept, block, given, weights.qkv_gamma, weights.qkv_beta, plan)
        if plan.projection:
            attend(
                attended, same, given.factors, given.factors_outside, None, captured, kind + plan.heads_at, bounds,
                plan,
            )  # fmt: skip
            tl.debug_barrier()
            project_heads(
                buffer_rows, kind + plan.heads_at, weights.heads_weight, weights.heads_bias, residual, captured, z,
                bounds, plan,
            )  # fmt: skip
        else:
            mean, rstd = attend(
                attended, same, given.factors, given.factors_outside, residual, captured, z, bounds, plan,
            )  # fmt: skip
            _keep(kept, ATTENTION, block, mean, rstd, plan)
        tl.debug_barrier()

        norm = kept_norm(kept, ATTENTION, block, weights.attention_gamma, weights.attention_beta, D, plan)
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
