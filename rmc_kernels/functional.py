"""`relational_memory`: a sequence of the cell as a function of its tensors. Every layer ends up here."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rmc_kernels import backends, errors
from rmc_kernels.autograd import RelationalMemoryFunction, run_forward
from rmc_kernels.backends import HALF_TYPES, Call
from rmc_kernels.backends.reference import unroll as reference_unroll
from rmc_kernels.spec import CellSpec

DTYPES = (torch.float32, torch.float64, *HALF_TYPES)
RECOMPUTE = ("full", "none")


def relational_memory(
    x: Tensor,
    memory: Tensor,
    params: Mapping[str, Tensor],
    spec: CellSpec,
    *,
    lengths: Tensor | None = None,
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
        lengths: [B] int32 or int64, 0 <= length <= T, or None for T everywhere. From step `lengths[b]` on, element b's
            memory is frozen. Values are checked for CPU tensors and clamped on other devices.
        resets: [B, T] bool, or None. Before such a step the element's memory is replaced by its `reset_memory`.
            Resets past the length are ignored.
        reset_memory: [B, N, D], or [N, D] for every element alike; needed with `resets`, refused without.
        dropout_mask: [B, T, H, N, S] factors by which the attention weights are multiplied, of x's dtype, or None.
            For one-block cells other than l0sg. It gets a gradient by the reference only.
        backend: "auto", "triton", "cpu" or "reference"; `explain` tells what "auto" takes.
        recompute: what a fused backend keeps for its backward pass: "full" keeps only the memories and computes each
            step again, "none" keeps the activations too. The reference ignores it.

    Under `torch.autocast`, x and the parameters are cast to the autocast dtype first.

    Returns:
        memories: [B, T, N, D] after each step; past the length they repeat the frozen memory.
        final: [B, N, D], the memory after the last step, or `memory` where T = 0.
        Both have x's dtype, or float32 for half types, so that a sequence run in chunks equals the same sequence run
        at once.

    Raises:
        TypeError, ValueError: before anything is computed, naming the argument, what it got and what it takes.
    """
    if not isinstance(spec, CellSpec):
        raise TypeError(f"spec takes a CellSpec, got {errors.describe(spec)}")
    errors.one_of("recompute", recompute, RECOMPUTE)
    options = Options(lengths, resets, reset_memory, dropout_mask)
    call, context = prepare(x, memory, params, spec, options)
    chosen = backends.choose(backend, spec, call.x.dtype, call.x.device)
    with context:
        if chosen is backends.REFERENCE:
            memories = reference_unroll(spec, call)[0]
        else:
            memories = _fused(spec, chosen.name, call, save=recompute == "none")
    return memories, _final(memories, call)


class Options(NamedTuple):
    """The optional tensors of a sequence, as `relational_memory` takes them."""

    lengths: Tensor | None = None
    resets: Tensor | None = None
    reset_memory: Tensor | None = None
    dropout_mask: Tensor | None = None


