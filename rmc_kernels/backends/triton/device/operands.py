"""Left sides of products: `operand(columns [C], captured)` gives [R, C] of them, `captured` being what it needs."""

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
        is_memory: [R], see `Rows`; an input row's memory is 0. None where no input row is in the tile.
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
def memory_rows(columns, captured):
    """The incoming memory; captured: `(memory, D, dtype)`."""
    memory, D, dtype = captured
    return load_memory(memory, columns, D).to(dtype)


@triton.jit
def tanh_memory_rows(columns, captured):
    """Tanh of the incoming memory; captured: `(memory, D, dtype)`."""
    memory, D, dtype = captured
    return tanh(load_memory(memory, columns, D)).to(dtype)


@triton.jit
def buffer_rows(columns, captured):
    """Rows of a scratch buffer; captured: `(pointers [R], width, dtype)`."""
    pointers, WIDTH, dtype = captured
    return load_rows(pointers, columns, WIDTH).to(dtype)


@triton.jit
def normal_rows(columns, captured):
    """Rows of a scratch buffer, layer-normalised; captured: `(pointers [R], norm, width, dtype)`."""
    pointers, norm, WIDTH, dtype = captured
    return normalise(load_rows(pointers, columns, WIDTH), columns, norm, WIDTH).to(dtype)
