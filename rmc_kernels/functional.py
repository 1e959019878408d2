"""`relational_memory`: a sequence of the cell as a function of its tensors. Every layer ends up here."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from rmc_kernels import backends, errors
from rmc_kernels.autograd import RelationalMemoryFunction, run_forward
from rmc_kernels.backends import HALF_TYPES, Call
from rmc_kernels.backends.reference import unroll as reference_unroll
from rmc_kernels.spec import CellSpec

DTYPES = (torch.float32, torch.float64, *HALF_TYPES)
#: Of lengths.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
RECOMPUTE = ("full", "none")
Lengths: TypeAlias = Tensor | Sequence[int]


def relational_memory(
    x: Tensor,
    memory: Tensor,
    params: Mapping[str, Tensor],
    spec: CellSpec,
    *,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
    reset_memory: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    backend: str = "auto",
    recompute: str = "full",
) -> tuple[Tensor, Tensor]:
    """Run the cell over a sequence: `memory_t = step(x_t, memory_{t-1})`.

    Args:
        x: [B, T, I], or [B, T, n, I] with `spec.input_rows = n`. float32, float64, bfloat16 or float16.
        memory: [B, N, D], the memory before the first step, in x's dtype; for half types float32 (a half memory is
            widened).
        params: name -> tensor for every name in `spec.parameter_shapes`, of that shape (Linear weights are
            [out, in]) and of x's dtype; l0sg's 0-d biases may be of another.
        spec: the cell.
        lengths: [B] integers, 0 <= length <= T, as `pack_padded_sequence` takes them: a tensor (on any device), a list
            or an array; or None for T everywhere. From step `lengths[b]` on, element b's memory is frozen. Values are
            checked, but for tensors on other devices than the CPU, and under torch.compile, where they are clamped.
        resets: [B, T] bool, or None. Before such a step the element's memory is replaced by its `reset_memory`.
            Resets past the length are ignored.
        reset_memory: [B, N, D], or [N, D] for every element alike; needed with `resets`, refused without.
        dropout_mask: [B, T, H, N, S] factors by which the attention weights are multiplied, of x's dtype, or None.
            For one-block cells other than l0sg. It gets a gradient by the reference only.
        backend: "auto", "triton", "cpu" or "reference"; `explain` tells what "auto" chooses.
        recompute: what a fused backend keeps for its backward pass: "full" keeps only the memories and computes each
            step again, "none" keeps the activations too. The reference ignores it.

    Under `torch.autocast`, x and the parameters are cast to the autocast dtype first.

    Returns:
        memories: [B, T, N, D] after each step; past the length they repeat the frozen memory.
        final: [B, N, D], the memory after the last step, or `memory` where T = 0.
        Both have x's dtype, or float32 for half types, so that a sequence run in chunks equals the same sequence run
        at once.

    Raises:
        TypeError, ValueError: before anything is computed, naming the argument, what it must be and what it got.
    """
    if not isinstance(spec, CellSpec):
        raise TypeError(f"spec must be a CellSpec, got {errors.describe(spec)}")
    errors.one_of("recompute", recompute, RECOMPUTE)
    values = _parameter_list(params, spec)
    _check_input(x, spec)
    call, context = prepare(spec, x, memory, values, lengths, resets, reset_memory, dropout_mask)
    with context:
        return run(spec, call, backend, recompute)


def run(spec: CellSpec, call: Call, backend: str, recompute: str) -> tuple[Tensor, Tensor]:
    """The memories [B, T, N, D] of a checked call and the final one, by the backend that serves it, under autograd."""
    trains = torch.is_grad_enabled() and _requires_grad(call)
    chosen = backends.choose(backend, spec, call.x.dtype, call.x.device, recompute if trains else "")
    if chosen is backends.REFERENCE:
        memories = reference_unroll(spec, call)[0]
        final = backends.last_memory(memories)
    elif trains:
        _refuse_gradient_of_mask(call, chosen.name)
        if call.reset_memory is call.memory:  # torch.compile takes no autograd.Function with the same tensor twice
            call = replace(call, reset_memory=call.memory.view_as(call.memory))
        memories, final = RelationalMemoryFunction.apply(  # type: ignore[no-untyped-call]
            spec, chosen.name, recompute == "none", *call.flat()
        )
    else:
        memories, _, final = run_forward(spec, chosen.name, call, save=False)
    return memories, final if call.steps else call.memory


def _requires_grad(call: Call) -> bool:
    """Whether a tensor of the call requires a gradient."""
    for tensor in (*call.trained(), call.dropout_mask):  # noqa: SIM110 (a generator takes longer, at every call)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _refuse_gradient_of_mask(call: Call, backend: str) -> None:
    """Raise ValueError where a dropout mask requires a gradient, which fused backends do not compute."""
    if call.dropout_mask is not None and call.dropout_mask.requires_grad:
        raise ValueError(
            f'dropout_mask must not require a gradient, which the "{backend}" backend does not compute; '
            'use backend="reference"'
        )


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which memories are carried beside an x of `dtype`: that, but float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is computed with: the autocast dtype under autocast, its own otherwise."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def attention_dropout(x: Tensor, spec: CellSpec, probability: float) -> Tensor:
    """A freshly drawn `dropout_mask` [B, T, H, N, S] for x [B, T, ...], in the dtype it computes in."""
    shape = (*x.shape[:2], spec.num_heads, spec.mem_slots, spec.total_rows)
    return nn.functional.dropout(x.new_ones(shape, dtype=compute_dtype(x)), probability)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def prepare(
    spec: CellSpec,
    x: Tensor,
    memory: Tensor,
    params: tuple[Tensor, ...],
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
    reset_memory: Tensor | None = None,
    dropout_mask: Tensor | None = None,
) -> tuple[Call, AbstractContextManager[object]]:
    """The call of these tensors, checked, cast as autocast has it, and the context in which it is to run.

    x has its shape; `params` are in the order of the spec.
    """
    context: AbstractContextManager[object] = nullcontext()
    if autocasts(x):
        dtype = compute_dtype(x)
        x = x.to(dtype)
        params = tuple(value.to(dtype) for value in params)
        context = torch.autocast(x.device.type, enabled=False)
    if spec.trains_gate_biases:  # 0-d, last: FSDP2 leaves them in float32 where it casts the others
        params = (*params[:-2], *(value.to(x.dtype) for value in params[-2:]))
    _check_parameters(spec, params, x)
    batch, steps = x.shape[:2]
    shape = (batch, spec.mem_slots, spec.mem_size)
    memory = _memory("memory", memory, shape, x)
    if resets is not None:
        _check_tensor("resets", resets, "[B, T]", (batch, steps), torch.bool, x.device)
        if reset_memory is None:
            raise ValueError("reset_memory must be the memory that resets load, [B, N, D] or [N, D]; got None")
        if isinstance(reset_memory, Tensor) and reset_memory.dim() == 2:
            reset_memory = _memory("reset_memory", reset_memory, shape[1:], x).expand(shape)
        else:
            reset_memory = _memory("reset_memory", reset_memory, shape, x)
    elif reset_memory is not None:
        raise ValueError("reset_memory requires resets")
    if dropout_mask is not None:
        if spec.input_rows_live:  # the mask has no rows for the input's own attention
            raise ValueError(
                f"dropout_mask must be None for l0sg and for several blocks; this cell is {spec.variant}, "
                f"num_blocks={spec.num_blocks}"
            )
        mask_shape = (batch, steps, spec.num_heads, spec.mem_slots, spec.total_rows)
        _check_tensor("dropout_mask", dropout_mask, "[B, T, H, N, S]", mask_shape, x.dtype, x.device)
    lengths = checked_lengths(lengths, batch, steps, x)
    return Call(x, memory, params, lengths, resets, reset_memory, dropout_mask), context


def _parameter_list(params: Mapping[str, Tensor], spec: CellSpec) -> tuple[Tensor, ...]:
    """The parameters in the order of the spec, their names and shapes checked."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a mapping from parameter names to tensors, got {errors.describe(params)}")
    shapes = spec.parameter_shapes
    if params.keys() != shapes.keys():
        missing = sorted(shapes.keys() - params.keys())
        unknown = sorted(key if isinstance(key, str) else errors.describe(key) for key in params.keys() - shapes.keys())
        raise ValueError(f"params must have the names in spec.parameter_shapes; missing: {missing}, unknown: {unknown}")
    for name, shape in shapes.items():
        if not isinstance(params[name], Tensor):
            raise TypeError(f"params[{name!r}] must be a tensor {list(shape)}, got {errors.describe(params[name])}")
    return tuple(params[name] for name in shapes)


