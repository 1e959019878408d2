"""The phases of a step backwards but attention; what stands at the head of `phases.py` holds here too.

Products run on transposed copies of the weights, so that they are those of the forward pass. Rows that are no row of
the batch have gradient 0 throughout, which `leave_gates` sees to, and so count in no weight gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.operands import buffer_rows, load_memory
from rmc_kernels.backends.triton.device.tile import (
    load_rows,
    load_vector,
    normalise,
    product,
    resident,
    sigmoid,
    store_rows,
    tanh,
)


@triton.jit
def _scaled(d, x, columns, norm, WIDTH: tl.constexpr):
    """The normalised x without its affine, and the gradient `d` of the norm's output times gamma; [R, C]."""
    mean, rstd, gamma, _, at = norm
    return (x.to(tl.float32) - mean[:, None]) * rstd[:, None], d * load_vector(gamma + at, columns, WIDTH)


@triton.jit
def norm_sums(d, x, norm, bound, WIDTH: tl.constexpr, plan: tl.constexpr):
    """What the gradient of a norm needs of whole rows: means of `gamma d` and `gamma d * x normalised`, [R] each.

    Args:
        d: [R] pointers to the gradient of the norm's output, float32.
        x: [R] pointers to its input.
        norm: see `normalise`; zeros without a norm.
        bound: WIDTH, as a run-time integer.
    """
    gamma = norm[2]
    along = tl.full((plan.blocks.rows,), 0.0, tl.float32)
    across = tl.full((plan.blocks.rows,), 0.0, tl.float32)
    if gamma is not None:
        for c in range(0, bound, plan.blocks.columns):
            columns = c + tl.arange(0, plan.blocks.columns)
            hat, scaled = _scaled(load_rows(d, columns, WIDTH), load_rows(x, columns, WIDTH), columns, norm, WIDTH)
            along += tl.sum(scaled, 1)
            across += tl.sum(scaled * hat, 1)
    return along / WIDTH, across / WIDTH


@triton.jit
def through_norm(d, x, columns, norm, means, sums, WIDTH: tl.constexpr):
    """Gradient of a norm's input, [R, C] float32: columns [C] of it; `d` itself without a norm.

    Args:
        d, x: [R, C], gradient of the norm's output and its input.
        means: of `norm_sums`.
        sums: pointer to the sums over the tile's rows of the gradients of the norm's weight and bias, [2, WIDTH]
            float32, which are stored.
    """
    rstd, gamma = norm[1], norm[2]
    if gamma is not None:
        along, across = means
        hat, scaled = _scaled(d, x, columns, norm, WIDTH)
        tl.store(sums + columns, tl.sum(d * hat, 0), mask=columns < WIDTH)
        tl.store(sums + WIDTH + columns, tl.sum(d, 0), mask=columns < WIDTH)
        d = rstd[:, None] * (scaled - along[:, None] - hat * across[:, None])
    return d


@triton.jit
def leave_gates(
    rows, memory, alive, arriving, grad, candidate, norm, gates, from_input, input_bias, forget_bias, outer, held,
    d_gates, bounds, plan: tl.constexpr,
):  # fmt: skip
    """`update` backwards: from the gradient of the new memory to those of the candidate, the gates and the old memory.

    Args:
        alive: [R], whether the step is within the element's length; None where all are.
        arriving: [R] pointers to the gradient that the next step passed on [D], float32.
        grad: [R] pointers to the gradient of the step's output [D], float32.
        candidate, norm, gates, from_input, input_bias, forget_bias: as in `update`.
        outer: [R] pointers, float32: receives the gradient of the normalised candidate.
        held: [R] pointers, float32: receives the gradient that goes to the incoming memory directly.
        d_gates: [R] pointers, compute dtype: receives that of both gates before their sigmoid.
    """
    if plan.G == 2:  # one gate per slot
        i = sigmoid(tl.load(gates) + tl.load(from_input).to(tl.float32) + input_bias)[:, None]
        f = sigmoid(tl.load(gates + 1) + tl.load(from_input + 1).to(tl.float32) + forget_bias)[:, None]
        d_i = tl.full((plan.blocks.rows,), 0.0, tl.float32)
        d_f = tl.full((plan.blocks.rows,), 0.0, tl.float32)
    for c in range(0, bounds.D, plan.blocks.columns):
        columns = c + tl.arange(0, plan.blocks.columns)
        d = load_rows(arriving, columns, plan.D) + load_rows(grad, columns, plan.D).to(tl.float32)
        d = tl.where(rows.stored[:, None], d, 0.0)
        kept = tl.zeros_like(d)
        if alive is not None:
            kept = tl.where(alive[:, None], 0.0, d)
            d = tl.where(alive[:, None], d, 0.0)
        if plan.G:
            new = tanh(normalise(load_rows(candidate, columns, plan.D), columns, norm, plan.D))
            old = load_memory(memory, columns, plan.D)
            if plan.G > 2:
                i = load_rows(gates, columns, plan.D) + load_rows(from_input, columns, plan.D).to(tl.float32)
                f = load_rows(gates + plan.D, columns, plan.D)
                f += load_rows(from_input + plan.D, columns, plan.D).to(tl.float32)
                i, f = sigmoid(i + input_bias), sigmoid(f + forget_bias)
            to_i = d * new * i * (1.0 - i)
            to_f = d * old * f * (1.0 - f)
            if plan.G > 2:
                store_rows(d_gates, columns, to_i.to(d_gates.dtype.element_ty), plan.D)
                store_rows(d_gates + plan.D, columns, to_f.to(d_gates.dtype.element_ty), plan.D)
            else:
                d_i += tl.sum(to_i, 1)
                d_f += tl.sum(to_f, 1)
            kept += d * f
            d = d * i * (1.0 - new * new)
        store_rows(held, columns, kept, plan.D)
        store_rows(outer, columns, d, plan.D)
    if plan.G == 2:
        tl.store(d_gates, d_i.to(d_gates.dtype.element_ty))
        tl.store(d_gates + 1, d_f.to(d_gates.dtype.element_ty))


