"""`rows @ weight.T + bias` for the input side of all steps.

A kernel of our own and not `torch.nn.functional.linear`, whose bits for a row depend on how many rows there are: a
sequence in chunks has to equal the same sequence at once bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.tile import Blocks, load_rows, load_vector, product, resident


@triton.jit
def _row(columns, captured):
    """Operand: columns [K] of the rows at captured pointers [R]."""
    pointers, WIDTH = captured
    return load_rows(pointers, columns, WIDTH)


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
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out = x @ weight.T + bias`; program (i, j) makes rows `i * ROWS` and columns `j * BLOCK_N` and on.

    Args:
        x: [count, IN].
        weight: [OUT, IN].
        bias: [OUT].
        out: [count, OUT] in x's dtype; sums are float32.
        count: rows.
        inner_bound: IN, as a run-time integer.
        IN, OUT: widths.
        ROWS, BLOCK_N, BLOCK_K: of one product; at least 16.
        STAGES: of the pipeline.
        PRECISION: of float32 products, "ieee" or "tf32".
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * BLOCK_N
    columns = start + tl.arange(0, BLOCK_N)
    blocks = Blocks(BLOCK_N, BLOCK_K, STAGES, PRECISION)
    captured = (x + tl.minimum(row, count - 1) * IN, IN)
    a = resident(_row, captured, IN, blocks)
    y = product(_row, captured, a, weight, start, inner_bound, OUT, IN, ROWS, blocks)
    y += load_vector(bias, columns, OUT)
    inside = (row < count)[:, None] & (columns < OUT)[None, :]
    tl.store(out + row[:, None] * OUT + columns[None, :], y.to(out.dtype.element_ty), mask=inside)
