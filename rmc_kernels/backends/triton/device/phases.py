"""The phases of a step but attention: each reads what earlier phases left in scratch and leaves its own there.

Between two phases stands the synchronisation of the kernel that runs them (`tl.debug_barrier()` in `forward.py`): scratch
that one phase writes is read by a later one under other layouts, and nothing else orders a store and a load of the same
address in Triton. No phase reads what it writes.

Arguments that all share: `rows`, `memory`, `sizes`, `bounds`, `blocks` are `Rows`, `Memory`, `Sizes`, `Bounds`, `Blocks`;
scratch is given as [R] pointers to rows; a product's left side is an operand function with what it captures.
"""

from __future__ import annotations

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


@triton.jit
def enter_block(memory, inputs, is_input, z, norm, first, out, sizes, bounds, blocks):
    """The rows that a block attends to: [M; u] in a step's first block, LayerNorm of `z` in the others.

    Args:
        inputs: [R] pointers to u [D]; read for input rows only.
        is_input: [R].
        z: [R] pointers to what the block before left.
        norm: its last norm, see `normalise`.
        first: whether this is the first block.
        out: [R] pointers, float32.
    """
    for c in range(0, bounds.D, blocks.N):
        columns = c + tl.arange(0, blocks.N)
        if first:
            real = is_input[:, None] & (columns < sizes.D)[None, :]
            u = tl.load(inputs[:, None] + columns[None, :], mask=real, other=0.0)
            store_rows(out, columns, load_memory(memory, columns, sizes.D) + u.to(tl.float32), sizes.D)
        else:
            store_rows(out, columns, normalise(load_rows(z, columns, sizes.D), columns, norm, sizes.D), sizes.D)


@triton.jit
def project_qkv(operand: tl.constexpr, captured, weight, bias, out, flaws, ROWS: tl.constexpr, sizes, bounds, blocks):
    """Queries, keys and values of all heads, before their norm; and the statistics of that norm.

    Args:
        weight, bias: [F, D], [F].
        out: [R] pointers, compute dtype.
        flaws: [R] pointers to one float32 per row: 0, or NaN where a number of the row is not finite.

    Returns:
        mean and rstd, [R], of each row.
    """
    a = resident(operand, captured, sizes.D, blocks)
    mean, squares = no_statistics(ROWS)
    flaw = tl.zeros((ROWS,), tl.float32)
    for c in tl.range(0, bounds.F, blocks.N, num_stages=blocks.STAGES):
        columns = c + tl.arange(0, blocks.N)
        y = product(operand, captured, a, weight, c, bounds.D, sizes.F, sizes.D, ROWS, blocks)
        y += load_vector(bias, columns, sizes.F)
        mean, squares = join_statistics(mean, squares, c, y, c, sizes.F)
        kept = y.to(out.dtype.element_ty)
        flaw += tl.sum(kept.to(tl.float32) * 0.0, 1)
        store_rows(out, columns, kept, sizes.F)
    tl.store(flaws, flaw)
    return mean, reciprocal_deviation(squares, sizes.F)


@triton.jit
def gate_terms(memory, weight, bias, out, dtype: tl.constexpr, ROWS: tl.constexpr, sizes, bounds, blocks):
    """`tanh(M) W_gm + b_gm`: the part of both gates' pre-activations that the memory gives.

    Args:
        weight, bias: [G, D], [G].
        out: [R] pointers, float32.
        dtype: of the products' operands.
    """
    captured = (memory, sizes.D, dtype)
    a = resident(tanh_memory_rows, captured, sizes.D, blocks)
    for c in tl.range(0, bounds.G, blocks.N, num_stages=blocks.STAGES):
        columns = c + tl.arange(0, blocks.N)
        y = product(tanh_memory_rows, captured, a, weight, c, bounds.D, sizes.G, sizes.D, ROWS, blocks)
        store_rows(out, columns, y + load_vector(bias, columns, sizes.G), sizes.G)


