"""The CPU backend: the recurrence of a whole sequence in C++ (csrc/), one call forward and one call backward.

float32. The arithmetic per element is a fixed sequence of operations, so the memories and the gradients of x, memory
and reset_memory have the same bits for any number of threads, any batch around an element, and any cut of a sequence
into chunks; docs/cpu-backend.md says exactly what holds for the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rmc_kernels.backends.protocol import Call
from rmc_kernels.spec import CellSpec

try:
    from rmc_kernels import _C

    _missing: str | None = None
except ImportError as error:  # built without a compiler, or for another Python
    _C = None  # type: ignore[assignment]
    _missing = str(error)

_FLAGS = (
    "has_input_projection", "has_qkv_norm", "has_attention_norm", "has_mlp_norm", "joint_norm", "has_output_projection",
    "has_attention_residual", "mlp_ends_in_relu", "tied", "trains_gate_biases",
)  # fmt: skip
_SIZES = ("input_size", "mem_slots", "head_size", "num_heads", "num_blocks", "attention_mlp_layers")


@lru_cache(maxsize=256)
def cell(spec: CellSpec, is_double: bool, isa: str) -> Any:
    """The planned cell of a spec; `isa` "" takes RMC_KERNELS_ISA or the best of this machine."""
    config: dict[str, object] = {name: getattr(spec, name) for name in (*_FLAGS, *_SIZES)}
    config |= {"key_size": spec.key_width, "rows": spec.rows, "gate_style": spec.gate_style or ""}
    config |= {"forget_bias": spec.forget_bias, "input_bias": spec.input_bias}
    return _C.Cell(config, is_double, isa)


class FrozenWeights:
    """Packed weights of parameters that must not change while this exists. Made by `frozen_weights`."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = tuple(params)
        self.state = tuple((p.data_ptr(), p._version) for p in self.params)
        self.packed: dict[Any, Any] = {}

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that were frozen, unchanged.

        Raises:
            RuntimeError: they are, and one was changed since.
        """
        if len(params) != len(self.params) or any(a is not b for a, b in zip(params, self.params, strict=True)):
            return False
        if self.state != tuple((p.data_ptr(), p._version) for p in params):
            raise RuntimeError("a parameter was changed inside frozen_weights(); leave the block before training on")
        return True


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
    """The C++ kernels. `test_double` serves float64 through the generic build, for tests; `isa` forces one."""

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
        if dtype is not torch.float32 and not (self._test_double and dtype is torch.float64):
            return f"float32 only, got {dtype}"
        return None

    def passed_over(self, device: torch.device) -> str | None:
        """Never."""
        return None

    def activation_size(self, spec: CellSpec, batch_size: int, steps: int, dtype: torch.dtype) -> int:
        """See `Backend.activation_size`: linear in steps and in batch elements."""
        per_element, per_tile = self._cell(spec, dtype).activation_bytes
        return steps * (batch_size * per_element + per_tile)  # type: ignore[no-any-return]

    def forward(self, spec: CellSpec, call: Call, save: bool) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        dtype = call.x.dtype
        native = self._cell(spec, dtype)
        memories = torch.empty((call.batch_size, call.steps, spec.mem_slots, spec.mem_size), dtype=dtype)
        size = self.activation_size(spec, call.batch_size, call.steps, dtype) if save else 0
        activations = torch.empty(size, dtype=torch.uint8)
        inputs, params = _contiguous(call)
        native.forward(
            _sizes(call), _pointers(inputs), _pointers(params), _packed(native, call.params, params, False),
            memories.data_ptr(), activations.data_ptr() if size else 0, size,
        )  # fmt: skip
        return memories, activations

    def backward(
        self, spec: CellSpec, call: Call, memories: Tensor, activations: Tensor, grad: Tensor, needs: Sequence[bool]
    ) -> list[Tensor]:
        """See `Backend.backward`."""
        native = self._cell(spec, call.x.dtype)
        inputs, params = _contiguous(call)
        grad, memories = grad.contiguous(), memories.contiguous()
        targets = (inputs[0], inputs[1], inputs[4], *params)
        grads = [
            torch.empty(target.shape if need and target is not None else (0,), dtype=call.x.dtype)
            for target, need in zip(targets, needs, strict=True)
        ]
        wanted = tuple(
            g.data_ptr() if need and target is not None else 0
            for g, target, need in zip(grads, targets, needs, strict=True)
        )
        size = activations.numel()
        native.backward(
            _sizes(call), _pointers(inputs), _pointers(params), _packed(native, call.params, params, True),
            memories.data_ptr(), activations.data_ptr() if size else 0, size,
            (grad.data_ptr(), *wanted[:3]), wanted[3:],
        )  # fmt: skip
        return grads

    def _cell(self, spec: CellSpec, dtype: torch.dtype) -> Any:
        return cell(spec, dtype is torch.float64, self._isa)


def _contiguous(call: Call) -> tuple[tuple[Tensor | None, ...], list[Tensor]]:
    """x, memory, lengths, resets, reset_memory, dropout_mask and the parameters, as C++ reads them."""
    inputs = (call.x, call.memory, call.lengths, call.resets, call.reset_memory, call.dropout_mask)
    return tuple(None if t is None else t.contiguous() for t in inputs), [p.contiguous() for p in call.params]


def _pointers(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def _sizes(call: Call) -> tuple[int, int, int]:
    return call.batch_size, call.steps, torch.get_num_threads()


def _packed(native: Any, given: Sequence[Tensor], contiguous: Sequence[Tensor], backward: bool) -> Any:
    """Weights packed earlier in a `frozen_weights` block for exactly these parameters, or None."""
    for entry in _frozen:
        if entry.matches(given):
            key = (native, backward)
            if key not in entry.packed:
                entry.packed[key] = native.pack(list(_pointers(contiguous)), backward)
            return entry.packed[key]
    return None
