"""The CPU backend: the recurrence of a whole sequence in C++ (csrc/), one call forward and one call backward.

The arithmetic per element is a fixed sequence of operations, so on one instruction set the memories and the gradients
of x, memory and reset_memory have the same bits for any number of threads, any batch around an element, and any cut of
a sequence into chunks; docs/cpu-backend.md says exactly what holds for the parameters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import is_
from typing import Any

import torch
from torch import Tensor

from rmc_kernels.backends.protocol import Call
from rmc_kernels.spec import CellSpec

try:
    from rmc_kernels import _C

    _missing: str | None = None
    #: The instruction sets of this build and machine, the plainest first.
    ISAS: tuple[str, ...] = tuple(_C.isas())
except ImportError as error:  # built without a compiler, or for another Python
    _C = None  # type: ignore[assignment]
    _missing = str(error)
    ISAS = ()

_VECTORS = next((isa for isa in reversed(ISAS) if isa != "amx"), "")
#: Whether float32 products of large batches may run on AMX tiles, every operand split into three bf16 numbers: as exact
#: as plain float32, and faster. False keeps every batch on the vector units, and so on the same bits.
allow_amx_split = True
#: Memory rows (batch elements times slots) from which on they do: below, the tiles wait for the weights.
AMX_ROWS = 64
#: What products work with, and the instruction set.
Kernels = tuple[str, str]
_KERNELS: list[Kernels] = [("float64", "generic"), ("bfloat16", "amx"), *(("float32", isa) for isa in ISAS)]
#: Saved activations begin with the number of the kernels that laid them out.
_HEADER = 64

_FLAGS = (
    "has_input_projection", "has_qkv_norm", "has_attention_norm", "has_mlp_norm", "joint_norm", "has_output_projection",
    "has_attention_residual", "mlp_ends_in_relu", "tied", "trains_gate_biases",
)  # fmt: skip
_SIZES = ("input_size", "mem_slots", "head_size", "num_heads", "num_blocks", "attention_mlp_layers")


@lru_cache(maxsize=256)
def cell(spec: CellSpec, precision: str, isa: str) -> Any:
    """The planned cell of a spec."""
    config: dict[str, object] = {name: getattr(spec, name) for name in (*_FLAGS, *_SIZES)}
    config |= {"key_size": spec.key_width, "rows": spec.rows, "gate_style": spec.gate_style or ""}
    config |= {"forget_bias": spec.forget_bias, "input_bias": spec.input_bias}
    return _C.Cell(config, precision, isa)


class FrozenWeights:
    """Packed weights of parameters that must not change while this exists. Made by `frozen_weights`."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = tuple(params)
        self.state = self._state()
        self.packed: dict[Any, Any] = {}

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that were frozen, unchanged.

        Raises:
            RuntimeError: they are, and one was changed since.
        """
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        if self.state != self._state():
            raise RuntimeError("a parameter was changed inside frozen_weights(); leave the block before training on")
        return True

    def _state(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self.params)), [0 if p.is_inference() else p._version for p in self.params]


_frozen: list[FrozenWeights] = []


@contextmanager
def frozen_weights(params: Sequence[Tensor]) -> Iterator[None]:
    """Packs `params` (in the order of `spec.parameter_names`) once for all calls inside the block.

    A change to one of them that torch's version counter sees raises at the next call; one that it does not see (a fused
    optimizer, `.data`) goes unnoticed: leave the block before training on.
    """
    entry = FrozenWeights(params)
    _frozen.append(entry)
    try:
        yield
    finally:
        _frozen.remove(entry)


class CpuBackend:
    """The C++ kernels.

    float32 in float32; bfloat16 with bf16 products on AMX tiles where the machine has them; otherwise half types are
    widened and computed in float32. Memories are float32 throughout.

    Args:
        isa: forces an instruction set, as the environment variable RMC_KERNELS_ISA does; "" chooses by the batch.
        test_double: serves float64 too, through the generic build, for tests.
    """

    name = "cpu"
    note = ""

    def __init__(self, isa: str = "", test_double: bool = False) -> None:
        self._isa = isa
        self._test_double = test_double

    def unavailable(self) -> str | None:
        """Why the extension cannot be used, or None."""
        if _missing is not None:
            return f"the C++ extension is missing ({_missing}); install with a C++17 compiler to build it"
        return None

    def refuses(self, spec: CellSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """See `Backend.refuses`."""
        if device.type != "cpu":
            return f"CPU tensors only, got {device}"
        if dtype is torch.float64 and not self._test_double:
            return f"float32, bfloat16 or float16 only, got {dtype}"
        return None

    def passed_over(self, device: torch.device) -> str | None:
        """Never."""
        return None

    def activation_size(self, spec: CellSpec, batch_size: int, steps: int, dtype: torch.dtype) -> int:
        """See `Backend.activation_size`: linear in steps and in batch elements, whichever kernels run."""
        sizes = [cell(spec, *kernels).activation_bytes for kernels in set(self._kernels(dtype))]
        per_element, per_tile = map(max, zip(*sizes, strict=True))
        return _HEADER + steps * (batch_size * per_element + per_tile)  # type: ignore[no-any-return]

    def forward(self, spec: CellSpec, call: Call, save: bool) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        kernels = self._choose(spec, call)
        native = cell(spec, *kernels)
        inputs, params = _as_read(call)
        memories = torch.empty((call.batch_size, call.steps, spec.mem_slots, spec.mem_size), dtype=inputs[1].dtype)
        size = self.activation_size(spec, call.batch_size, call.steps, call.x.dtype) if save else 0
        activations = torch.empty(size, dtype=torch.uint8)
        if size:
            activations[0] = _KERNELS.index(kernels)
        native.forward(
            _sizes(call), _pointers(inputs), _addresses(params), _packed(native, call.params, params, False),
            memories.data_ptr(), *_behind_header(activations),
        )  # fmt: skip
        return memories, activations

    def backward(
        self, spec: CellSpec, call: Call, memories: Tensor, activations: Tensor, grad: Tensor, needs: Sequence[bool]
    ) -> list[Tensor]:
        """See `Backend.backward`."""
        kernels = _KERNELS[int(activations[0])] if activations.numel() else self._choose(spec, call)
        native = cell(spec, *kernels)
        inputs, params = _as_read(call)
        grad, memories = grad.contiguous(), memories.contiguous()
        targets = (call.x, call.memory, call.reset_memory, *call.params)
        wanted = [target if need else None for target, need in zip(targets, needs, strict=True)]
        grads = [torch.empty(0 if t is None else t.shape, dtype=memories.dtype) for t in wanted]
        addresses = [0 if t is None else g.data_ptr() for g, t in zip(grads, wanted, strict=True)]
        native.backward(
            _sizes(call), _pointers(inputs), _addresses(params), _packed(native, call.params, params, True),
            memories.data_ptr(), *_behind_header(activations),
            (grad.data_ptr(), *addresses[:3]), tuple(addresses[3:]),
        )  # fmt: skip
        return [g if t is None else g.to(t.dtype) for g, t in zip(grads, wanted, strict=True)]

    def _kernels(self, dtype: torch.dtype) -> tuple[Kernels, Kernels]:
        """Those for small and for large batches."""
        forced = self._isa or os.environ.get("RMC_KERNELS_ISA", "")
        if dtype is torch.float64:
            small = large = ("float64", "generic")
        elif dtype is torch.bfloat16 and (forced or ISAS[-1]) == "amx":
            small = large = ("bfloat16", "amx")
        elif forced:
            small = large = ("float32", forced)
        else:
            small, large = ("float32", _VECTORS), ("float32", ISAS[-1] if allow_amx_split else _VECTORS)
        return small, large

    def _choose(self, spec: CellSpec, call: Call) -> Kernels:
        small, large = self._kernels(call.x.dtype)
        return large if call.batch_size * spec.mem_slots >= AMX_ROWS else small


def _behind_header(activations: Tensor) -> tuple[int, int]:
    """Address and bytes of what C++ keeps, or zeros."""
    size = activations.numel()
    return (activations.data_ptr() + _HEADER, size - _HEADER) if size else (0, 0)


def _as_read(call: Call) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """x, memory, lengths, resets, reset_memory, dropout_mask and the parameters, as C++ reads them."""
    params, x, mask = call.params, call.x, call.dropout_mask
    if x.dtype in (torch.bfloat16, torch.float16):
        params, x = tuple(map(Tensor.float, params)), x.float()
        mask = None if mask is None else mask.float()
    if not all(map(Tensor.is_contiguous, params)):
        params = tuple(map(Tensor.contiguous, params))
    inputs = (x, call.memory, call.lengths, call.resets, call.reset_memory, mask)
    return tuple(None if t is None else t.contiguous() for t in inputs), params


def _pointers(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(Tensor.data_ptr, tensors))


def _sizes(call: Call) -> tuple[int, int, int]:
    return call.batch_size, call.steps, torch.get_num_threads()


def _packed(native: Any, given: Sequence[Tensor], contiguous: Sequence[Tensor], backward: bool) -> Any:
    """Weights packed earlier in a `frozen_weights` block for exactly these parameters, or None."""
    for entry in _frozen:
        if entry.matches(given):
            key = (native, backward)
            if key not in entry.packed:
                entry.packed[key] = native.pack(list(_addresses(contiguous)), backward)
            return entry.packed[key]
    return None