@triton.jit
def project_heads(
    operand: tl.constexpr, captured, weight, bias, residual: tl.constexpr, residual_captured, out, ROWS: tl.constexpr,
    sizes, bounds, blocks,
):  # fmt: skip
    """The output projection of the concatenated heads, plus the residual.

    Args:
        weight, bias: [D, D], [D].
        residual, residual_captured: operand function of the rows that are added; None for none.
        out: [R] pointers, float32.
    """
    a = resident(operand, captured, sizes.D, blocks)
    for c in tl.range(0, bounds.D, blocks.N, num_stages=blocks.STAGES):
        columns = c + tl.arange(0, blocks.N)
        y = product(operand, captured, a, weight, c, bounds.D, sizes.D, sizes.D, ROWS, blocks)
        y += load_vector(bias, columns, sizes.D)
        if residual is not None:
            y += residual(columns, residual_captured)
        store_rows(out, columns, y, sizes.D)


@triton.jit
def hidden_layer(operand: tl.constexpr, captured, weight, bias, out, ROWS: tl.constexpr, sizes, bounds, blocks):
    """ReLU of one MLP layer.

    Args:
        weight, bias: [D, D], [D].
        out: [R] pointers, compute dtype.
    """
    a = resident(operand, captured, sizes.D, blocks)
    for c in tl.range(0, bounds.D, blocks.N, num_stages=blocks.STAGES):
        columns = c + tl.arange(0, blocks.N)
        y = product(operand, captured, a, weight, c, bounds.D, sizes.D, sizes.D, ROWS, blocks)
        y = tl.maximum(y + load_vector(bias, columns, sizes.D), 0.0, propagate_nan=tl.PropagateNan.ALL)
        store_rows(out, columns, y.to(out.dtype.element_ty), sizes.D)


@triton.jit
def last_layer(
    operand: tl.constexpr, captured, weight, bias, ENDS_IN_RELU: tl.constexpr, z, norm, out, ROWS: tl.constexpr,
    sizes, bounds, blocks,
):  # fmt: skip
    """The last MLP layer plus the residual; and the statistics of the norm that follows.

    Args:
        weight, bias: [D, D], [D].
        z, norm: the MLP's input is `z`, [R] pointers to float32, under `norm`.
        out: [R] pointers, float32.

    Returns:
        mean and rstd, [R], of each row.
    """
    a = resident(operand, captured, sizes.D, blocks)
    mean, squares = no_statistics(ROWS)
    for c in tl.range(0, bounds.D, blocks.N, num_stages=blocks.STAGES):
        columns = c + tl.arange(0, blocks.N)
        y = product(operand, captured, a, weight, c, bounds.D, sizes.D, sizes.D, ROWS, blocks)
        y += load_vector(bias, columns, sizes.D)
        if ENDS_IN_RELU:
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y += normalise(load_rows(z, columns, sizes.D), columns, norm, sizes.D)
        mean, squares = join_statistics(mean, squares, c, y, c, sizes.D)
        store_rows(out, columns, y, sizes.D)
    return mean, reciprocal_deviation(squares, sizes.D)


@triton.jit
def update(
    rows, memory, alive, z, norm, gates, from_input, input_bias, forget_bias, out, sizes, bounds, blocks
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
    if sizes.G == 2:  # one gate per slot
        i = sigmoid(tl.load(gates) + tl.load(from_input).to(tl.float32) + input_bias)[:, None]
        f = sigmoid(tl.load(gates + 1) + tl.load(from_input + 1).to(tl.float32) + forget_bias)[:, None]
    for c in range(0, bounds.D, blocks.N):
        columns = c + tl.arange(0, blocks.N)
        new = normalise(load_rows(z, columns, sizes.D), columns, norm, sizes.D)
        if from_input is not None or alive is not None:
            old = load_memory(memory, columns, sizes.D)
        if from_input is not None:
            if sizes.G > 2:
                i = load_rows(gates, columns, sizes.D) + load_rows(from_input, columns, sizes.D).to(tl.float32)
                f = load_rows(gates + sizes.D, columns, sizes.D)
                f += load_rows(from_input + sizes.D, columns, sizes.D).to(tl.float32)
                i, f = sigmoid(i + input_bias), sigmoid(f + forget_bias)
            new = i * tanh(new) + f * old
        if alive is not None:
            new = tl.where(alive[:, None], new, old)
        tl.store(out[:, None] + columns[None, :], new, mask=rows.stored[:, None] & (columns < sizes.D)[None, :])
