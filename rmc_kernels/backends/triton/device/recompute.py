"""The activations of steps whose memories are known: nothing recurs, so all steps run side by side."""

from __future__ import annotations

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.forward import RUN_TIME
from rmc_kernels.backends.triton.device.phases import Bounds
from rmc_kernels.backends.triton.device.step import Weights, activate, from_input, incoming_memory, kept_of
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
    length = None
    if lengths is not None:
        length = tl.load(lengths + rows.element)
    step = tl.program_id(1)
    t = first + step
    memory_in = incoming_memory(rows, t, steps, memory, memories, length, resets, reset_memory, plan)
    given = from_input(rows, t, steps, inputs, input_gates, mask, plan)
    kept = kept_of(kind, wide, marks, step.to(tl.int64), total, rows, plan)
    activate(rows, same, memory_in, given, weights, kept, blocks_bound, layers_bound, bounds, plan)
