"""Whether tensors are what they seem: real memory, and nothing around that traces, fakes or transforms."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN_TYPES = {Tensor, torch.nn.Parameter}
#: (function, what it answers where nothing traces, fakes or transforms).
#: `is_compiling()` is False under make_fx, and a FakeTensor's data_ptr() is 0, so the dispatch stack is looked at too.
UNWATCHED: tuple[tuple[Callable[[], object], object], ...] = (
    (torch._C._len_torch_dispatch_stack, 0),
    (torch._C._functorch.peek_interpreter_stack, None),
    (torch._C._is_tracing, False),
)


def is_plain(*tensors: Tensor) -> bool:
    """Whether raw pointers and values may be read: real tensors, and nothing that traces, fakes or transforms."""
    return not is_watched() and PLAIN_TYPES.issuperset(map(type, tensors))


def is_watched() -> bool:
    """Whether something that traces, fakes or transforms is active."""
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