@triton.jit
def leave_mlp(outer, candidate, norm, relu, inner, d_layer, sums, bounds, plan: tl.constexpr):
    """The norm after the MLP and, where there is one, the last ReLU backwards.

    Args:
        outer: [R] pointers to the gradient of the norm's output, float32.
        candidate, norm: the norm's input, [R] pointers to float32, and the norm.
        relu: [R] pointers to the last layer's ReLU output; None without that ReLU.
        inner: [R] pointers, float32: receives the gradient of the MLP's output plus residual.
        d_layer: [R] pointers, compute dtype: receives that of what the last layer puts out.
        sums: see `through_norm`.
    """
    means = norm_sums(outer, candidate, norm, bounds.D, plan.D, plan)
    for c in range(0, bounds.D, plan.blocks.columns):
        columns = c + tl.arange(0, plan.blocks.columns)
        d, x = load_rows(outer, columns, plan.D), load_rows(candidate, columns, plan.D)
        d = through_norm(d, x, columns, norm, means, sums, plan.D)
        store_rows(inner, columns, d, plan.D)
        if relu is not None:
            d = tl.where(load_rows(relu, columns, plan.D).to(tl.float32) <= 0.0, 0.0, d)
        store_rows(d_layer, columns, d.to(d_layer.dtype.element_ty), plan.D)


@triton.jit
def hidden_back(d_layer, weight, relu, out, bounds, plan: tl.constexpr):
    """An MLP layer backwards, and the ReLU before it.

    Args:
        d_layer: [R] pointers to the gradient of what the layer puts out, compute dtype.
        weight: the layer's weight transposed, [D, D].
        relu: [R] pointers to the output of that ReLU.
        out: [R] pointers, compute dtype.
    """
    blocks: tl.constexpr = plan.blocks
    a = resident(buffer_rows, d_layer, weight, plan.D, blocks)
    for c in tl.range(0, bounds.D, plan.blocks.columns, num_stages=plan.blocks.stages):
        columns = c + tl.arange(0, plan.blocks.columns)
        d = product(buffer_rows, d_layer, a, weight, c, bounds.D, plan.D, plan.D, blocks)
        d = tl.where(load_rows(relu, columns, plan.D).to(tl.float32) <= 0.0, 0.0, d)
        store_rows(out, columns, d.to(out.dtype.element_ty), plan.D)


@triton.jit
def product_back(
    d, weight, INNER: tl.constexpr, bound, residual, out, bounds, plan: tl.constexpr,
):  # fmt: skip
    """A Linear with D inputs backwards, plus the gradient of a residual.

    Args:
        d: [R] pointers to the gradient of what the Linear puts out, `INNER` columns, compute dtype.
        weight: its weight transposed, [D, INNER].
        bound: INNER, as a run-time integer.
        residual: [R] pointers to float32; None without one.
        out: [R] pointers, float32.
    """
    blocks: tl.constexpr = plan.blocks
    a = resident(buffer_rows, d, weight, INNER, blocks)
    for c in tl.range(0, bounds.D, plan.blocks.columns, num_stages=plan.blocks.stages):
        columns = c + tl.arange(0, plan.blocks.columns)
        y = product(buffer_rows, d, a, weight, c, bound, plan.D, INNER, blocks)
        if residual is not None:
            y += load_rows(residual, columns, plan.D)
        store_rows(out, columns, y, plan.D)


