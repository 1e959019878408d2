"""The reference as a backend: the definition behind the same interface as the kernels, and their yardstick in tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from rmc_kernels import reference
from rmc_kernels.backends.protocol import Call, Unrolled, last_memory
from rmc_kernels.spec import CellSpec


class ReferenceBackend:
    """Runs `reference.unroll`. The backward pass runs it again under autograd, so nothing but the inputs is kept."""

    name = "reference"

    def note(self, spec: CellSpec, dtype: torch.dtype, device: torch.device) -> str:
        """Nothing."""
        return ""

    def unavailable(self) -> str | None:
        """Plain PyTorch: always there."""
        return None

    def refuses(self, spec: CellSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Serves every spec, floating dtype and device."""
        return None

    def passed_over(self, device: torch.device) -> str | None:
        """Never."""
        return None

    def fault(
        self, spec: CellSpec, dtype: torch.dtype, device: torch.device, gradients: str, *, check: bool
    ) -> str | None:
        """None: the tests of a release are enough."""
        return None

    def activation_size(self, spec: CellSpec, batch_size: int, steps: int, dtype: torch.dtype) -> int:
        """Keeps nothing."""
        return 0

    def forward(self, spec: CellSpec, call: Call, save: bool) -> Unrolled:
        """See `Backend.forward`."""
        with torch.no_grad():
            memories = unroll(spec, call)[0]
            return Unrolled(memories, call.x.new_empty(0, dtype=torch.uint8), last_memory(memories))

    def backward(
        self, spec: CellSpec, call: Call, memories: Tensor, activations: Tensor, grad: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """See `Backend.backward`."""
        inputs = [call.x, call.memory, call.reset_memory, *call.params]
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(inputs, needs, strict=True)
        ]
        x, memory, reset_memory, *params = leaves
        assert x is not None
        assert memory is not None
        given = tuple(param for param in params if param is not None)
        with _recording():
            out = unroll(spec, replace(call, x=x, memory=memory, params=given, reset_memory=reset_memory))[0]
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None]
        if out.requires_grad:
            found = torch.autograd.grad(out, wanted, grad.to(out.dtype), allow_unused=True, materialize_grads=True)
        else:  # no step was taken
            found = tuple(torch.zeros_like(leaf) for leaf in wanted)
        grads = iter(found)
        return [
            next(grads).contiguous() if need and leaf is not None else None
            for leaf, need in zip(leaves, needs, strict=True)
        ]


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd on, also inside a compiled graph, which runs its operators with autograd's dispatch keys excluded."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def unroll(spec: CellSpec, call: Call) -> tuple[Tensor, Tensor]:
    """Memories and attention weights of `call` by the reference, differentiable."""
    return reference.unroll(
        call.x,
        call.memory,
        dict(zip(spec.parameter_names, call.params, strict=True)),
        spec,
        lengths=call.lengths,
        resets=call.resets,
        reset_memory=call.reset_memory,
        dropout_mask=call.dropout_mask,
    )
