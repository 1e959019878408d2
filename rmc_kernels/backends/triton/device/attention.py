"""Multi-head attention of a tile's rows over the rows of their own batch element."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.tile import (
    finite,
    is_multiple,
    join_statistics,
    load_rows,
    no_statistics,
    normalise,
    reciprocal_deviation,
    store_rows,
)


class Projected(NamedTuple):
    """Queries, keys and values of the tile.

    Attributes:
        rows: [R] pointers to the row's [F] before its norm, in the compute dtype, head-major.
        flaws: pointer to [R] float32 of the tile, see `project_qkv`.
        mean, rstd: [R], of the norm.
        gamma, beta: its affine, [F] from `at` on; None without a norm.
        outside: [R] pointers to an input row's [F], after its norm, that the row attends to beside those of the tile;
            None where input rows are in the tile.
    """

    rows: tl.tensor
    flaws: tl.tensor
    mean: tl.tensor
    rstd: tl.tensor
    gamma: tl.tensor
    beta: tl.tensor
    at: tl.tensor
    outside: tl.tensor


@triton.jit
def head_part(projected, start, columns, WIDTH: tl.constexpr):
    """[R, C] float32, normalised: columns [C] of the part of `WIDTH` that begins at `start`, 0 past it."""
    norm = (projected.mean, projected.rstd, projected.gamma, projected.beta, projected.at + start)
    return normalise(load_rows(projected.rows + start, columns, WIDTH), columns, norm, WIDTH)


@triton.jit
def head_weights(
    projected, start, same, bounds, plan: tl.constexpr
):  # fmt: skip
    """Softmax weights of one head: [R, R] float32 over the tile's rows, and [R] of the row outside (0 without)."""
    dtype: tl.constexpr = projected.rows.dtype.element_ty
    scores = tl.full((plan.blocks.rows, plan.blocks.rows), 0.0, tl.float32)
    outside = tl.full((plan.blocks.rows,), 0.0, tl.float32)
    for c in range(0, bounds.K, plan.key_columns):
        columns = c + tl.arange(0, plan.key_columns)
        q = head_part(projected, start, columns, plan.K)
        k = head_part(projected, start + plan.K, columns, plan.K)
        scores = tl.dot(q.to(dtype), tl.trans(k.to(dtype)), scores, input_precision=plan.blocks.precision)
        if projected.outside is not None:
            other = load_rows(projected.outside + (start + plan.K), columns, plan.K).to(tl.float32)
            outside += tl.sum(q * other, 1)
    scale: tl.constexpr = plan.K**-0.5
    # What is not finite in a row makes all scores of its element NaN, and none of another element in the tile.
    scores = scores * scale + tl.load(projected.flaws + tl.arange(0, plan.blocks.rows))[None, :]
    scores = tl.where(same, scores, float("-inf"))
    largest = tl.max(scores, 1)
    if projected.outside is not None:
        outside *= scale
        largest = tl.maximum(largest, outside)
    weights = tl.exp(scores - largest[:, None])
    total = tl.sum(weights, 1)
    if projected.outside is not None:
        outside = tl.exp(outside - largest)
        total += outside
    return weights / total[:, None], outside / total


@triton.jit
def attend(
    projected, same, mask, mask_outside, residual: tl.constexpr, captured, out, bounds,
    plan: tl.constexpr,
):  # fmt: skip
    """Concatenated heads `P v`, plus a residual; and the statistics of the norm that follows.

    Args:
        projected: see `Projected`.
        same: [R, R], which row (axis 1) is a key of which row (axis 0).
        mask: [R, R] pointers to factors of the first head's weights, the other heads' N * S apart; None without.
        mask_outside: [R] pointers to those of the row outside.
        residual, captured: operand function of the rows that are added; None for none.
        out: [R] pointers: float32, or the compute dtype where an output projection follows.
        bounds, plan: see `Bounds` and `Plan`.

    Returns:
        mean and rstd, [R], of each row of the result.
    """
    dtype: tl.constexpr = projected.rows.dtype.element_ty
    mean, squares = no_statistics(plan.blocks.rows)
    for h in range(bounds.heads):
        start = h * (2 * plan.K + plan.V)
        weights, outside = head_weights(projected, start, same, bounds, plan)
        if mask is not None:
            weights *= tl.load(mask + h * (plan.N * plan.S), mask=same, other=0.0).to(tl.float32)
            if projected.outside is not None:
                outside *= tl.load(mask_outside + h * (plan.N * plan.S)).to(tl.float32)
        for c in range(0, bounds.V, plan.value_columns):
            columns = c + tl.arange(0, plan.value_columns)
            v = head_part(projected, start + 2 * plan.K, columns, plan.V)
            own = weights
            if projected.gamma is not None:
                # What the norm's affine, or rounding after it, made infinite or NaN: `flaws` cannot have it.
                flaw = tl.sum(v.to(dtype).to(tl.float32) * 0.0, 1)
                own = tl.where(same, weights + flaw[None, :], 0.0)
            y = tl.dot(own.to(dtype), finite(v, dtype), input_precision=plan.blocks.precision)
            if projected.outside is not None:
                other = load_rows(projected.outside + (start + 2 * plan.K), columns, plan.V)
                y += outside[:, None] * other.to(tl.float32)
            if residual is not None:
                at = h * plan.V + columns
                if not is_multiple(plan.V, plan.value_columns):
                    at = tl.minimum(at, plan.D - 1)
                y += residual(at, captured, plan.D)
            mean, squares = join_statistics(mean, squares, h * plan.V + c, y, c, plan.V)
            store_rows(out + h * plan.V, columns, y.to(out.dtype.element_ty), plan.V)
    return mean, reciprocal_deviation(squares, plan.D)