@triton.jit
def leave_attention(
    operand: tl.constexpr, captured, outer, z, norm, inner, entered, mixed, d_heads, sums, bounds, plan: tl.constexpr,
):  # fmt: skip
    """The norm after attention backwards; and the left sides of two weight gradients.

    Args:
        operand, captured: operand function of the rows that the block attended to.
        outer: [R] pointers to the gradient of the norm's output, float32.
        z, norm: the norm's input, [R] pointers to float32, and the norm.
        inner: [R] pointers, float32: receives the gradient of attention plus residual.
        entered, mixed: [R] pointers, compute dtype: receive what the block attended to, and the MLP's input.
        d_heads: [R] pointers, compute dtype: receives the gradient of what the output projection puts out; None
            without one.
        sums: see `through_norm`.
    """
    means = norm_sums(outer, z, norm, bounds.D, plan.D, plan)
    for c in range(0, bounds.D, plan.blocks.columns):
        columns = c + tl.arange(0, plan.blocks.columns)
        d, x = load_rows(outer, columns, plan.D), load_rows(z, columns, plan.D)
        d = through_norm(d, x, columns, norm, means, sums, plan.D)
        store_rows(inner, columns, d, plan.D)
        if d_heads is not None:
            store_rows(d_heads, columns, d.to(d_heads.dtype.element_ty), plan.D)
        store_rows(mixed, columns, normalise(x, columns, norm, plan.D).to(mixed.dtype.element_ty), plan.D)
        store_rows(entered, columns, operand(columns, captured, plan.D).to(entered.dtype.element_ty), plan.D)


@triton.jit
def leave_qkv(d_normal, qkv, norm, out, sums, bounds, plan: tl.constexpr):
    """The norm of the queries, keys and values backwards.

    Args:
        d_normal: [R] pointers to the gradient of its output [F], float32.
        qkv, norm: its input, [R] pointers [F], and the norm.
        out: [R] pointers, compute dtype.
        sums: see `through_norm`.
    """
    means = norm_sums(d_normal, qkv, norm, bounds.F, plan.F, plan)
    for c in range(0, bounds.F, plan.blocks.columns):
        columns = c + tl.arange(0, plan.blocks.columns)
        d, x = load_rows(d_normal, columns, plan.F), load_rows(qkv, columns, plan.F)
        d = through_norm(d, x, columns, norm, means, sums, plan.F)
        store_rows(out, columns, d.to(out.dtype.element_ty), plan.F)


@triton.jit
def leave_memory(
    rows, memory, outer, held, d_gates, gate_weight, squashed, d_input, is_input, departing, reset_from, reset_to,
    bounds, plan: tl.constexpr,
):  # fmt: skip
    """The gradient of the incoming memory, and that of the input rows where they are in the tile.

    Args:
        memory: the `Memory` that came in.
        outer: [R] pointers to the gradient of what the first block attended to, float32.
        held: see `leave_gates`.
        d_gates: [R] pointers to the gradient of both gates before their sigmoid, compute dtype.
        gate_weight: of the memory's gate terms, transposed [D, G].
        squashed: [R] pointers, compute dtype: receives tanh of the memory; None without gates.
        d_input: [R] pointers, compute dtype: rows that `is_input` [R] marks receive their gradient; None where no input
            row is in the tile.
        departing: [R] pointers, float32: receives what the step before gets.
        reset_from, reset_to: [R] pointers, float32: what the reset memory got of later steps, and with this one. None
            without resets.
    """
    if plan.G:
        blocks: tl.constexpr = plan.blocks
        a = resident(buffer_rows, d_gates, gate_weight, plan.G, blocks)
    for c in range(0, bounds.D, plan.blocks.columns):
        columns = c + tl.arange(0, plan.blocks.columns)
        d = load_rows(outer, columns, plan.D)
        if d_input is not None:
            at = d_input[:, None] + columns[None, :]
            written = is_input[:, None] & (columns < plan.D)[None, :]
            tl.store(at, d.to(d_input.dtype.element_ty), mask=written)
        d += load_rows(held, columns, plan.D)
        if plan.G:
            y = product(buffer_rows, d_gates, a, gate_weight, c, bounds.G, plan.D, plan.G, blocks)
            old = tanh(load_memory(memory, columns, plan.D))
            d += y * (1.0 - old * old)
            store_rows(squashed, columns, old.to(squashed.dtype.element_ty), plan.D)
        d = tl.where(rows.stored[:, None], d, 0.0)
        if reset_from is not None:
            to_reset = tl.where(memory.reset[:, None], d, 0.0)
            store_rows(reset_to, columns, load_rows(reset_from, columns, plan.D) + to_reset, plan.D)
            d = tl.where(memory.reset[:, None], 0.0, d)
        store_rows(departing, columns, d, plan.D)
