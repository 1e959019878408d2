"""The activations of steps whose memories are known: nothing recurs, so all steps run side by side."""

from __future__ import annotations

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.forward import RUN_TIME
from rmc_kernels.backends.triton.device.operands import Memory
from rmc_kernels.backends.triton.device.phases import Bounds
from rmc_kernels.backends.triton.device.step import (
    Weights,
    activate,
    factor_rows,
    input_rows,
    is_reset,
    kept_of,
    rows_before,
)
from rmc_kernels.backends.triton.device.tile import tile_rows


@triton.jit(do_not_specialize=[*RUN_TIME, "first", "total"])
def recompute(
    kind,
    wide,
    marks,
    memories,
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
    first,
    blocks_bound,
    layers_bound,
    d_bound,
    f_bound,
    g_bound,
    heads_bound,
    k_bound,
    v_bound,
    plan: tl.constexpr,
):
    """Program (i, s) fills the activations of tile i in step `first + s`.

    Args:
        kind, wide, marks, total: see `kept_of`; of the steps from `first` on.
        memories: [B, T, N, D] float32, what the forward pass gave.
        first: the first step.
        plan: see `TrainingPlan`.

    The other arguments are those of `forward`.
    """
    bounds = Bounds(d_bound, f_bound, g_bound, heads_bound, k_bound, v_bound)
    weights = Weights(
        qkv_weight, qkv_bias, qkv_gamma, qkv_beta, heads_weight, heads_bias, attention_gamma, attention_beta,
        mlp_weight, mlp_bias, mlp_gamma, mlp_beta, gate_weight, gate_bias,
    )  # fmt: skip
    rows, same = tile_rows(batch, plan)
    here = tl.program_id(1)
    t = first + here
    step = rows.element * steps + t
    alive = None
    if lengths is not None:
        alive = t < tl.load(lengths + rows.element)
    reset = None
    reset_rows = None
    if resets is not None:
        reset = is_reset(resets, step, alive)
        reset_rows = reset_memory + rows.memory * plan.D
    before = rows_before(rows, t, steps, memory, memories, plan)
    is_memory = rows.is_memory if plan.inputs_in_tile else None
    if alive is not None:
        is_memory = rows.is_memory & alive
    incoming = Memory(before, reset, reset_rows, is_memory)
    factors = None
    factors_outside = None
    if mask is not None:
        factors, factors_outside = factor_rows(rows, step, mask, plan)
    kept = kept_of(kind, wide, marks, here.to(tl.int64), total, rows, plan)
    activate(
        rows, same, incoming, input_rows(rows, step, inputs, plan), factors, factors_outside, weights, kept,
        blocks_bound, layers_bound, bounds, plan,
    )  # fmt: skip
