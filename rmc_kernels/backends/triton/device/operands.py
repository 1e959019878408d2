"""Left sides of products: `operand(columns [C], captured, WIDTH)` gives [R, C] of rows of `WIDTH`, 0 past it.

`captured` is what the function needs, tensors only: a compile-time value in a tuple would become a run-time one.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from rmc_kernels.backends.triton.device.tile import load_rows, normalise, tanh


class Memory(NamedTuple):
    """The memory that comes into a step.

    Attributes:
        before: [R] pointers to the float32 rows after the step before.
        reset: [R], whether they are replaced by those at `reset_rows`; None without resets.
        reset_rows: [R] pointers; None without resets.
        is_memory: [R], whether a row has a memory: 0 takes the place of an input row's, and in the kernels that train
            of an element's past its length, which may be NaN. None where all rows have one.
    """

    before: tl.tensor
    reset: tl.tensor
    reset_rows: tl.tensor
    is_memory: tl.tensor


@triton.jit
def load_memory(memory, columns, D: tl.constexpr):
    """[R, C] float32: columns [C] of the memory that comes into the step."""
    x = load_rows(memory.before, columns, D)
    if memory.reset is not None:
        at = memory.reset_rows[:, None] + columns[None, :]
        replaced = memory.reset[:, None] & (columns < D)[None, :]
        x = tl.where(memory.reset[:, None], tl.load(at, mask=replaced, other=0.0), x)
    if memory.is_memory is not None:
        x = tl.where(memory.is_memory[:, None], x, 0.0)
    return x


@triton.jit
def memory_rows(columns, memory, WIDTH: tl.constexpr):
    """The incoming memory, float32; captured: a `Memory`."""
    return load_memory(memory, columns, WIDTH)


@triton.jit
def tanh_memory_rows(columns, memory, WIDTH: tl.constexpr):
    """Tanh of the incoming memory, float32; captured: a `Memory`."""
    return tanh(load_memory(memory, columns, WIDTH))


@triton.jit
def buffer_rows(columns, pointers, WIDTH: tl.constexpr):
    """Rows of a scratch buffer, in its dtype; captured: pointers [R]."""
    return load_rows(pointers, columns, WIDTH)


@triton.jit
def normal_rows(columns, captured, WIDTH: tl.constexpr):
    """Rows of a scratch buffer, layer-normalised, float32; captured: `(pointers [R], norm)`, see `normalise`."""
    pointers, norm = captured
    return normalise(load_rows(pointers, columns, WIDTH), columns, norm, WIDTH)
