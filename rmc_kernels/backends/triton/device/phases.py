"""The phases of a step but attention: each reads what earlier phases left in scratch and leaves its own there.

Between two phases stands the synchronisation of the kernel that runs them (`tl.debug_barrier()` in `forward.py`): what
one phase writes a later one reads under another layout, and nothing else orders a store and a load of one address in
Triton. No phase reads what it writes.

Arguments that all share: `rows`, `memory`, `bounds`, `plan` are `Rows`, `Memory`, `Bounds`, `Plan`; scratch is given as
[R] pointers to rows; a product's left side is an operand function with what it captures.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.operands import load_memory, tanh_memory_rows
from rmc_kernels.backends.triton.device.tile import (
    join_statistics,
    load_rows,
    load_vector,
    no_statistics,
    normalise,
    product,
    reciprocal_deviation,
    resident,
    sigmoid,
    store_rows,
    tanh,
)


class Bounds(NamedTuple):
    """D, F, G, heads, K and V as run-time integers: loops with constexpr bounds are unrolled and spill."""

    D: tl.tensor
    F: tl.tensor
    G: tl.tensor
    heads: tl.tensor
    K: tl.tensor
    V: tl.tensor


@triton.jit
def enter_block(memory, inputs, is_input, z, norm, first, out, bounds, plan: tl.constexpr):
    """The rows that a block attends to: [M; u] in a step's first block, LayerNorm of `z` in the others.

    Args:
        inputs: [R] pointers to u [D]; read for input rows only.
        is_input: [R].
        z: [R] pointers to what the block before left.
        norm: its last norm, see `normalise`.
        first: whether this is the first block.
        out: [R] pointers, float32.
    """
    for c in range(0, bounds.D, plan.blocks.columns):
        columns = c + tl.arange(0, plan.blocks.columns)
        if first:
            real = is_input[:, None] & (columns < plan.D)[None, :]
            u = tl.load(inputs[:, None] + columns[None, :], mask=real, other=0.0)
            store_rows(out, columns, load_memory(memory, columns, plan.D) + u.to(tl.float32), plan.D)
        else:
            store_rows(out, columns, normalise(load_rows(z, columns, plan.D), columns, norm, plan.D), plan.D)


@triton.jit
def project_qkv(operand: tl.constexpr, captured, weight, bias, out, flaws, bounds, plan: tl.constexpr):
    """Queries, keys and values of all heads, before their norm; and the statistics of that norm.

    Args:
        weight, bias: [F, D], [F].
        out: [R] pointers, compute dtype.
        flaws: [R] pointers to one float32 per row: 0, or NaN where a number of the row is not finite.

    Returns:
        mean and rstd, [R], of each row.
    """
    blocks: tl.constexpr = plan.blocks
    a = resident(operand, captured, weight, plan.D, blocks)
    mean, squares = no_statistics(plan.blocks.rows)
    flaw = tl.full((plan.blocks.rows,), 0.0, tl.float32)
    for c in tl.range(0, bounds.F, plan.blocks.columns, num_stages=plan.blocks.stages):
        columns = c + tl.arange(0, plan.blocks.columns)
        y = product(operand, captured, a, weight, c, bounds.D, plan.F, plan.D, blocks)
        y += load_vector(bias, columns, plan.F)
        mean, squares = join_statistics(mean, squares, c, y, c, plan.F)
        kept = y.to(out.dtype.element_ty)
        flaw += tl.sum(kept.to(tl.float32) * 0.0, 1)
        store_rows(out, columns, kept, plan.F)
    tl.store(flaws, flaw)
    return mean, reciprocal_deviation(squares, plan.F)


@triton.jit
def gate_terms(memory, weight, bias, out, bounds, plan: tl.constexpr):
    """`tanh(M) W_gm + b_gm`: the part of both gates' pre-activations that the memory gives.

    Args:
        weight, bias: [G, D], [G].
        out: [R] pointers, float32.
    """
    blocks: tl.constexpr = plan.blocks
    a = resident(tanh_memory_rows, memory, weight, plan.D, blocks)
    for c in tl.range(0, bounds.G, plan.blocks.columns, num_stages=plan.blocks.stages):
        columns = c + tl.arange(0, plan.blocks.columns)
        y = product(tanh_memory_rows, memory, a, weight, c, bounds.D, plan.G, plan.D, blocks)
        store_rows(out, columns, y + load_vector(bias, columns, plan.G), plan.G)


@triton.jit
def project_heads(
    operand: tl.constexpr, captured, weight, bias, residual: tl.constexpr, residual_captured, out, bounds,
    plan: tl.constexpr,
):  # fmt: skip
    """The output projection of the concatenated heads, plus the residual.

    Args:
        weight, bias: [D, D], [D].
        residual, residual_captured: operand function of the rows that are added; None for none.
        out: [R] pointers, float32.
    """
    blocks: tl.constexpr = plan.blocks
    a = resident(operand, captured, weight, plan.D, blocks)
    for c in tl.range(0, bounds.D, plan.blocks.columns, num_stages=plan.blocks.stages):
        columns = c + tl.arange(0, plan.blocks.columns)
        y = product(operand, captured, a, weight, c, bounds.D, plan.D, plan.D, blocks)
        y += load_vector(bias, columns, plan.D)
        if residual is not None:
            y += residual(columns, residual_captured, plan.D)
        store_rows(out, columns, y, plan.D)


@triton.jit
def hidden_layer(operand: tl.constexpr, captured, weight, bias, out, bounds, plan: tl.constexpr):
    """ReLU of one MLP layer.

    Args:
        weight, bias: [D, D], [D].
        out: [R] pointers, compute dtype.
    """
    blocks: tl.constexpr = plan.blocks
    a = resident(operand, captured, weight, plan.D, blocks)
    for c in tl.range(0, bounds.D, plan.blocks.columns, num_stages=plan.blocks.stages):
        columns = c + tl.arange(0, plan.blocks.columns)
        y = product(operand, captured, a, weight, c, bounds.D, plan.D, plan.D, blocks)
        y = tl.maximum(y + load_vector(bias, columns, plan.D), 0.0, propagate_nan=tl.PropagateNan.ALL)
        store_rows(out, columns, y.to(out.dtype.element_ty), plan.D)


@triton.jit
def last_layer(
    operand: tl.constexpr, captured, weight, bias, z, norm, out, bounds, plan: tl.constexpr, relu=None,
):  # fmt: skip
    """The last MLP layer plus the residual; and the statistics of the norm that follows.

    Args:
        weight, bias: [D, D], [D].
        z, norm: the MLP's input is `z`, [R] pointers to float32, under `norm`.
        out: [R] pointers, float32.
        relu: [R] pointers to what is kept of a ReLU after this layer, compute dtype; None to keep nothing.

    Returns:
        mean and rstd, [R], of each row.
    """
    blocks: tl.constexpr = plan.blocks
    a = resident(operand, captured, weight, plan.D, blocks)
    mean, squares = no_statistics(plan.blocks.rows)
    for c in tl.range(0, bounds.D, plan.blocks.columns, num_stages=plan.blocks.stages):
        columns = c + tl.arange(0, plan.blocks.columns)
        y = product(operand, captured, a, weight, c, bounds.D, plan.D, plan.D, blocks)
        y += load_vector(bias, columns, plan.D)
        if plan.ends_in_relu:
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if relu is not None:
            store_rows(relu, columns, y.to(relu.dtype.element_ty), plan.D)
        y += normalise(load_rows(z, columns, plan.D), columns, norm, plan.D)
        mean, squares = join_statistics(mean, squares, c, y, c, plan.D)
        store_rows(out, columns, y, plan.D)
    return mean, reciprocal_deviation(squares, plan.D)


@triton.jit
def update(
    rows, memory, alive, z, norm, gates, from_input, input_bias, forget_bias, out, bounds, plan: tl.constexpr
):  # fmt: skip
    """The new memory `i * tanh(C) + f * M`, or C without gates; a frozen element keeps its own.

    Args:
        alive: [R], whether the step is within the element's length; None where all are.
        z, norm: `C` is `z`, [R] pointers to float32, under `norm`.
        gates: [R] pointers to the memory's gate terms [G], float32.
        from_input: [R] pointers to the input's gate terms [G]; None without gates.
        input_bias, forget_bias: constants on top of the learned ones.
        out: [R] pointers, float32; `rows.stored` ones are written.
    """
    if plan.G == 2:  # one gate per slot
        i = sigmoid(tl.load(gates) + tl.load(from_input).to(tl.float32) + input_bias)[:, None]
        f = sigmoid(tl.load(gates + 1) + tl.load(from_input + 1).to(tl.float32) + forget_bias)[:, None]
    for c in range(0, bounds.D, plan.blocks.columns):
        columns = c + tl.arange(0, plan.blocks.columns)
        new = normalise(load_rows(z, columns, plan.D), columns, norm, plan.D)
        if from_input is not None or alive is not None:
            old = load_memory(memory, columns, plan.D)
        if from_input is not None:
            if plan.G > 2:
                i = load_rows(gates, columns, plan.D) + load_rows(from_input, columns, plan.D).to(tl.float32)
                f = load_rows(gates + plan.D, columns, plan.D)
                f += load_rows(from_input + plan.D, columns, plan.D).to(tl.float32)
                i, f = sigmoid(i + input_bias), sigmoid(f + forget_bias)
            new = i * tanh(new) + f * old
        if alive is not None:
            new = tl.where(alive[:, None], new, old)
        tl.store(out[:, None] + columns[None, :], new, mask=rows.stored[:, None] & (columns < plan.D)[None, :])