def with_attention(
    x: Tensor, memory: Tensor, params: Mapping[str, Tensor], spec: CellSpec, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """`relational_memory` by the reference, with the attention weights [B, T, num_blocks, H, N, S].

    They are those of the memory rows, before dropout, zero past the length.
    """
    call, context = prepare(x, memory, params, spec, options)
    with context:
        memories, attention = reference_unroll(spec, call)
    return memories, _final(memories, call), attention


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which memories are carried beside an x of `dtype`: that, but float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is computed with: the autocast dtype under autocast, its own otherwise."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def attention_dropout(x: Tensor, spec: CellSpec, probability: float) -> Tensor:
    """A freshly drawn `dropout_mask` [B, T, H, N, S] for x [B, T, ...], in the dtype it computes in."""
    shape = (*x.shape[:2], spec.num_heads, spec.mem_slots, spec.total_rows)
    return nn.functional.dropout(x.new_ones(shape, dtype=compute_dtype(x)), probability)


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def prepare(
    x: Tensor, memory: Tensor, params: Mapping[str, Tensor], spec: CellSpec, options: Options
) -> tuple[Call, AbstractContextManager[object]]:
    """Check every argument, apply autocast, and give the call with the context in which it is to run."""
    values = _parameter_list(params, spec)
    _check_input(x, spec)
    context: AbstractContextManager[object] = nullcontext()
    if _autocasts(x):
        dtype = compute_dtype(x)
        x = x.to(dtype)
        values = tuple(value.to(dtype) for value in values)
        context = torch.autocast(x.device.type, enabled=False)
    if spec.trains_gate_biases:  # 0-d, last: FSDP2 leaves them in float32 where it casts the others
        values = (*values[:-2], *(value.to(x.dtype) for value in values[-2:]))
    for name, value in zip(spec.parameter_names, values, strict=True):
        if value.dtype != x.dtype or value.device != x.device:
            raise TypeError(
                f"params[{name!r}] takes the dtype and device of x ({x.dtype} on {x.device}), got {value.dtype} on "
                f"{value.device}"
            )
    batch, steps = x.shape[:2]
    shape = (batch, spec.mem_slots, spec.mem_size)
    memory = _memory("memory", memory, shape, x)
    resets, reset_memory = options.resets, options.reset_memory
    if resets is not None:
        _check_tensor("resets", resets, (batch, steps), torch.bool, x.device)
        if reset_memory is None:
            raise ValueError("reset_memory takes the memory that resets load, [B, N, D] or [N, D]; got None")
        if isinstance(reset_memory, Tensor) and reset_memory.dim() == 2:
            reset_memory = reset_memory.expand(batch, *reset_memory.shape)
        reset_memory = _memory("reset_memory", reset_memory, shape, x)
    elif reset_memory is not None:
        raise ValueError("reset_memory takes None where resets is None: without resets it has no meaning")
    mask = options.dropout_mask
    if mask is not None:
        if spec.input_rows_live:  # the mask has no rows for the input's own attention
            raise ValueError(
                f"dropout_mask is for one-block cells other than l0sg; this one is {spec.variant}, "
                f"num_blocks={spec.num_blocks}"
            )
        mask_shape = (batch, steps, spec.num_heads, spec.mem_slots, spec.total_rows)
        _check_tensor("dropout_mask", mask, mask_shape, x.dtype, x.device)
    lengths = checked_lengths(options.lengths, batch, steps, x)
    return Call(x, memory, values, lengths, resets, reset_memory, mask), context


def _parameter_list(params: Mapping[str, Tensor], spec: CellSpec) -> tuple[Tensor, ...]:
    """The parameters in the order of the spec, their names and shapes checked."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params takes a mapping from parameter names to tensors, got {errors.describe(params)}")
    shapes = spec.parameter_shapes
    if params.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - params.keys()), sorted(map(str, params.keys() - shapes.keys()))
        raise ValueError(f"params takes the names in spec.parameter_shapes; missing: {missing}, unknown: {unknown}")
    for name, shape in shapes.items():
        value = params[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"params[{name!r}] takes a tensor of shape {shape}, got {errors.describe(value)}")
        if value.shape != shape:
            raise ValueError(f"params[{name!r}] takes shape {shape}, got {tuple(value.shape)}")
    return tuple(params[name] for name in shapes)


def _check_input(x: Tensor, spec: CellSpec) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x takes a tensor {_input_layout(spec)}, got {errors.describe(x)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x takes one of {', '.join(map(str, DTYPES))}; got {x.dtype}")
    if x.dim() != 2 + len(spec.input_shape) or x.shape[2:] != spec.input_shape:
        raise ValueError(f"x takes shape {_input_layout(spec)}, got {tuple(x.shape)}")


def _input_layout(spec: CellSpec) -> str:
    names = "[B, T, I]" if spec.input_rows is None else "[B, T, n, I]"
    return f"{names} = [B, T, {', '.join(map(str, spec.input_shape))}]"


def _check_tensor(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} takes a {dtype} tensor of shape {shape}, got {errors.describe(value)}")
    if value.dtype != dtype:
        raise TypeError(f"{name} takes dtype {dtype}, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name} takes shape {shape}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} takes a tensor on the device of x ({device}), got {value.device}")


def _memory(name: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """A memory argument, checked; a half memory beside a half x is widened to the float32 it is carried in."""
    dtype = memory_dtype(x.dtype)
    if dtype != x.dtype and isinstance(value, Tensor) and value.dtype in HALF_TYPES:
        value = value.to(dtype)
    _check_tensor(name, value, shape, dtype, x.device)
    return value


def checked_lengths(lengths: Tensor | None, batch: int, steps: int, x: Tensor) -> Tensor | None:
    """`lengths` as int64 on x's device; values are looked at only where that costs no synchronisation or trace."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths takes an int32 or int64 tensor of shape ({batch},), got {errors.describe(lengths)}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths takes dtype torch.int32 or torch.int64, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths takes shape ({batch},), got {tuple(lengths.shape)}")
    if lengths.device != x.device and lengths.device.type != "cpu":
        raise ValueError(f"lengths takes a tensor on the CPU or on the device of x ({x.device}), got {lengths.device}")
    if lengths.device.type == "cpu" and backends.is_plain(lengths) and batch:
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 0 or high > steps:
            raise ValueError(f"lengths takes values from 0 to T = {steps}, got values from {low} to {high}")
    return lengths.to(x.device, torch.int64, non_blocking=True).clamp(0, steps)


def _fused(spec: CellSpec, backend: str, call: Call, save: bool) -> Tensor:
    """The memories of `call` by a fused backend, under autograd where something needs a gradient."""
    if call.dropout_mask is not None and call.dropout_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f'dropout_mask takes a tensor without requires_grad in the "{backend}" backend, which gives it no '
            'gradient; got one with: use backend="reference"'
        )
    reset_memory = call.reset_memory
    if reset_memory is call.memory:  # torch.compile takes no autograd.Function with the same tensor twice
        reset_memory = call.memory.view_as(call.memory)
    inputs = (call.x, call.memory, reset_memory, *call.params)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        memories: Tensor = RelationalMemoryFunction.apply(  # type: ignore[no-untyped-call]
            spec, backend, save, call.lengths, call.resets, call.dropout_mask, *inputs
        )
        return memories
    return run_forward(spec, backend, call, save=False)[0]


def _final(memories: Tensor, call: Call) -> Tensor:
    return last(memories) if call.steps else call.memory


def last(memories: Tensor) -> Tensor:
    """The last of [B, T, N, D], a tensor of its own: carrying it must not keep the whole sequence alive."""
    return memories[:, -1].clone(memory_format=torch.contiguous_format)
