"""The backward kernel: a program takes a tile of batch elements backwards through some steps, in one launch.

As in the forward kernel programs never meet, and barriers are those of one program.

Loops that hold other loops keep what does not change in them: hoisted, the addresses of all phases would be held at a
time, and 64 rows in float32 then spill in inner loops (sm_80: 35 spills instead of 8).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.attention import Projected
from rmc_kernels.backends.triton.device.back_attention import Outside, attend_back
from rmc_kernels.backends.triton.device.back_phases import (
    hidden_back,
    leave_attention,
    leave_gates,
    leave_memory,
    leave_mlp,
    leave_qkv,
    product_back,
)
from rmc_kernels.backends.triton.device.forward import RUN_TIME
from rmc_kernels.backends.triton.device.operands import Memory, buffer_rows, memory_rows
from rmc_kernels.backends.triton.device.phases import Bounds
from rmc_kernels.backends.triton.device.step import (
    ATTENTION,
    MARKS,
    MLP,
    QKV,
    factor_rows,
    input_rows,
    is_reset,
    kept_of,
    kept_statistics,
    rows_before,
)
from rmc_kernels.backends.triton.device.tile import tile_rows


@triton.jit(do_not_specialize=[*RUN_TIME, "first", "count", "kept_first", "total"])
def backward(
    grad,
    memories,
    memory,
    inputs,
    input_gates,
    lengths,
    resets,
    reset_memory,
    mask,
    qkv_gamma,
    qkv_beta,
    attention_gamma,
    attention_beta,
    mlp_gamma,
    mlp_beta,
    qkv_back,
    heads_back,
    mlp_back,
    gate_back,
    kind,
    wide,
    marks,
    work,
    sums,
    scratch,
    carry,
    reset_carry,
    d_inputs,
    batch,
    steps,
    total,
    first,
    count,
    kept_first,
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
    """Gradients of the steps from `first` to `first + count`, last one first; arguments beyond these as in `forward`.

    Where a buffer is called ping-pong, step t reads half (t + 1) % 2 and writes half t % 2.

    Args:
        grad: [B, T, N, D] gradient of the memories, float32.
        memories: [B, T, N, D] float32, what the forward pass gave.
        qkv_back: [blocks, D, F], the transposed weight, as the next three.
        heads_back: [D, D]; None without an output projection.
        mlp_back: [layers, D, D].
        gate_back: [D, G]; None without gates.
        kind, wide, marks, total: see `kept_of`; of the steps from `kept_first` on.
        work: [count, total, work width], type: see `TrainingPlan`; receives what the weight gradients are made of.
        sums: [count, programs, sums width] float32: receives sums over the rows of a tile.
        scratch: [total, scratch width] float32.
        carry: [2, total, D] float32, ping-pong: the gradient that a step passes on to the one before.
        reset_carry: likewise, the gradient of the reset memory; None without resets.
        d_inputs: gradient of `inputs`, type. Where that is queries, keys and values, the queries are not written.
        first, count, kept_first: the steps.
        plan: see `TrainingPlan`.
    """
    D: tl.constexpr = plan.D
    operand: tl.constexpr = buffer_rows if plan.inputs_in_tile else memory_rows
    bounds = Bounds(d_bound, f_bound, g_bound, heads_bound, k_bound, v_bound)
    rows, same = tile_rows(batch, plan)
    slot = tl.minimum(rows.slot, plan.N - 1)
    # The tile's first row goes to the base of a buffer, a scalar: added to each row's offset it took registers, so that
    # 64 float32 rows spilled in an inner loop.
    first_row = tl.program_id(0).to(tl.int64) * plan.blocks.rows
    row = tl.arange(0, plan.blocks.rows)
    outer = scratch + first_row * plan.scratch_width + row * plan.scratch_width
    inner, held, d_normal = outer + plan.inner_at, outer + plan.held_at, outer + plan.d_normal_at
    half = tl.cast(total, tl.int64) * D
    carry = carry + first_row * D + row * D
    if resets is not None:
        reset_carry = reset_carry + first_row * D + row * D
    within = row % plan.padded
    element = tl.program_id(0) * (plan.blocks.rows // plan.padded) + row // plan.padded
    is_input = (element < batch) & (within >= plan.N) & (within < plan.live)
    own = tl.program_id(0) * (plan.blocks.rows // plan.padded) + tl.arange(0, plan.blocks.rows // plan.padded)
    if lengths is not None:
        length = tl.load(lengths + rows.element)

    for back in tl.range(count, disable_licm=True):
        t = first + count - 1 - back
        step = rows.element * steps + t
        alive = None
        if lengths is not None:
            alive = t < length
        reset = None
        reset_rows = None
        if resets is not None:
            reset = is_reset(resets, step, alive)
            reset_rows = reset_memory + rows.memory * D
        before = rows_before(rows, t, steps, memory, memories, plan)
        is_memory = rows.is_memory if plan.inputs_in_tile else None
        if alive is not None:
            is_memory = rows.is_memory & alive
        incoming = Memory(before, reset, reset_rows, is_memory)
        kept = kept_of(kind, wide, marks, tl.cast(t - kept_first, tl.int64), total, rows, plan)
        factors = None
        factors_outside = None
        if mask is not None:
            factors, factors_outside = factor_rows(rows, step, mask, plan)
        from_input = None
        if input_gates is not None:
            from_input = input_gates + step * plan.G
        here = tl.cast(t - first, tl.int64)
        step_work = work + (here * total + first_row) * plan.work_width + row * plan.work_width
        step_sums = sums + (here * tl.num_programs(0) + tl.program_id(0)) * plan.sums_width
        d_gates = step_work + plan.d_gates_at
        last = blocks_bound - 1
        mean, rstd = kept_statistics(kept, MLP, last, plan)
        leave_gates(
            rows, incoming, alive, carry + (t + 1) % 2 * half, grad + (step * plan.N + slot) * D,
            kept.wide + last * plan.block_wide + plan.candidate_at, (mean, rstd, mlp_gamma, mlp_beta, last * D),
            kept.wide + plan.gates_at, from_input, input_bias, forget_bias, outer, held, d_gates, bounds, plan,
        )  # fmt: skip
        tl.debug_barrier()
        for reverse in tl.range(blocks_bound, disable_licm=True):
            block = blocks_bound - 1 - reverse
            block_kind = kept.kind + block * plan.block_kind
            hidden = block_kind + plan.hidden_at
            z = kept.wide + block * plan.block_wide
            block_work = step_work + block * plan.block_work
            d_mlp, d_qkv = block_work + plan.d_mlp_at, block_work + plan.d_qkv_at
            block_sums = step_sums + block * plan.block_sums

            top: tl.constexpr = plan.layers - 1
            relu = hidden + top * D if plan.ends_in_relu else None
            mean, rstd = kept_statistics(kept, MLP, block, plan)
            mlp_norm = (mean, rstd, mlp_gamma, mlp_beta, block * D)
            leave_mlp(
                outer, z + plan.candidate_at, mlp_norm, relu, inner, d_mlp + top * D, block_sums + plan.mlp_sums_at,
                bounds, plan,
            )  # fmt: skip
            tl.debug_barrier()
            if plan.layers > 1:
                for below in range(layers_bound - 1):
                    layer = layers_bound - 1 - below
                    hidden_back(
                        d_mlp + layer * D, mlp_back + layer * (D * D), hidden + (layer - 1) * D,
                        d_mlp + (layer - 1) * D, bounds, plan,
                    )  # fmt: skip
                    tl.debug_barrier()
            product_back(d_mlp, mlp_back, D, bounds.D, inner, outer, bounds, plan)
            tl.debug_barrier()

            mean, rstd = kept_statistics(kept, ATTENTION, block, plan)
            attention_norm = (mean, rstd, attention_gamma, attention_beta, block * D)
            captured = z + plan.entered_at if plan.inputs_in_tile else incoming
            d_heads = block_work + plan.d_heads_at if plan.projection else None
            leave_attention(
                operand, captured, outer, z, attention_norm, inner, block_work, block_work + plan.mixed_at, d_heads,
                block_sums + plan.attention_sums_at, bounds, plan,
            )  # fmt: skip
            tl.debug_barrier()
            from_heads = inner
            if plan.projection:
                product_back(d_heads, heads_back, D, bounds.D, None, outer, bounds, plan)
                tl.debug_barrier()
                from_heads = outer
            mean, rstd = kept_statistics(kept, QKV, block, plan)
            affine_at = block * plan.F
            projected = Projected(
                block_kind, kept.marks + block * MARKS * kept.total, mean, rstd, qkv_gamma, qkv_beta, affine_at,
                None if plan.inputs_in_tile else input_rows(rows, step, inputs, plan),
            )  # fmt: skip
            outside = None
            if not plan.inputs_in_tile:
                outside = Outside(d_inputs + (tl.cast(own, tl.int64) * steps + t) * plan.F, own < batch)
            attend_back(
                projected, same, factors, factors_outside, from_heads, d_normal, outside, bounds, plan,
            )  # fmt: skip
            tl.debug_barrier()
            qkv_norm = (mean, rstd, qkv_gamma, qkv_beta, affine_at)
            leave_qkv(d_normal, block_kind, qkv_norm, d_qkv, block_sums, bounds, plan)
            tl.debug_barrier()
            product_back(
                d_qkv, qkv_back + block * (plan.F * D), plan.F, bounds.F, inner if plan.residual else None, outer,
                bounds, plan,
            )  # fmt: skip
            tl.debug_barrier()

        d_input = None
        if plan.inputs_in_tile:
            d_input = d_inputs + (step * plan.n + tl.maximum(rows.slot - plan.N, 0)) * D
        reset_from = None
        reset_to = None
        if resets is not None:
            reset_from, reset_to = reset_carry + (t + 1) % 2 * half, reset_carry + t % 2 * half
        leave_memory(
            rows, incoming, outer, held, d_gates, gate_back, step_work + plan.squashed_at, d_input, is_input,
            carry + t % 2 * half, reset_from, reset_to, bounds, plan,
        )  # fmt: skip
        tl.debug_barrier()
