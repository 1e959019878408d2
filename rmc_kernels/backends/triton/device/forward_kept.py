"""The forward kernel that keeps what its backward pass reads: the same phases as `forward`, the same memories."""

from __future__ import annotations

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.forward import RUN_TIME
from rmc_kernels.backends.triton.device.operands import Memory
from rmc_kernels.backends.triton.device.phases import Bounds, update
from rmc_kernels.backends.triton.device.step import (
    MARKS,
    MLP,
    Kept,
    Weights,
    activate,
    block_part,
    from_input,
    kept_norm,
)
from rmc_kernels.backends.triton.device.tile import tile_rows


@triton.jit
def kept_of(kind, wide, marks, step, wide_step, rows, plan: tl.constexpr):
    """The `Kept` of a step.

    Args:
        kind: [steps, rows, kind width]; see `TrainingPlan`.
        wide: [steps, rows, wide width].
        marks: [steps, blocks, MARKS, rows].
        step: int64, of `kind`.
        wide_step: int64, of `wide` and `marks`.
        rows: `Rows`.
    """
    total = tl.num_programs(0) * plan.blocks.rows
    of_step = wide_step * total
    first = tl.program_id(0) * plan.blocks.rows
    return Kept(
        kind + (step * total + rows.scratch) * plan.kind_width,
        wide + (of_step + rows.scratch) * plan.wide_width,
        marks + of_step * (plan.num_blocks * MARKS) + first,
        total,
    )


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kept(
    out,
    kind,
    wide,
    marks,
    memory,
    inputs,
    input_gates,
    lengths,
    resets,
    reset_memory,
    mask,
    qkv_weight,
    qkv_bias,
    qkv_gamma,
    qkv_beta,
    heads_weight,
    heads_bias,
    attention_gamma,
    attention_beta,
    mlp_weight,
    mlp_bias,
    mlp_gamma,
    mlp_beta,
    gate_weight,
    gate_bias,
    batch,
    steps,
    blocks_bound,
    layers_bound,
    d_bound,
    f_bound,
    g_bound,
    heads_bound,
    k_bound,
    v_bound,
    input_bias,
    forget_bias,
    plan: tl.constexpr,
):
    """The memories of a sequence, and the activations of all its steps.

    Args:
        kind, wide, marks: see `kept_of`; of all steps.
        plan: see `TrainingPlan`.

    The other arguments are those of `forward`.
    """
    bounds = Bounds(d_bound, f_bound, g_bound, heads_bound, k_bound, v_bound)
    weights = Weights(
        qkv_weight, qkv_bias, qkv_gamma, qkv_beta, heads_weight, heads_bias, attention_gamma, attention_beta,
        mlp_weight, mlp_bias, mlp_gamma, mlp_beta, gate_weight, gate_bias,
    )  # fmt: skip
    rows, same = tile_rows(batch, plan)
    slot = tl.minimum(rows.slot, plan.N - 1)
    tile_row = tl.arange(0, plan.blocks.rows)
    real = tl.program_id(0) * (plan.blocks.rows // plan.padded) + tile_row // plan.padded < batch
    if lengths is not None:
        length = tl.load(lengths + rows.element)
    before = memory + rows.memory * plan.D
    for t in range(steps):
        step = rows.element * steps + t
        alive = None
        if lengths is not None:
            alive = t < length
        reset = None
        reset_rows = None
        if resets is not None:
            reset = tl.load(resets + step) != 0
            if lengths is not None:
                reset = reset & alive
            reset_rows = reset_memory + rows.memory * plan.D
        incoming = Memory(before, reset, reset_rows, rows.is_memory if plan.inputs_in_tile else None)
        at = tl.cast(t, tl.int64)
        kept = kept_of(kind, wide, marks, at, at, rows, plan)
        given = from_input(rows, t, steps, inputs, input_gates, mask, plan)
        activate(rows, same, incoming, given, weights, kept, blocks_bound, layers_bound, bounds, plan)

        last = blocks_bound - 1
        gamma, beta = block_part(mlp_gamma, last, plan.D), block_part(mlp_beta, last, plan.D)
        norm = kept_norm(kept, MLP, last, gamma, beta, plan)
        candidate = kept.wide + last * plan.block_wide + plan.candidate_at
        gates = kept.wide + plan.gates_at
        after = out + (step * plan.N + slot) * plan.D
        update(
            rows, incoming, alive, candidate, norm, gates, given.gates, input_bias, forget_bias, after, bounds, plan,
        )  # fmt: skip
        before = tl.where(real, after, before)  # another program may be writing `after` of rows past the batch
        tl.debug_barrier()
