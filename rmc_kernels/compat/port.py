"""What the drop-in classes share: a house cell behind an original's own modules, names and order of parameters."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from rmc_kernels import backends, errors, initial
from rmc_kernels.functional import compute_dtype, memory_dtype, relational_memory
from rmc_kernels.spec import CellSpec


class Port(nn.Module):
    """Base of the drop-in classes; holds the spec and the backend, and runs the sequence.

    A subclass registers the original's modules in the original's order, so that state_dicts, optimizer states (which go
    by position) and initial draws from one seed are the original's.

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
        like = next(self.parameters())
        return initial.memory("identity", self.spec, batch_size, like.device, memory_dtype(like.dtype))

    def _run(
        self, inputs: Tensor, memory: Tensor, dropout_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, torch.dtype]:
        """Memories [B, T, N, D], the last one, and the dtype of outputs; a narrower memory is widened."""
        errors.is_tensor("memory", memory, "a memory tensor")
        dtype = compute_dtype(inputs)
        memory = memory.to(torch.promote_types(memory.dtype, memory_dtype(dtype)))
        memories, final = relational_memory(
            inputs, memory, self._weights(), self.spec, dropout_mask=dropout_mask, backend=self.backend
        )
        return memories, final, dtype


def sequence(inputs: Tensor, features: int) -> Tensor:
    """`inputs` [B, T, ...] as [B, T, features]: like the originals, everything behind the time axis is flattened."""
    if not errors.is_tensor("inputs", inputs, f"a tensor [B, T, {features}]").is_floating_point():
        raise TypeError(f"inputs takes a floating-point tensor, got {errors.describe(inputs)}")
    width = math.prod(inputs.shape[2:])
    if inputs.dim() < 2 or width != features:
        raise ValueError(f"inputs takes shape [B, T, {features}], got {tuple(inputs.shape)}")
    return inputs.reshape(*inputs.shape[:2], features)
