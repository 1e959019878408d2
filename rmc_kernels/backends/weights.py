"""Parameters as the C++ code reads them: plain memory, or packed once inside `frozen_weights`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_lock = Lock()


def addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Where their first elements are; 0 for None.

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

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = tuple(params)
        self.versions, self._addresses = _versions(params), addresses(params)
        self._packed: dict[Any, Any] = {}

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that were frozen."""
        return len(params) == len(self.params) and all(map(is_, params, self.params))

    def check(self) -> None:
        """Raises RuntimeError where a parameter lies elsewhere by now, or torch counted a write to it."""
        if self.versions != _versions(self.params) or self._addresses != addresses(self.params):
            raise RuntimeError("a parameter was changed inside frozen_weights(); leave the block before training on")

    def packed(self, native: Any, backward: bool) -> Any:
        """The weights as a planned cell reads them, packed at the first call; the same object for every thread."""
        found = self._packed.get((native, backward))
        if found is None:
            read = readable(self.params)
            packed = native.pack(list(addresses(read)), backward)  # lets other threads run, into here too
            found = self._packed.setdefault((native, backward), packed)
        return found


#: The blocks of `frozen_weights` that are open; replaced, never changed.
frozen_blocks: tuple[FrozenWeights, ...] = ()
#: Another object after each replacement of those, and set after it: who remembers this need not keep the blocks alive,
#: and who read it before the blocks knows them, or will find it changed.
change = object()


@contextmanager
def frozen_weights(params: Sequence[Tensor]) -> Iterator[None]:
    """Packs `params` (in the order of `spec.parameter_names`) once for all calls inside the block.

    A change to one of them that torch's version counter sees raises at the next call, and so does `.data` that lies
    elsewhere; what neither tells (a fused optimizer, a write through `.data`, another view of the same memory) goes
    unnoticed: leave the block before training on.
    """
    global frozen_blocks, change
    block = FrozenWeights(params)
    with _lock:
        frozen_blocks = (*frozen_blocks, block)
        change = object()
    try:
        yield
    finally:
        with _lock:
            frozen_blocks = tuple(b for b in frozen_blocks if b is not block)
            change = object()


def frozen_block(params: Sequence[Tensor]) -> FrozenWeights | None:
    """The open block of exactly these parameters."""
    return next((block for block in frozen_blocks if block.matches(params)), None)


def _versions(params: Sequence[Tensor]) -> tuple[int | None, ...]:
    """What torch counted of writes; it counts none for inference tensors."""
    return tuple(None if p.is_inference() else p._version for p in params)
