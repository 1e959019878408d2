"""Long sequences in chunks of time: truncated backpropagation, and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rmc_kernels import errors
from rmc_kernels.functional import Lengths, checked_lengths
from rmc_kernels.layers import RelationalMemory


class Chunk(NamedTuple):
    """One chunk of a sequence.

    Attributes:
        span: its steps, to cut targets with.
        output: the layer's output of these steps, with gradient.
        memory: [B, N, D] after them, with gradient.
    """

    span: slice
    output: Tensor
    memory: Tensor


def truncated(
    layer: RelationalMemory,
    x: Tensor,
    memory: Tensor | None = None,
    *,
    chunk_steps: int,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
) -> Iterator[Chunk]:
    """Truncated backpropagation through time: the sequence chunk by chunk, the memory detached in between.

    Call `backward` on the loss of each chunk before asking for the next, so that only one chunk's graph is alive:

        for chunk in truncated(layer, x, chunk_steps=35):
            loss_of(chunk.output, targets[:, chunk.span]).backward()

    Outputs are those of one call, bit for bit on one backend. An optimizer may step between chunks.

    Args:
        layer: the layer; of "normal" initial memories each chunk's resets draw their own.
        x: batched, as the layer takes it.
        memory: [B, N, D] before the first step, with gradient in the first chunk; None for the initial memory.
        chunk_steps: steps of a chunk; the last may be shorter.
        lengths: [B], as the layer takes them, or None.
        resets: bool, laid out as the leading axes of x, or None.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it got.
    """
    for span, part in _parts(layer, x, chunk_steps, lengths, resets):
        output, memory = layer(part.x, memory, lengths=part.lengths, resets=part.resets)
        yield Chunk(span, output, memory)
        memory = memory.detach()


def checkpointed(
    layer: RelationalMemory,
    x: Tensor,
    memory: Tensor | None = None,
    *,
    chunk_steps: int,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer(x, memory)` with its full gradient, keeping for the backward pass only the memories between chunks.

    Each chunk is run a second time in the backward pass (`torch.utils.checkpoint`). With attention dropout the factors
    are other draws than those of one call.

    Args:
        layer: the layer.
        x: batched, as the layer takes it.
        memory: [B, N, D] before the first step, or None for the initial memory.
        chunk_steps: steps of a chunk; about the square root of T keeps the least.
        lengths: [B], as the layer takes them, or None.
        resets: bool, laid out as the leading axes of x, or None.

    Returns:
        The layer's output and final memory.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it got.
    """
    outputs = []
    for _, part in _parts(layer, x, chunk_steps, lengths, resets):
        output, memory = checkpoint(
            layer, part.x, memory, lengths=part.lengths, resets=part.resets, use_reentrant=False
        )
        outputs.append(output)
    if memory is None or not outputs:
        return layer(x, memory, lengths=lengths, resets=resets)  # type: ignore[no-any-return]
    return torch.cat(outputs, dim=1 if layer.batch_first else 0), memory


class _Part(NamedTuple):
    x: Tensor
    lengths: Tensor | None
    resets: Tensor | None


def _parts(
    layer: RelationalMemory, x: Tensor, chunk_steps: int, lengths: Lengths | None, resets: Tensor | None
) -> Iterator[tuple[slice, _Part]]:
    """The sequence's arguments cut along time."""
    if not isinstance(layer, RelationalMemory):
        raise TypeError(f"layer must be a RelationalMemory, got {errors.describe(layer)}")
    errors.positive_int("chunk_steps", chunk_steps)
    axes = "B, T" if layer.batch_first else "T, B"
    layout = f"[{axes}, {', '.join(map(str, layer.spec.input_shape))}]"
    if errors.is_tensor("x", x, f"a tensor {layout}").dim() != 2 + len(layer.spec.input_shape):
        raise ValueError(f"x must be batched, {layout}, got {list(x.shape)}")
    if resets is not None and errors.is_tensor("resets", resets, f"a bool tensor [{axes}]").shape != x.shape[:2]:
        raise ValueError(f"resets must be [{axes}] = {list(x.shape[:2])}, got {list(resets.shape)}")
    time = 1 if layer.batch_first else 0
    lengths = checked_lengths(lengths, x.shape[1 - time], x.shape[time], x)
    for start in range(0, x.shape[time], chunk_steps):
        span = slice(start, min(start + chunk_steps, x.shape[time]))
        yield (
            span,
            _Part(
                x.narrow(time, start, span.stop - start),
                None if lengths is None else (lengths - start).clamp(0, span.stop - start),
                None if resets is None else resets.narrow(time, start, span.stop - start),
            ),
        )