def _check_parameters(spec: CellSpec, params: tuple[Tensor, ...], x: Tensor) -> None:
    """Raises where a parameter has another shape than the spec's, or another dtype or device than x."""
    dtype, device = x.dtype, x.device
    if dtype is torch.float32 and device.type == "cpu" and backends.are_plain_float32(params, spec.parameter_shapes):
        return
    for value, (name, shape) in zip(params, spec.parameter_shapes.items(), strict=True):
        if value.shape != shape:
            raise ValueError(f"params[{name!r}] must be {list(shape)}, got {list(value.shape)}")
        if value.dtype is not dtype or value.device != device:
            raise _misplaced(x, name, value, params)


def _misplaced(x: Tensor, name: str, value: Tensor, values: tuple[Tensor, ...]) -> TypeError:
    """The parameter `name` differs from x in dtype or device; where all others do too, x is to blame."""
    (dtype, device), *others = {(each.dtype, each.device) for each in values if each.dim()}
    if not others and (dtype, device) != (x.dtype, x.device):
        return TypeError(
            f"x must be {dtype} on {device}, as the parameters are, got {x.dtype} on {x.device}; convert x or "
            "the parameters with .to()"
        )
    return TypeError(f"params[{name!r}] must be {x.dtype} on {x.device}, as x is, got {value.dtype} on {value.device}")


