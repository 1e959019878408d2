"""Multi-head attention backwards, a head at a time: weights again, then their gradient, then those of v, q and k."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.attention import head_part, head_weights
from rmc_kernels.backends.triton.device.tile import finite, load_rows, store_rows


class Outside(NamedTuple):
    """Where the gradient of the input row's keys and values goes where that row is not in the tile.

    Attributes:
        rows: [R / padded] pointers to rows [F], one per batch element, in the compute dtype.
        real: [R / padded], whether the element exists.
    """

    rows: tl.tensor
    real: tl.tensor


@triton.jit
def _store_outside(outside, start, columns, x, WIDTH: tl.constexpr, plan: tl.constexpr):
    """The sum over each element's rows of x [R, C] to columns [C] of the part of `WIDTH` that begins at `start`."""
    elements: tl.constexpr = plan.blocks.rows // plan.padded
    total = tl.sum(tl.reshape(x, (elements, plan.padded, x.shape[1])), 1)
    at = (outside.rows + start)[:, None] + columns[None, :]
    tl.store(at, total.to(outside.rows.dtype.element_ty), mask=outside.real[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def attend_back(
    projected, same, mask, mask_outside, d_heads, out, outside, bounds, plan: tl.constexpr,
):  # fmt: skip
    """Gradients of the normalised queries, keys and values.

    Args:
        projected, same, mask, mask_outside: as in `attend`.
        d_heads: [R] pointers to the gradient of the concatenated heads [D], float32.
        out: [R] pointers [F], float32.
        outside: `Outside`; None where input rows are in the tile.
        bounds, plan: see `Bounds` and `TrainingPlan`.
    """
    dtype: tl.constexpr = projected.rows.dtype.element_ty
    scale: tl.constexpr = plan.K**-0.5
    for h in tl.range(bounds.heads, disable_licm=True):
        start = h * (2 * plan.K + plan.V)
        weights, weight_outside = head_weights(projected, start, same, bounds, plan)

        d_weights = tl.full((plan.blocks.rows, plan.blocks.rows), 0.0, tl.float32)
        d_outside = tl.full((plan.blocks.rows,), 0.0, tl.float32)
        flaw = tl.full((plan.blocks.rows,), 0.0, tl.float32)
        for c in range(0, bounds.V, plan.value_columns):
            columns = c + tl.arange(0, plan.value_columns)
            d = load_rows(d_heads + h * plan.V, columns, plan.V)
            v = head_part(projected, start + 2 * plan.K, columns, plan.V)
            flaw += tl.sum(d * 0.0, 1)
            d_weights = tl.dot(
                d.to(dtype), tl.trans(v.to(dtype)), d_weights, input_precision=plan.blocks.precision,
            )  # fmt: skip
            if outside is not None:
                other = load_rows(projected.outside + (start + 2 * plan.K), columns, plan.V).to(tl.float32)
                d_outside += tl.sum(d * other, 1)
        dropped, dropped_outside = weights, weight_outside
        if mask is not None:
            factors = tl.load(mask + h * (plan.N * plan.S), mask=same, other=0.0).to(tl.float32)
            dropped *= factors
            d_weights *= factors
            if outside is not None:
                factors_outside = tl.load(mask_outside + h * (plan.N * plan.S)).to(tl.float32)
                dropped_outside *= factors_outside
                d_outside *= factors_outside
        # What is not finite in an element makes its weights NaN, and none of another element in the tile.
        dropped = tl.where(same, dropped + flaw[:, None], 0.0).to(dtype)
        total = tl.sum(tl.where(same, weights * d_weights, 0.0), 1)
        if outside is not None:
            total += weight_outside * d_outside
            d_outside = weight_outside * (d_outside - total) * scale
        d_scores = tl.where(same, weights * (d_weights - total[:, None]) * scale, 0.0).to(dtype)

        for c in range(0, bounds.V, plan.value_columns):
            columns = c + tl.arange(0, plan.value_columns)
            d = load_rows(d_heads + h * plan.V, columns, plan.V)
            y = tl.dot(tl.trans(dropped), finite(d, dtype), input_precision=plan.blocks.precision)
            store_rows(out + (start + 2 * plan.K), columns, y, plan.V)
            if outside is not None:
                _store_outside(outside, start + 2 * plan.K, columns, dropped_outside[:, None] * d, plan.V, plan)
        for c in range(0, bounds.K, plan.key_columns):
            columns = c + tl.arange(0, plan.key_columns)
            q = head_part(projected, start, columns, plan.K)
            k = head_part(projected, start + plan.K, columns, plan.K)
            y = tl.dot(d_scores, finite(k, dtype), input_precision=plan.blocks.precision)
            if outside is not None:
                other = load_rows(projected.outside + (start + plan.K), columns, plan.K).to(tl.float32)
                y += d_outside[:, None] * other
                _store_outside(outside, start + plan.K, columns, d_outside[:, None] * q, plan.K, plan)
            store_rows(out + start, columns, y, plan.K)
            y = tl.dot(tl.trans(d_scores), finite(q, dtype), input_precision=plan.blocks.precision)
            store_rows(out + (start + plan.K), columns, y, plan.K)
