"""Detects plain tensors, whose memory may be read: no subclass, and no tracer, fake mode or transform is active."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN_TYPES = {Tensor, torch.nn.Parameter}
#: Functions of torch, each with its result while no tracer, fake mode or transform is active.
#: `is_compiling()` is False under make_fx, and a FakeTensor's data_ptr() is 0, so the dispatch stack is looked at too.
UNWATCHED: tuple[tuple[Callable[[], object], object], ...] = (
    (torch._C._len_torch_dispatch_stack, 0),
    (torch._C._functorch.peek_interpreter_stack, None),
    (torch._C._is_tracing, False),
)


def is_plain(*tensors: Tensor) -> bool:
    """Whether all are plain tensors, whose pointers and values may be read."""
    return not is_watched() and PLAIN_TYPES.issuperset(map(type, tensors))


def is_watched() -> bool:
    """Whether a tracer, a fake mode or a transform is active."""
    if torch.compiler.is_compiling():
        return True
    for function, answer in UNWATCHED:  # noqa: SIM110 (a generator takes 0.5 us more, at every call)
        if function() is not answer:
            return True
    return False


def is_exporting_onnx() -> bool:
    """Whether torch.onnx.export is running; asked without loading torch.onnx, which takes 0.1 s."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def active_transform() -> str | None:
    """Why no fused backend can run inside the transform that is active here, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active, which only the reference can be differentiated or batched by"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, which only the reference supports"
    return None
