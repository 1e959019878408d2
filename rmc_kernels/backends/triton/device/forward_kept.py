"""The forward kernel that keeps what its backward pass reads: the same phases as `forward`, the same memories."""

from __future__ import annotations

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.forward import RUN_TIME
from rmc_kernels.backends.triton.device.operands import Memory
from rmc_kernels.backends.triton.device.phases import Bounds, update
from rmc_kernels.backends.triton.device.step import (
    MLP,
    Weights,
    activate,
    factor_rows,
    input_rows,
    is_reset,
    kept_of,
    kept_statistics,
)
from rmc_kernels.backends.triton.device.tile import tile_rows


@triton.jit(do_not_specialize=[*RUN_TIME, "total"])
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
    total,
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
        kind, wide, marks, total: see `kept_of`; of all steps.
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
            reset = is_reset(resets, step, alive)
            reset_rows = reset_memory + rows.memory * plan.D
        incoming = Memory(before, reset, reset_rows, rows.is_memory if plan.inputs_in_tile else None)
        read = incoming
        if alive is not None:
            read = Memory(before, reset, reset_rows, rows.is_memory & alive)
        kept = kept_of(kind, wide, marks, tl.cast(t, tl.int64), total, rows, plan)
        factors = None
        factors_outside = None
        if mask is not None:
            factors, factors_outside = factor_rows(rows, step, mask, plan)
        from_input = None
        if input_gates is not None:
            from_input = input_gates + step * plan.G
        activate(
            rows, same, read, input_rows(rows, step, inputs, plan), factors, factors_outside, weights, kept,
            blocks_bound, layers_bound, bounds, plan,
        )  # fmt: skip

        last = blocks_bound - 1
        mean, rstd = kept_statistics(kept, MLP, last, plan)
        norm = (mean, rstd, mlp_gamma, mlp_beta, last * plan.D)
        candidate = kept.wide + last * plan.block_wide + plan.candidate_at
        gates = kept.wide + plan.gates_at
        after = out + (step * plan.N + slot) * plan.D
        update(
            rows, incoming, alive, candidate, norm, gates, from_input, input_bias, forget_bias, after, bounds, plan,
        )  # fmt: skip
        before = after
        tl.debug_barrier()
