"""Parameters as the C++ code reads them: plain memory, or packed once inside `frozen_weights`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from rmc_kernels.backends.plain import is_plain

_lock = Lock()


def addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Addresses of the first elements; 0 for None.

    Raises:
        RuntimeError: a tensor has elements but no memory.
    """
    found = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    if 0 in found:
        for tensor, address in zip(tensors, found, strict=True):
            if tensor is not None and not address and tensor.numel():
                raise RuntimeError(
                    f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} has no memory: its storage was freed, as "
                    "FSDP does outside of its own forward, or it never had one"
                )
    return found


def readable(params: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Parameters of a call as the C++ code reads them: plain memory, in the dtype that it computes in for the first."""
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    return tuple(as_read(param if param.dtype is dtype else param.to(dtype)) for param in params)


def as_read(tensor: Tensor) -> Tensor:
    """Contiguous, and with no sign left to be flipped: the C++ code reads plain memory."""
    return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()


class FrozenWeights:
    """Packed weights of parameters that must not change while this exists. Made by `frozen_weights`."""

    def __init__(self, params: Sequence[Tensor], watched: Sequence[Tensor]) -> None:
        self.params, self._watched = tuple(params), (*params, *watched)
        self._state = _state(self._watched)
        self._packed: dict[Any, Any] = {}

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that were frozen."""
        return len(params) == len(self.params) and all(map(is_, params, self.params))

    def check(self) -> None:
        """Raise RuntimeError where a parameter has moved, or torch has counted a write to it."""
        now = _state(self._watched)
        if now != self._state and any(a != b for a, b in zip(self._state, now, strict=True) if None not in (a, b)):
            raise RuntimeError("a parameter was changed inside frozen_weights(); leave the block before training on")

    def packed(self, native: Any, backward: bool) -> Any:
        """The weights as a planned cell reads them, packed at the first call; the same object for every thread."""
        found = self._packed.get((native, backward))
        if found is None:
            read = readable(self.params)
            packed = native.pack(list(addresses(read)), backward)  # lets other threads run, into here too
            found = self._packed.setdefault((native, backward), packed)
        return found


#: The open blocks of `frozen_weights`: a new tuple at each change, so that threads read it without a lock.
frozen_blocks: tuple[FrozenWeights, ...] = ()


@contextmanager
def frozen_weights(params: Sequence[Tensor], watched: Sequence[Tensor] = ()) -> Iterator[FrozenWeights]:
    """Packs `params` (in the order of `spec.parameter_names`) once for all calls inside the block.

    `FrozenWeights.check` looks for changes to them, and to those `watched` besides; what torch's version counters do
    not tell (a fused optimizer, a write through `.data`, another view of the same memory) goes unnoticed: leave the
    block before training on.

    Raises:
        RuntimeError: a parameter was changed inside another block around this one.
    """
    global frozen_blocks
    around = frozen_block(params)
    if around is not None:
        around.check()
    block = FrozenWeights(params, watched)
    with _lock:
        frozen_blocks = (*frozen_blocks, block)
    try:
        yield block
    finally:
        with _lock:
            frozen_blocks = tuple(b for b in frozen_blocks if b is not block)


def frozen_block(params: Sequence[Tensor]) -> FrozenWeights | None:
    """The open block of exactly these parameters."""
    return next((block for block in frozen_blocks if block.matches(params)), None)


def _state(tensors: Sequence[Tensor]) -> list[int | None]:
    """Version counter and address of each tensor; None where there are none to read, as under torch.compile."""
    readable = is_plain(*tensors)
    counts = [None if t.is_inference() else t._version for t in tensors]  # it counts none for inference tensors
    return [*counts, *(t.data_ptr() if readable else None for t in tensors)]
