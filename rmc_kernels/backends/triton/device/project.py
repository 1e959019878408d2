"""`rows @ weight.T + bias` for the input side of all steps.

A kernel of our own and not `torch.nn.functional.linear`, whose bits for a row depend on how many rows there are: a
sequence in chunks has to equal the same sequence at once bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.tile import load_rows, load_vector, product, resident


@triton.jit
def _row(columns, captured, WIDTH: tl.constexpr):
    """Left side: columns of the rows at captured pointers [R]."""
    return load_rows(captured, columns, WIDTH)


@triton.jit(do_not_specialize=["count", "inner_bound"])
def project(
    x,
    weight,
    bias,
    out,
    count,
    inner_bound,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    blocks: tl.constexpr,
):
    """`out = x @ weight.T + bias`; program (i, j) makes block i of the rows and block j of the columns.

    Args:
        x: [count, IN].
        weight: [OUT, IN].
        bias: [OUT].
        out: [count, OUT] in x's dtype; sums are float32.
        count: rows.
        inner_bound: IN, as a run-time integer.
        IN, OUT: widths.
        blocks: see `Blocks`.
    """
    row = tl.program_id(0).to(tl.int64) * blocks.rows + tl.arange(0, blocks.rows)
    start = tl.program_id(1) * blocks.columns
    columns = start + tl.arange(0, blocks.columns)
    pointers = x + tl.minimum(row, count - 1) * IN
    a = resident(_row, pointers, weight, IN, blocks)
    y = product(_row, pointers, a, weight, start, inner_bound, OUT, IN, blocks)
    y += load_vector(bias, columns, OUT)
    inside = (row < count)[:, None] & (columns < OUT)[None, :]
    tl.store(out + row[:, None] * OUT + columns[None, :], y.to(out.dtype.element_ty), mask=inside)
