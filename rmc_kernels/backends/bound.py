"""Inference on the CPU with a layer's parameters bound once: what a step pays besides the C++ call.

The ordinary way checks every argument and looks up every parameter at each call, in Python. Here both were checked when
they were bound, what may have changed since is compared in C++, and anything unusual is left to the ordinary way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rmc_kernels.backends import cpu, weights
from rmc_kernels.backends.plain import PLAIN_TYPES, is_plain, is_watched
from rmc_kernels.backends.protocol import HALF_TYPES
from rmc_kernels.spec import CellSpec

#: (dictionary, key, value): where a module or a parameter was found.
Place = tuple[dict[str, Any], str, Any]
#: torch's table of C functions that tell a tensor's address and layout; torch has it from 2.10 on.
_TENSORS = getattr(Tensor, "__dlpack_c_exchange_api__", None)


class BoundLayer:
    """The parameters of a layer that the C++ backend serves, and where they were found. Made by `bind`."""

    def __init__(
        self, backend: cpu.CpuBackend, spec: CellSpec, params: Sequence[Tensor], places: Sequence[Place]
    ) -> None:
        self.backend, self.spec = backend, spec
        self._params, self._places, self._dtype = tuple(params), tuple(places), params[0].dtype
        self._native = cpu.bound_cell(_TENSORS, self._params, self._places)
        self._cells: dict[cpu.Kernels, Any] = {}  # cpu.cell hashes the whole spec: 3 us
        #: The open blocks when last looked at, and the one of these parameters; one value, for threads.
        self._frozen: tuple[tuple[weights.FrozenWeights, ...], weights.FrozenWeights | None] = ((), None)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # copies bind anew

    def __call__(self, x: Tensor, memory: Tensor, sequence: bool) -> Tensor | None:
        """The memories after each step.

        Args:
            x: [B, T, I] if `sequence`, else [B, I]; with a row axis before I in matrix mode.
            memory: [B, N, D].
            sequence: whether x has an axis of steps.

        Returns:
            [B, T, N, D] if `sequence`, else [B, N, D]; None where the ordinary way is to serve or refuse the call.
        """
        if type(x) not in PLAIN_TYPES or type(memory) not in PLAIN_TYPES or not is_inference():
            return None
        if x.dtype is not self._dtype or memory.dim() != 3 or x.shape[1 + sequence :] != self.spec.input_shape:
            return None
        kernels = self.backend.kernels(self._dtype)[memory.shape[0] * memory.shape[1] >= cpu.AMX_ROWS]
        cell = self._cells.get(kernels)
        if cell is None:
            cell = self._cells[kernels] = cpu.cell(self.spec, *kernels)
        blocks, block = self._frozen
        if blocks is not weights.frozen_blocks:
            blocks, block = self._frozen = weights.frozen_blocks, weights.frozen_block(self._params)
        if block is None and self._dtype in HALF_TYPES:
            return None  # C++ reads packed weights or float32
        packed, versions = (None, ()) if block is None else (block.packed(cell, False), block.versions)
        rows, start = weights.as_read(x), weights.as_read(memory)
        if self._dtype in HALF_TYPES:
            rows = rows.float()
        memories = start.new_empty((*x.shape[:2], *start.shape[1:])) if sequence else torch.empty_like(start)
        done = self._native.forward(cell, rows, start, memories, packed, versions, torch.get_num_threads())
        return memories if done else None


def bind(
    backend: cpu.CpuBackend, spec: CellSpec, params: Sequence[Tensor], places: Sequence[Place]
) -> BoundLayer | None:
    """The parameters of a layer, bound.

    Args:
        backend: what served a call of the layer.
        spec: the cell.
        params: in the order of `spec.parameter_names`, as they served a call of the C++ backend.
        places: every module and parameter on the way to them.

    Returns:
        None where this torch does not tell C how tensors lie, or where they do not lie as the C++ code reads them.
    """
    if _TENSORS is None or not is_plain(*params) or any(map(Tensor.is_neg, params)):
        return None
    if params[0].dtype in HALF_TYPES and weights.frozen_block(params) is None:
        return None
    try:
        return BoundLayer(backend, spec, params, places)
    except ValueError:
        return None


def is_inference() -> bool:
    """Whether nothing but values is wanted of a call made here."""
    return not (
        torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_watched() or forward_ad._current_level >= 0
    )
