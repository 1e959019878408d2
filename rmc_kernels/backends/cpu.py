"""The CPU backend: the recurrence of a whole sequence in C++ (csrc/), one call forward and one call backward.

The arithmetic per element is a fixed sequence of operations, so on one instruction set the memories and the gradients
of x, memory and reset_memory have the same bits for any number of threads, any batch around an element, and any cut of
a sequence into chunks; docs/cpu-backend.md says exactly what holds for the parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmc_kernels.backends import extension
from rmc_kernels.backends.plain import PLAIN_TYPES, UNWATCHED, is_watched
from rmc_kernels.backends.protocol import HALF_TYPES, Call, Unrolled, last_memory
from rmc_kernels.backends.weights import FrozenWeights, addresses, as_read, frozen_block, readable
from rmc_kernels.spec import CellSpec

_C = extension.native
#: The instruction sets of this build and machine, the plainest first.
ISAS: tuple[str, ...] = tuple(_C.isas()) if _C else ()
#: Those of them that multiply bf16 numbers. float32 on the first is that of "avx512".
BFLOAT16_ISAS = tuple(isa for isa in ISAS if isa in ("avx512bf16", "amx"))
_VECTORS = next((isa for isa in reversed(ISAS) if isa not in BFLOAT16_ISAS), "")
#: Whether float32 products of large batches may run on AMX tiles, every operand split into three bf16 numbers: as exact
#: as plain float32, and faster. False keeps every batch on the vector units, and so on the same bits.
allow_amx_split = True
#: An instruction set of `ISAS` that serves every call, or "": the environment's RMC_KERNELS_ISA at import.
forced_isa = os.environ.get("RMC_KERNELS_ISA", "")
#: Memory rows (batch elements times slots) from which on they do: below, the tiles wait for the weights.
AMX_ROWS = 64
#: What products work with, and the instruction set.
Kernels = tuple[str, str]
_KERNELS: list[Kernels] = [
    ("float64", "generic"), *(("bfloat16", isa) for isa in BFLOAT16_ISAS), *(("float32", isa) for isa in ISAS),
]  # fmt: skip
#: Saved activations begin with the number of the kernels that laid them out.
_HEADER = 64
#: Activations that are not saved.
_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")

_FLAGS = (
    "has_input_projection", "has_qkv_norm", "has_attention_norm", "has_mlp_norm", "joint_norm", "has_output_projection",
    "has_attention_residual", "mlp_ends_in_relu", "tied", "trains_gate_biases",
)  # fmt: skip
_SIZES = ("input_size", "mem_slots", "head_size", "num_heads", "num_blocks", "attention_mlp_layers")


def bfloat16_isa(isas: Sequence[str], features: Mapping[str, bool]) -> str:
    """The instruction set for bf16 products, or "" where float32 arithmetic on converted operands is faster.

    It is on Intel's cores from Golden Cove on, which AVX512-FP16 tells: there vdpbf16ps, of twice the products, takes
    four times as long as a multiply-add (1.07 and 0.26 ns measured), and a forward pass 1.4 times as long as float32.
    """
    if "amx" in isas:
        return "amx"
    return "avx512bf16" if "avx512bf16" in isas and not features["avx512_fp16"] else ""


_BFLOAT16 = bfloat16_isa(ISAS, _C.cpu_features()) if ISAS else ""


def _tensors() -> Any:
    """What reads and makes tensors in C++ without calls of Python, or None: torch has the functions from 2.10 on."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if _C is None or table is None:
        return None
    try:
        return _C.Tensors(table, tuple(PLAIN_TYPES), Tensor.is_neg)
    except (TypeError, ValueError):  # of a version that is not known yet
        return None


_TENSORS = _tensors()


