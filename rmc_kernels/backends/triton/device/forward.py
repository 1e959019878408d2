"""The forward kernel: a program takes a tile of batch elements through every step of a sequence, in one launch.

Batch elements never interact, so programs never meet: barriers are those of one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.attention import Projected, attend
from rmc_kernels.backends.triton.device.operands import Memory, buffer_rows, memory_rows, normal_rows
from rmc_kernels.backends.triton.device.phases import (
    Bounds,
    enter_block,
    gate_terms,
    hidden_layer,
    last_layer,
    project_heads,
    project_qkv,
    update,
)
from rmc_kernels.backends.triton.device.step import factor_rows, is_reset
from rmc_kernels.backends.triton.device.tile import no_statistics, tile_rows

#: Run-time arguments that must not be specialised: one compilation serves every batch size and length, and loops over
#: widths stay loops.
RUN_TIME = [
    "batch", "steps", "blocks_bound", "layers_bound", "d_bound", "f_bound", "g_bound", "heads_bound", "k_bound",
    "v_bound",
]  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def forward(
    out,
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
    entered,
    qkv,
    flaws,
    z,
    hidden,
    candidate,
    gates,
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
    """The memories of a sequence. One program per `rows / padded` batch elements.

    "Type" below is the compute type, that of x; all tensors are contiguous. Input rows are in the tile where
    there are several blocks or several of them; otherwise the one input row counts by its key and value alone.

    Args:
        out: [B, T, N, D] float32, the memory after each step.
        memory: [B, N, D] float32, before the first step.
        inputs: u [B, T, n, D] where input rows are in the tile, the input row's normalised queries, keys and values
            [B, T, F] otherwise; type.
        input_gates: [B, T, G] gate terms of the input, type; None without gates.
        lengths: [B] int64, clamped here; or None.
        resets: [B, T] uint8; or None.
        reset_memory: [B, N, D] float32; or None.
        mask: [B, T, H, N, S] factors of the attention weights, type; or None.
        qkv_weight, qkv_bias: [blocks, F, D], [blocks, F], type, as all parameters.
        qkv_gamma, qkv_beta: [blocks, F]; None without that norm.
        heads_weight, heads_bias: output projection [D, D], [D]; None without one.
        attention_gamma, attention_beta: [blocks, D]; None without that norm.
        mlp_weight, mlp_bias: [layers, D, D], [layers, D].
        mlp_gamma, mlp_beta: [blocks, D]; None without that norm.
        gate_weight, gate_bias: [G, D], [G]; None without gates.
        entered: scratch [rows, D] float32, the rows a block attends to; None where no input row is in the tile. `rows`
            is programs * R.
        qkv: scratch [rows, F], type: queries, keys and values before their norm.
        flaws: scratch [rows] float32, see `project_qkv`.
        z: scratch [rows, D] float32: attention plus residual, before its norm.
        hidden: scratch [rows, 2, D], type: the heads, then MLP layers in turn.
        candidate: scratch [rows, D] float32: MLP plus residual, before its norm.
        gates: scratch [rows, G] float32, gate terms of the memory; None without gates.
        batch, steps: B, T.
        blocks_bound, layers_bound: blocks, MLP layers.
        d_bound, f_bound, g_bound, heads_bound, k_bound, v_bound: see `Bounds`.
        input_bias, forget_bias: constants on top of the learned gate biases.
        plan: see `Plan`.
    """
    D: tl.constexpr = plan.D
    F: tl.constexpr = plan.F
    operand: tl.constexpr = buffer_rows if plan.inputs_in_tile else memory_rows
    residual: tl.constexpr = operand if plan.residual else None
    bounds = Bounds(d_bound, f_bound, g_bound, heads_bound, k_bound, v_bound)
    rows, same = tile_rows(batch, plan)
    slot = tl.minimum(rows.slot, plan.N - 1)
    if plan.inputs_in_tile:
        entered += rows.scratch * D
    qkv += rows.scratch * F
    tile_flaws = flaws + tl.program_id(0).to(tl.int64) * plan.blocks.rows
    z += rows.scratch * D
    hidden += rows.scratch * (2 * D)
    candidate += rows.scratch * D
    if gates is not None:
        gates += rows.scratch * plan.G
    if lengths is not None:
        length = tl.load(lengths + rows.element)

    before = memory + rows.memory * D
    for t in range(steps):
        step = rows.element * steps + t
        alive = None
        if lengths is not None:
            alive = t < length
        reset = None
        reset_rows = None
        if resets is not None:
            reset = is_reset(resets, step, alive)
            reset_rows = reset_memory + rows.memory * D
        incoming = Memory(before, reset, reset_rows, rows.is_memory if plan.inputs_in_tile else None)

        if gates is not None:
            gate_terms(incoming, gate_weight, gate_bias, gates, bounds, plan)
        mean, rstd = no_statistics(plan.blocks.rows)
        for block in range(blocks_bound):
            if plan.inputs_in_tile:
                u = inputs + (step * plan.n + tl.maximum(rows.slot - plan.N, 0)) * D
                left = (mean, rstd, mlp_gamma, mlp_beta, (block - 1) * D)
                enter_block(incoming, u, rows.is_memory == 0, candidate, left, block == 0, entered, bounds, plan)
                tl.debug_barrier()
                captured = entered
            else:
                captured = incoming
            mean, rstd = project_qkv(
                operand, captured, qkv_weight + block * (F * D), qkv_bias + block * F, qkv, flaws + rows.scratch,
                bounds, plan,
            )  # fmt: skip
            tl.debug_barrier()

            outside = None if plan.inputs_in_tile else inputs + step * F
            projected = Projected(qkv, tile_flaws, mean, rstd, qkv_gamma, qkv_beta, block * F, outside)
            factors = None
            factors_outside = None
            if mask is not None:
                factors, factors_outside = factor_rows(rows, step, mask, plan)
            if heads_weight is None:
                mean, rstd = attend(
                    projected, same, factors, factors_outside, residual, captured, z, bounds, plan,
                )  # fmt: skip
            else:
                attend(
                    projected, same, factors, factors_outside, None, captured, hidden, bounds, plan,
                )  # fmt: skip
                tl.debug_barrier()
                project_heads(
                    buffer_rows, hidden, heads_weight, heads_bias, residual, captured, z, bounds, plan,
                )  # fmt: skip
            tl.debug_barrier()

            norm = (mean, rstd, attention_gamma, attention_beta, block * D)
            normal = (z, norm)
            if plan.layers > 1:
                hidden_layer(normal_rows, normal, mlp_weight, mlp_bias, hidden, bounds, plan)
                tl.debug_barrier()
            if plan.layers > 2:
                for layer in range(1, layers_bound - 1):
                    hidden_layer(
                        buffer_rows, hidden + (layer - 1) % 2 * D, mlp_weight + layer * (D * D),
                        mlp_bias + layer * D, hidden + layer % 2 * D, bounds, plan,
                    )  # fmt: skip
                    tl.debug_barrier()
            last_weight, last_bias = mlp_weight + (plan.layers - 1) * (D * D), mlp_bias + (plan.layers - 1) * D
            if plan.layers > 1:
                mean, rstd = last_layer(
                    buffer_rows, hidden + plan.layers % 2 * D, last_weight, last_bias, z, norm,
                    candidate, bounds, plan,
                )  # fmt: skip
            else:
                mean, rstd = last_layer(
                    normal_rows, normal, last_weight, last_bias, z, norm, candidate, bounds, plan,
                )  # fmt: skip
            tl.debug_barrier()

        last = (mean, rstd, mlp_gamma, mlp_beta, (blocks_bound - 1) * D)
        from_input = None
        if gates is not None:
            from_input = input_gates + step * plan.G
        after = out + (step * plan.N + slot) * D
        update(
            rows, incoming, alive, candidate, last, gates, from_input, input_bias, forget_bias, after, bounds, plan,
        )  # fmt: skip
        before = after
        tl.debug_barrier()
