"""Fused backends under autograd: two registered operators, and the `autograd.Function` that ties them together.

Eager calls on plain tensors go straight to the backend (an operator call costs several times a binding call); under
`torch.compile`, `torch.export`, fake tensors or any dispatch mode the same work goes through the operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rmc_kernels.backends import BACKENDS, Call, is_plain
from rmc_kernels.backends.plain import is_exporting_onnx
from rmc_kernels.spec import CellSpec

_TENSORS = (
    "Tensor x, Tensor memory, Tensor[] params, Tensor? lengths, Tensor? resets, Tensor? reset_memory, "
    "Tensor? dropout_mask"
)
_library = torch.library.Library("rmc_kernels", "DEF")
_SCHEMAS = (
    f"unroll_forward({_TENSORS}, str spec, str backend, bool save) -> (Tensor, Tensor)",
    f"unroll_backward(Tensor grad, Tensor memories, Tensor activations, {_TENSORS}, str spec, str backend, "
    "bool[] needs) -> Tensor[]",
)
for _schema in _SCHEMAS:
    _library.define(_schema)


def _unroll_forward(
    x: Tensor,
    memory: Tensor,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_memory: Tensor | None,
    dropout_mask: Tensor | None,
    spec: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Memories [B, T, N, D] and saved activations [bytes]; the operator's implementation on every device."""
    call = Call(x, memory, tuple(params), lengths, resets, reset_memory, dropout_mask)
    return BACKENDS[backend].forward(CellSpec.from_json(spec), call, save)


def _unroll_backward(
    grad: Tensor,
    memories: Tensor,
    activations: Tensor,
    x: Tensor,
    memory: Tensor,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_memory: Tensor | None,
    dropout_mask: Tensor | None,
    spec: str,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, memory, reset_memory and each parameter; empty where not needed."""
    call = Call(x, memory, tuple(params), lengths, resets, reset_memory, dropout_mask)
    return BACKENDS[backend].backward(CellSpec.from_json(spec), call, memories, activations, grad, needs)


def _fake_forward(x: Tensor, memory: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    *_, spec_text, backend, save = options
    _refuse_onnx(backend)
    spec = CellSpec.from_json(spec_text)
    batch, steps = x.shape[:2]
    size = BACKENDS[backend].activation_size(spec, batch, steps, x.dtype) if save else 0
    memories = memory.new_empty((batch, steps, spec.mem_slots, spec.mem_size))
    return memories, x.new_empty((size,), dtype=torch.uint8)


def _fake_backward(
    grad: Tensor, memories: Tensor, activations: Tensor, x: Tensor, memory: Tensor, params: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    _, _, reset_memory, _, _, _, needs = rest
    inputs = [x, memory, reset_memory, *params]
    return [
        tensor.new_empty(tensor.shape) if need and tensor is not None else x.new_empty((0,))
        for tensor, need in zip(inputs, needs, strict=True)
    ]


torch.library.impl(_library, "unroll_forward", "CompositeExplicitAutograd")(_unroll_forward)
torch.library.impl(_library, "unroll_backward", "CompositeExplicitAutograd")(_unroll_backward)
torch.library.register_fake("rmc_kernels::unroll_forward", _fake_forward, lib=_library)
torch.library.register_fake("rmc_kernels::unroll_backward", _fake_backward, lib=_library)


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.autograd.function.once_differentiable`, with an error that says what to do instead."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return outputs
        message = (
            f'the "{ctx.backend}" backend is differentiable once; for double backward (create_graph=True) '
            'use backend="reference"'
        )
        present = [out for out in outputs if isinstance(out, Tensor)]
        fail = torch._C._functions.DelayedError(message.encode(), len(present))
        failing = iter(fail(*[out.detach().requires_grad_() for out in present]))
        return tuple(next(failing) if isinstance(out, Tensor) else out for out in outputs)

    return once


class RelationalMemoryFunction(torch.autograd.Function):
    """The unroll of a fused backend, differentiable once with respect to x, the memories and the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: CellSpec,
        backend: str,
        save: bool,
        lengths: Tensor | None,
        resets: Tensor | None,
        dropout_mask: Tensor | None,
        x: Tensor,
        memory: Tensor,
        reset_memory: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        """The memories [B, T, N, D]; arguments as in `Call`, `save` keeps activations for the backward pass."""
        call = Call(x, memory, params, lengths, resets, reset_memory, dropout_mask)
        memories, activations = run_forward(spec, backend, call, save)
        ctx.spec, ctx.backend = spec, backend
        ctx.save_for_backward(memories, activations, lengths, resets, dropout_mask, x, memory, reset_memory, *params)
        return memories

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments."""
        memories, activations, lengths, resets, dropout_mask, x, memory, reset_memory, *params = ctx.saved_tensors
        call = Call(x, memory, tuple(params), lengths, resets, reset_memory, dropout_mask)
        needs = list(ctx.needs_input_grad[6:])
        if is_plain(call.x, call.memory, *call.params):
            grads = BACKENDS[ctx.backend].backward(ctx.spec, call, memories, activations, grad, needs)
        else:
            grads = torch.ops.rmc_kernels.unroll_backward(
                grad, memories, activations, *_tensors(call), ctx.spec.as_json, ctx.backend, needs
            )
        found = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (None, None, None, None, None, None, *found)


def run_forward(spec: CellSpec, backend: str, call: Call, save: bool) -> tuple[Tensor, Tensor]:
    """Memories and activations of `call`, outside autograd."""
    if is_plain(call.x, call.memory, *call.params):
        return BACKENDS[backend].forward(spec, call, save)
    if not torch.compiler.is_compiling():  # there the operator's fake is asked
        _refuse_onnx(backend)
    memories, activations = torch.ops.rmc_kernels.unroll_forward(*_tensors(call), spec.as_json, backend, save)
    return memories, activations


def _refuse_onnx(backend: str) -> None:
    """Raises ValueError while torch.onnx exports: its own message would be that it does not know an operator."""
    if is_exporting_onnx():
        raise ValueError(
            f'ONNX has no operator for the kernels of backend "{backend}": export a layer or cell made with '
            'backend="reference"'
        )


def _tensors(call: Call) -> tuple[Any, ...]:
    """The tensors of `call` in the operators' order."""
    return (
        call.x, call.memory, list(call.params), call.lengths, call.resets, call.reset_memory, call.dropout_mask
    )  # fmt: skip