def is_input(x: object) -> TypeGuard[Tensor]:
    """Whether x is a tensor of one of the dtypes that are computed in."""
    return errors.is_dense(x) and x.dtype in DTYPES


def not_input(x: object, layout: str) -> TypeError:
    """The error for an x that `is_input` is not true of; `layout` says what its shape must be."""
    if not errors.is_dense(x):
        return errors.not_dense("x", x, f"a tensor {layout}")
    cure = "call .dequantize()" if x.is_quantized else "convert it with .to(), or embed ids with nn.Embedding"
    return TypeError(f"x must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}; {cure}")


def _check_input(x: Tensor, spec: CellSpec) -> None:
    if not is_input(x):
        raise not_input(x, _input_layout(spec))
    if x.dim() != 2 + len(spec.input_shape) or x.shape[2:] != spec.input_shape:
        raise ValueError(f"x must be {_input_layout(spec)}, got {list(x.shape)}")


def _input_layout(spec: CellSpec) -> str:
    return f"[B, T, {', '.join(map(str, spec.input_shape))}]"


def _check_tensor(
    name: str, value: object, layout: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if not errors.is_dense(value):
        raise errors.not_dense(name, value, f"a {dtype} tensor {layout} = {list(shape)}")
    if value.dtype != dtype:
        cure = (
            "; lengths and resets are passed by name" if name == "memory" and not value.dtype.is_floating_point else ""
        )
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}{cure}")
    if value.shape != shape:
        raise ValueError(f"{name} must be {layout} = {list(shape)}, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the device of x ({device}), got {value.device}")


def _memory(name: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """A memory argument, checked; a half memory beside a half x is widened to the float32 it is carried in."""
    layout = "[B, N, D]" if len(shape) == 3 else "[N, D]"
    if isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
        raise TypeError(
            f"{name} must be one tensor {layout} = {list(shape)}, got {errors.describe(value)}; "
            "there is no cell state: pass the memory that the last call returned"
        )
    dtype = memory_dtype(x.dtype)
    if dtype != x.dtype and isinstance(value, Tensor) and value.dtype in HALF_TYPES:
        value = value.to(dtype)
    _check_tensor(name, value, layout, shape, dtype, x.device)
    return value


def lengths_tensor(lengths: Lengths, steps: int) -> Tensor:
    """`lengths` if it is a tensor; a list, tuple or array of integers as one on the CPU, its values checked."""
    if isinstance(lengths, Tensor):
        return lengths
    if isinstance(lengths, np.ndarray) and torch.compiler.is_compiling():  # which knows no value of it
        return torch.as_tensor(lengths)
    values = lengths.tolist() if isinstance(lengths, np.ndarray) else lengths
    try:
        if not isinstance(values, Sequence) or any(isinstance(value, bool) for value in values):
            raise TypeError
        numbers = [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(
            f"lengths must be integers [B], a tensor, a list or an array; got {errors.describe(lengths)}"
        ) from None
    _check_range(min(numbers, default=0), max(numbers, default=0), steps)
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def checked_lengths(lengths: Lengths | None, batch: int, steps: int, x: Tensor) -> Tensor | None:
    """`lengths` as int64 on x's device; values are looked at only where that costs no synchronisation or trace."""
    if lengths is None:
        return None
    lengths = lengths_tensor(lengths, steps)
    if not errors.is_dense(lengths):
        raise errors.not_dense("lengths", lengths, f"integers [B] = [{batch}]")
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"lengths must be integers, such as torch.int64, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must be [B] = [{batch}], got {list(lengths.shape)}")
    if lengths.device != x.device and lengths.device.type != "cpu":
        raise ValueError(f"lengths must be on the CPU or the device of x ({x.device}), got {lengths.device}")
    if lengths.device.type == "cpu" and backends.is_plain(lengths) and batch:
        low, high = lengths.aminmax()
        _check_range(int(low), int(high), steps)
    return lengths.to(x.device, torch.int64, non_blocking=True).clamp(0, steps)


def _check_range(low: int, high: int, steps: int) -> None:
    if low < 0 or high > steps:
        raise ValueError(f"lengths must be from 0 to T = {steps}, got one {'below' if low < 0 else 'above'}")
