"""A program's tile of rows, and the loads, stores, norms and products that every phase is made of.

The `R` rows are those of `R / padded` batch elements: the attended rows of each, padded to a power of two. Rows past
the batch or past an element's last row repeat a row that exists, so that every load is in bounds; stores to tensors of
the caller are masked. Widths are constexpr (they are strides); loop bounds are run-time integers, since loops with
constexpr bounds are unrolled and spill.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

EPS = tl.constexpr(1e-5)


@triton.constexpr_function
def is_multiple(width, block):
    """Whether columns in blocks end with the last of them."""
    return width % block == 0


class Rows(NamedTuple):
    """Where the rows of the tile are; every field is [R].

    Attributes:
        scratch: int64, the row in every scratch buffer.
        element: int64, the batch element, clamped to the batch.
        slot: the row within its element, clamped to the last.
        memory: int64, the row in a [B * N, D] memory; that of the last slot for an input row.
        is_memory: whether it is a memory row (an input row otherwise).
        stored: whether it is a memory row of an element that exists.
    """

    scratch: tl.tensor
    element: tl.tensor
    slot: tl.tensor
    memory: tl.tensor
    is_memory: tl.tensor
    stored: tl.tensor


@triton.jit
def tile_rows(batch, plan: tl.constexpr):
    """The `Rows` of this program, and the mask [R, R] of which row (axis 1) is a key of which row (axis 0)."""
    row = tl.arange(0, plan.blocks.rows)
    within = row % plan.padded
    element = tl.program_id(0) * (plan.blocks.rows // plan.padded) + row // plan.padded
    slot = tl.minimum(within, plan.live - 1)
    clamped = tl.minimum(element, batch - 1).to(tl.int64)
    rows = Rows(
        scratch=tl.program_id(0).to(tl.int64) * plan.blocks.rows + row,
        element=clamped,
        slot=slot,
        memory=clamped * plan.N + tl.minimum(slot, plan.N - 1),
        is_memory=slot < plan.N,
        stored=(element < batch) & (within < plan.N),
    )
    same = (row // plan.padded)[:, None] == (row // plan.padded)[None, :]
    return rows, same & (within < plan.live)[None, :]


@triton.jit
def load_rows(pointers, columns, WIDTH: tl.constexpr):
    """[R, C]: columns [C] of the rows at pointers [R], 0 from column `WIDTH` on."""
    at = pointers[:, None] + columns[None, :]
    if is_multiple(WIDTH, columns.shape[0]):
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    return x


@triton.jit
def finite(x, dtype: tl.constexpr):
    """The numbers x in `dtype`, 0 in place of what is not finite there.

    In a product it would cross over to the tile's other elements, whose weights are 0.
    """
    x = x.to(dtype).to(tl.float32)
    return tl.where(tl.abs(x) < float("inf"), x, 0.0).to(dtype)


@triton.jit
def store_rows(pointers, columns, x, WIDTH: tl.constexpr):
    """Store x [R, C] in columns [C] of the rows at pointers [R]; nothing from column `WIDTH` on."""
    at = pointers[:, None] + columns[None, :]
    if is_multiple(WIDTH, columns.shape[0]):
        tl.store(at, x)
    else:
        tl.store(at, x, mask=(columns < WIDTH)[None, :])


@triton.jit
def load_vector(pointer, columns, WIDTH: tl.constexpr):
    """[1, C] float32: columns [C] of a vector of a parameter, 0 from column `WIDTH` on."""
    if is_multiple(WIDTH, columns.shape[0]):
        x = tl.load(pointer + columns)
    else:
        x = tl.load(pointer + columns, mask=columns < WIDTH, other=0.0)
    return x.to(tl.float32)[None, :]


@triton.jit
def normalise(x, columns, norm, WIDTH: tl.constexpr):
    """LayerNorm of x [R, C], columns [C] of a row, in float32.

    Args:
        x: [R, C].
        columns: [C], relative to the affine.
        norm: `(mean [R], rstd [R], gamma, beta, at)`; the affine's `WIDTH` columns stand `at` elements after gamma and
            beta, which are None where the variant has no such norm: then x as it is.
        WIDTH: columns from here on become 0.
    """
    mean, rstd, gamma, beta, at = norm
    x = x.to(tl.float32)
    if gamma is not None:
        x = (x - mean[:, None]) * rstd[:, None]
        x = x * load_vector(gamma + at, columns, WIDTH) + load_vector(beta + at, columns, WIDTH)
    return x


@triton.jit
def no_statistics(ROWS: tl.constexpr):
    """Mean [R] and sum of squared deviations [R] of no columns."""
    return tl.full((ROWS,), 0.0, tl.float32), tl.full((ROWS,), 0.0, tl.float32)


@triton.jit
def join_statistics(mean, squares, seen, x, start, WIDTH: tl.constexpr):
    """Statistics of `seen` columns of each row joined with those of x (Chan et al. 1979).

    One pass over the data without the cancellation of E[x^2] - E[x]^2.

    Args:
        mean, squares: [R], of the columns before.
        seen: how many those are.
        x: [R, C] float32, columns `start` and on of `WIDTH`; what is past them does not count.
    """
    if is_multiple(WIDTH, x.shape[1]):
        count = x.shape[1]
        centre = tl.sum(x, 1) / count
        deviation = x - centre[:, None]
    else:
        count = tl.minimum(x.shape[1], WIDTH - start)
        real = (start + tl.arange(0, x.shape[1]) < WIDTH)[None, :]
        centre = tl.sum(tl.where(real, x, 0.0), 1) / count
        deviation = tl.where(real, x - centre[:, None], 0.0)
    change = centre - mean
    share = count / (seen + count)
    return mean + change * share, squares + tl.sum(deviation * deviation, 1) + change * change * (seen * share)


@triton.jit
def reciprocal_deviation(squares, WIDTH: tl.constexpr):
    """1 / sqrt(variance + eps), [R], of rows of `WIDTH` columns."""
    return 1.0 / tl.sqrt(squares / WIDTH + EPS)


@triton.jit
def tanh(x):
    """The hyperbolic tangent, to an ulp or little more.

    As in csrc/simd/math.h a polynomial near 0. Beyond, `1 - 2 t / (1 + t)` with t = exp(-2 |x|) below 0.15, where a
    relative error of the hardware's exp counts for a fifth.
    """
    s = x * x
    near = 2.38038623e-3 - s * 3.83331499e-4
    near = -8.04392807e-3 + s * near
    near = 2.15459932e-2 + s * near
    near = -5.38979135e-2 + s * near
    near = 1.33325979e-1 + s * near
    near = -3.33333075e-1 + s * near
    t = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - (t + t) / (1.0 + t)
    return tl.where(tl.abs(x) < 0.975, x + x * (s * near), tl.where(x < 0.0, -far, far))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); 0 and 1 exactly at the infinities."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def load_weight(weight, outputs, inner, OUT: tl.constexpr, IN: tl.constexpr):
    """[K, N]: part of the transpose of a [OUT, IN] weight, 0 outside it."""
    at = weight + outputs[None, :] * IN + inner[:, None]
    if is_multiple(OUT, outputs.shape[0]) and is_multiple(IN, inner.shape[0]):
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(outputs < OUT)[None, :] & (inner < IN)[:, None], other=0.0)
    return x


@triton.jit
def resident(operand: tl.constexpr, captured, weight, IN: tl.constexpr, blocks: tl.constexpr):
    """The left side [R, IN] of all products of a phase where it fits one block, 0 (unused) where it does not."""
    if blocks.inner >= IN:
        a = operand(tl.arange(0, blocks.inner), captured, IN).to(weight.dtype.element_ty)
    else:
        a = 0
    return a


@triton.jit
def product(
    operand: tl.constexpr, captured, a, weight, start, inner_bound, OUT: tl.constexpr, IN: tl.constexpr,
    blocks: tl.constexpr,
):  # fmt: skip
    """[R, columns] float32: columns `start` and on of `operand @ weight.T`.

    Args:
        operand: `operand(columns, captured, IN)` gives columns of the left side; it is rounded to the weight's dtype.
        captured: tensors that it needs.
        a: from `resident`.
        weight: [OUT, IN].
        inner_bound: IN, as a run-time integer.
    """
    outputs = start + tl.arange(0, blocks.columns)
    inner = tl.arange(0, blocks.inner)
    accumulator = tl.full((blocks.rows, blocks.columns), 0.0, tl.float32)
    if blocks.inner >= IN:
        b = load_weight(weight, outputs, inner, OUT, IN)
        accumulator = tl.dot(a, b, accumulator, input_precision=blocks.precision)
    else:
        for k in tl.range(0, inner_bound, blocks.inner, num_stages=blocks.stages):
            left = operand(k + inner, captured, IN).to(weight.dtype.element_ty)
            b = load_weight(weight, outputs, k + inner, OUT, IN)
            accumulator = tl.dot(left, b, accumulator, input_precision=blocks.precision)
    return accumulator