def are_plain_float32(tensors: tuple[Tensor, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these are float32 tensors of those shapes on the CPU, seen at one glance; False where it cannot be."""
    return _TENSORS is not None and not is_watched() and _TENSORS.all_float32(tensors, shapes)


class PlannedCell(NamedTuple):
    """The planned cell of a spec, given addresses or given tensors (None beside an older torch).

    One object holds both, so that both take the same packed weights.
    """

    given_addresses: Any
    given_tensors: Any


@lru_cache(maxsize=256)
def planned_cell(spec: CellSpec, precision: str, isa: str) -> PlannedCell:
    """Plans the cell of a spec, once."""
    native = plan_cell(spec, precision, isa)
    if _TENSORS is None:
        return PlannedCell(native, None)
    return PlannedCell(native, _C.TensorCell(_TENSORS, native, tuple(spec.parameter_shapes.values())))


def plan_cell(spec: CellSpec, precision: str, isa: str) -> Any:
    """Plans the cell of a spec anew."""
    config: dict[str, object] = {name: getattr(spec, name) for name in (*_FLAGS, *_SIZES)}
    config |= {"key_size": spec.key_width, "rows": spec.rows, "gate_style": spec.gate_style or ""}
    config |= {"forget_bias": spec.forget_bias, "input_bias": spec.input_bias}
    return _C.Cell(config, precision, isa)


def kernels(dtype: torch.dtype, forced: str) -> tuple[Kernels, Kernels]:
    """Those for calls of fewer than AMX_ROWS memory rows, and for larger ones."""
    if dtype is torch.float64:
        small = large = ("float64", "generic")
    elif dtype is torch.bfloat16 and (forced or _BFLOAT16) in BFLOAT16_ISAS:
        small = large = ("bfloat16", forced or _BFLOAT16)
    elif forced:
        small = large = ("float32", forced)
    else:
        small, large = ("float32", _VECTORS), ("float32", ISAS[-1] if allow_amx_split else _VECTORS)
    return small, large


class CpuBackend:
    """The C++ kernels.

    float32 in float32; bfloat16 with bf16 products on AMX tiles, or by AVX512-BF16 where that is fast; otherwise half
    types are widened and computed in float32. Memories are float32 throughout.

    Args:
        isa: forces an instruction set, over `forced_isa`; "" chooses by the batch.
        test_double: serves float64 too, through the generic build, for tests.
    """

    name = "cpu"

    def __init__(self, isa: str = "", test_double: bool = False) -> None:
        self._isa = isa
        self._test_double = test_double

    def note(self, spec: CellSpec, dtype: torch.dtype, device: torch.device) -> str:
        """Nothing."""
        return ""

    def unavailable(self) -> str | None:
        """Why the extension cannot be used, or None."""
        return extension.missing

    def refuses(self, spec: CellSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """See `Backend.refuses`."""
        if device.type != "cpu":
            return f"x must be on the CPU, got {device}"
        if dtype is torch.float64 and not self._test_double:
            return f"x must be float32, bfloat16 or float16, got {dtype}"
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
        """See `Backend.activation_size`: linear in steps and in batch elements, whichever kernels run."""
        sizes = [planned_cell(spec, *kernels).given_addresses.activation_bytes for kernels in set(self.kernels(dtype))]
        per_element, per_tile = map(max, zip(*sizes, strict=True))
        return _HEADER + steps * (batch_size * per_element + per_tile)  # type: ignore[no-any-return]

    def forward(self, spec: CellSpec, call: Call, save: bool) -> Unrolled:
        """See `Backend.forward`."""
        kernels = self._choose(spec, call)
        native, given_tensors = planned_cell(spec, *kernels)
        packed = _packed(native, call, False)
        activations, threads = _NOTHING, torch.get_num_threads()
        if save:
            size = self.activation_size(spec, call.batch_size, call.steps, call.x.dtype)
            activations = call.memory.new_empty(size, dtype=torch.uint8)
            activations[0] = _KERNELS.index(kernels)
        saved = _behind_header(activations)
        if given_tensors is not None:
            found = given_tensors.forward(call.flat(), threads, packed, *saved)
            if found is not None:
                memories, final = found
                return Unrolled(memories, activations, final)
        memories = call.memory.new_empty((call.batch_size, call.steps, spec.mem_slots, spec.mem_size))
        inputs, params = _as_read(call, packed)
        sizes = call.batch_size, call.steps, threads
        native.forward(sizes, addresses(inputs), addresses(params), packed, memories.data_ptr(), *saved)
        return Unrolled(memories, activations, last_memory(memories))

    def backward(
        self, spec: CellSpec, call: Call, memories: Tensor, activations: Tensor, grad: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """See `Backend.backward`."""
        kernels = _KERNELS[int(activations[0])] if activations.numel() else self._choose(spec, call)
        native, given_tensors = planned_cell(spec, *kernels)
        packed = _packed(native, call, True)
        grad, memories = as_read(grad), memories.contiguous()
        saved, threads = _behind_header(activations), torch.get_num_threads()
        if given_tensors is not None:
            grads: list[Tensor | None] | None = given_tensors.backward(
                call.flat(), threads, packed, *saved, memories, grad, needs
            )
            if grads is not None:
                return grads
        inputs, params = _as_read(call, packed)
        targets = (call.x, call.memory, call.reset_memory, *call.params)
        wanted = [target if need else None for target, need in zip(targets, needs, strict=True)]
        made = [None if target is None else memories.new_empty(target.shape) for target in wanted]
        pointers = addresses(made)
        native.backward(
            (call.batch_size, call.steps, threads), addresses(inputs), addresses(params), packed, memories.data_ptr(),
            *saved, (grad.data_ptr(), *pointers[:3]), pointers[3:],
        )  # fmt: skip
        return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(made, wanted, strict=True)]

    def frozen_step(
        self,
        spec: CellSpec,
        block: FrozenWeights,
        initial: Tensor | None,
        *,
        flat: bool,
        ordinary: Callable[[Any, Any, Any], Any],
    ) -> Callable[[Any, Any, Any], Any] | None:
        """A step (x, memory, resets) -> (output, memory) with the packed weights of `block`, or None without one.

        Args:
            spec: the cell.
            block: the weights.
            initial: the initial memory [N, D] of every element; None where `ordinary` makes it.
            flat: whether the output is the memory, flattened; otherwise [B, N, D] in its place.
            ordinary: serves what the step does not know, such as tensors of other dtypes and devices.
        """
        if _TENSORS is None:
            return None
        cells = tuple(planned_cell(spec, *kernels).given_addresses for kernels in self.kernels(block.params[0].dtype))
        config = {
            "tensors": _TENSORS, "cells": cells, "many_rows": AMX_ROWS, "flat": flat, "initial": initial,
            "matrix": spec.input_rows is not None, "parameter": block.params[0], "ordinary": ordinary,
            "pack": lambda native: block.packed(native, False), "get_num_threads": torch.get_num_threads,
            "quiet": UNWATCHED,
        }  # fmt: skip
        return _C.frozen_step(config)  # type: ignore[no-any-return]

    def kernels(self, dtype: torch.dtype) -> tuple[Kernels, Kernels]:
        """Those for calls of fewer than AMX_ROWS memory rows, and for larger ones."""
        return kernels(dtype, self._isa or forced_isa)

    def _choose(self, spec: CellSpec, call: Call) -> Kernels:
        return self.kernels(call.x.dtype)[call.batch_size * spec.mem_slots >= AMX_ROWS]


def _behind_header(activations: Tensor) -> tuple[int, int]:
    """Address and bytes of what C++ keeps, or zeros."""
    size = activations.numel()
    return (activations.data_ptr() + _HEADER, size - _HEADER) if size else (0, 0)


def _packed(native: Any, call: Call, backward: bool) -> Any:
    """The parameters packed, in a `frozen_weights` block of them; None outside."""
    block = frozen_block(call.params)
    if block is None:
        return None
    block.check()
    return block.packed(native, backward)


def _as_read(call: Call, packed: Any) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    """What C++ reads: x, memory, lengths, resets, reset_memory and dropout_mask; the parameters, unless packed."""
    x, mask = call.x, call.dropout_mask
    if x.dtype in HALF_TYPES:
        x, mask = x.float(), None if mask is None else mask.float()
    inputs = (x, call.memory, call.lengths, call.resets, call.reset_memory, mask)
    return tuple(None if t is None else as_read(t) for t in inputs), call.params if packed else readable(call.params)
