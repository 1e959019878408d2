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

from rmc_kernels.backends import BACKENDS, Call, Unrolled, is_plain, last_memory
from rmc_kernels.backends.plain import is_exporting_onnx
from rmc_kernels.spec import CellSpec

#: The fields of a `Call`.
_CALL = (
    "Tensor x, Tensor memory, Tensor[] params, Tensor? lengths, Tensor? resets, Tensor? reset_memory, "
    "Tensor? dropout_mask"
)
_library = torch.library.Library("rmc_kernels", "DEF")
_SCHEMAS = (
    f"unroll_forward({_CALL}, str spec, str backend, bool save) -> (Tensor, Tensor)",
    f"unroll_backward(Tensor grad, Tensor memories, Tensor activations, {_CALL}, str spec, str backend, "
    "bool[] needs) -> Tensor[]",
)
for _schema in _SCHEMAS:
    _library.define(_schema)


def _unroll_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Memories [B, T, N, D] and saved activations [bytes]; the operator's implementation on every device."""
    *fields, spec, backend, save = arguments
    return BACKENDS[backend].forward(CellSpec.from_json(spec), _call(fields), save)[:2]


def _unroll_backward(grad: Tensor, memories: Tensor, activations: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of x, memory, reset_memory and each parameter; empty where not needed."""
    *fields, spec, backend, needs = arguments
    grads = BACKENDS[backend].backward(CellSpec.from_json(spec), _call(fields), memories, activations, grad, needs)
    return [grad.new_empty(0) if found is None else found for found in grads]


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, spec_text, backend, save = arguments
    _refuse_onnx(backend)
    call, spec = _call(fields), CellSpec.from_json(spec_text)
    size = BACKENDS[backend].activation_size(spec, call.batch_size, call.steps, call.x.dtype) if save else 0
    memories = call.memory.new_empty((call.batch_size, call.steps, spec.mem_slots, spec.mem_size))
    return memories, call.x.new_empty((size,), dtype=torch.uint8)


def _fake_backward(grad: Tensor, memories: Tensor, activations: Tensor, *arguments: Any) -> list[Tensor]:
    *fields, _, _, needs = arguments
    call = _call(fields)
    return [
        tensor.new_empty(tensor.shape) if need and tensor is not None else call.x.new_empty((0,))
        for tensor, need in zip(call.trained(), needs, strict=True)
    ]


def _call(fields: Sequence[Any]) -> Call:
    """The call whose tensors an operator is given."""
    x, memory, params, *options = fields
    return Call(x, memory, tuple(params), *options)


def _fields(call: Call) -> tuple[Any, ...]:
    return (
        call.x, call.memory, list(call.params), call.lengths, call.resets, call.reset_memory, call.dropout_mask
    )  # fmt: skip


torch.library.impl(_library, "unroll_forward", "CompositeExplicitAutograd")(_unroll_forward)
torch.library.impl(_library, "unroll_backward", "CompositeExplicitAutograd")(_unroll_backward)
torch.library.register_fake("rmc_kernels::unroll_forward", _fake_forward, lib=_library)
torch.library.register_fake("rmc_kernels::unroll_backward", _fake_backward, lib=_library)


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.autograd.function.once_differentiable`, with an error that says what to do instead."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if torch.compiler.is_compiling():
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
    def forward(ctx: Any, spec: CellSpec, backend: str, save: bool, *tensors: Any) -> tuple[Tensor, Tensor]:
        """The memories [B, T, N, D] and the final one, as `Unrolled` has it.

        `tensors` are `Call.flat`, `save` keeps activations for the backward pass.
        """
        memories, activations, final = run_forward(spec, backend, Call.from_flat(*tensors), save)
        ctx.spec, ctx.backend = spec, backend
        ctx.save_for_backward(memories, activations, *tensors)
        if not torch.compiler.is_compiling():  # torch.compile does not know it, and removes zeros itself
            ctx.set_materialize_grads(False)
        return memories, final

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments."""
        memories, activations, *tensors = ctx.saved_tensors
        call = Call.from_flat(*tensors)
        grad = _with_final(memories, grad, grad_final)
        _spec, _backend, _save, _lengths, _resets, _mask, *needs = ctx.needs_input_grad
        if is_plain(call.x, call.memory, *call.params):
            grads = BACKENDS[ctx.backend].backward(ctx.spec, call, memories, activations, grad, needs)
        else:
            found = torch.ops.rmc_kernels.unroll_backward(
                grad, memories, activations, *_fields(call), ctx.spec.as_json, ctx.backend, needs
            )
            grads = [each if need else None for each, need in zip(found, needs, strict=True)]
        return (*[None] * 6, *grads)


def _with_final(memories: Tensor, grad: Tensor | None, grad_final: Tensor | None) -> Tensor:
    """The gradients of the memories, [B, T, N, D], and of the final one in one; None is 0."""
    steps = memories.shape[1]
    if grad_final is None or steps == 0:
        return torch.zeros_like(memories) if grad is None else grad
    last = grad_final.unsqueeze(1)
    if steps == 1:
        return last if grad is None else grad + last
    if grad is None:
        grad = torch.zeros_like(memories)
    return torch.cat([grad[:, :-1], grad[:, -1:] + last], 1)


def run_forward(spec: CellSpec, backend: str, call: Call, save: bool) -> Unrolled:
    """What the backend makes of `call`, outside autograd."""
    if is_plain(call.x, call.memory, *call.params):
        return BACKENDS[backend].forward(spec, call, save)
    if not torch.compiler.is_compiling():  # there the operator's fake is asked
        _refuse_onnx(backend)
    memories, activations = torch.ops.rmc_kernels.unroll_forward(*_fields(call), spec.as_json, backend, save)
    return Unrolled(memories, activations, last_memory(memories))


def _refuse_onnx(backend: str) -> None:
    """Raises ValueError while torch.onnx exports: its own message would be that it does not know an operator."""
    if is_exporting_onnx():
        raise ValueError(
            f'ONNX has no operator for the kernels of backend "{backend}": export a layer or cell made with '
            'backend="reference"'
        )
