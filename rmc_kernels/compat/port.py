"""What the drop-in classes share: a house cell behind an original's own modules, names and order of parameters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rmc_kernels import backends, errors, initial
from rmc_kernels.compat.mapping import LEAVES
from rmc_kernels.functional import compute_dtype, memory_dtype, relational_memory
from rmc_kernels.leaf import LeafModule
from rmc_kernels.module import weight
from rmc_kernels.spec import CellSpec


class Port(LeafModule):
    """Base of the drop-in classes; holds the spec and the backend, and runs the sequence.

    A subclass registers the original's modules in the original's order, so that state_dicts, optimizer states (which go
    by position) and initial draws from one seed are the original's. Their own forward is never called: hooks on them do
    not fire, but for those of pruning and the older norms, which recompute a weight.

    Args:
        spec: the cell.
        backend: "auto", "triton", "cpu" or "reference"; see `explain`.
    """

    def __init__(self, spec: CellSpec, backend: str) -> None:
        super().__init__()
        errors.one_of("backend", backend, backends.CHOICES)
        self.spec, self.backend = spec, backend

    def extra_repr(self) -> str:
        """The backend; sizes are in the modules below."""
        return f"backend={self.backend!r}"

    @abstractmethod
    def _weights(self) -> dict[str, Tensor]:
        """The parameters under the names of the spec."""

    def _identity(self, batch_size: int) -> Tensor:
        """The identity memory [B, N, D] on the parameters' device; float32 for half types."""
        if not torch.compiler.is_compiling():  # there it is symbolic
            errors.positive_int("batch_size", batch_size, minimum=0)
        like = self._like()
        return initial.memory("identity", self.spec, batch_size, like.device, memory_dtype(like.dtype))

    def _like(self) -> Tensor:
        """A parameter of the dtype in which inputs come; l0sg's 0-d ones may stay in another (FSDP2)."""
        return next(value for value in self.parameters() if value.dim())

    def _rows(self, name: str, value: Tensor, axes: int) -> Tensor:
        """An input [B, T, I] (2 axes) or [B, I] (1), checked; like the originals, flattened behind these axes."""
        features, like = self.spec.input_size, self._like()
        takes = f"[B, T, {features}]" if axes == 2 else f"[B, {features}]"
        if not errors.is_tensor(name, value, f"a tensor {takes}").is_floating_point():
            raise TypeError(f"{name} takes a floating-point tensor, got {errors.describe(value)}")
        if value.dim() < axes or math.prod(value.shape[axes:]) != features:
            raise ValueError(f"{name} takes shape {takes}, got {tuple(value.shape)}")
        if value.device != like.device or (value.dtype != like.dtype and compute_dtype(value) == value.dtype):
            raise TypeError(
                f"{name} takes the parameters' {like.dtype} on {like.device}, got {value.dtype} on {value.device}"
            )
        return value.reshape(*value.shape[:axes], features)

    def _run(self, x: Tensor, memory: Tensor, dropout_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, N * D] in the dtype x is computed in, and the last memory; a narrower memory is widened."""
        errors.is_tensor("memory", memory, f"a tensor [B, {self.spec.mem_slots}, {self.spec.mem_size}]")
        dtype = compute_dtype(x)
        memory = memory.to(torch.promote_types(memory.dtype, memory_dtype(dtype)))
        memories, final = relational_memory(
            x, memory, self._weights(), self.spec, dropout_mask=dropout_mask, backend=self.backend
        )
        return memories.flatten(2).to(dtype), final


def weights(owners: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weight and the bias of each module, under the spec's name of it."""
    return {f"{name}.{leaf}": weight(owner, leaf) for name, owner in owners.items() for leaf in LEAVES}
