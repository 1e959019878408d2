"""What a backend is: the one interface that the reference, the C++ and the Triton backends fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from rmc_kernels.spec import CellSpec

if TYPE_CHECKING:
    from typing_extensions import Self

#: Types of x and of parameters beside which memories are float32.
HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(slots=True)  # frozen, it would take 1 us more to make
class Call:
    """The tensors of one unroll, validated: all that a backend is given. `B`, `T` may be 0.

    Attributes:
        x: [B, T, I] or [B, T, n, I], float32, float64 or a half type; any strides.
        memory: [B, N, D]; float32 where x is a half type, x's dtype otherwise.
        params: in the order of `spec.parameter_names`, of x's dtype; any strides.
        lengths: [B] int64 on x's device, or None; a backend clamps it to [0, T].
        resets: [B, T] bool, or None.
        reset_memory: [B, N, D] in the dtype of `memory`; given exactly when `resets` is.
        dropout_mask: [B, T, H, N, S] in x's dtype, factors of the attention weights, or None.
    """

    x: Tensor
    memory: Tensor
    params: tuple[Tensor, ...]
    lengths: Tensor | None = None
    resets: Tensor | None = None
    reset_memory: Tensor | None = None
    dropout_mask: Tensor | None = None

    def flat(self) -> tuple[Tensor | None, ...]:
        """The tensors one after the other, as autograd and csrc/python/tensor_cell.cpp are given them."""
        return (self.lengths, self.resets, self.dropout_mask, self.x, self.memory, self.reset_memory, *self.params)

    @classmethod
    def from_flat(
        cls,
        lengths: Tensor | None,
        resets: Tensor | None,
        dropout_mask: Tensor | None,
        x: Tensor,
        memory: Tensor,
        reset_memory: Tensor | None,
        *params: Tensor,
    ) -> Self:
        """The call whose `flat()` these are."""
        return cls(x, memory, params, lengths, resets, reset_memory, dropout_mask)

    def trained(self) -> tuple[Tensor | None, ...]:
        """The tensors that a backend gives gradients of, in its order."""
        return (self.x, self.memory, self.reset_memory, *self.params)

    @property
    def batch_size(self) -> int:
        """`B`."""
        return self.x.shape[0]

    @property
    def steps(self) -> int:
        """`T`."""
        return self.x.shape[1]

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.x.device


class Unrolled(NamedTuple):
    """What a backend makes of a call.

    Attributes:
        memories: [B, T, N, D] after each step, contiguous and fresh, in the dtype of `call.memory`.
        activations: uint8, `activation_size` bytes for `backward` if they were to be saved, 0 bytes otherwise.
        final: [B, N, D], the last of the memories as a tensor of its own; of any values where T = 0.
    """

    memories: Tensor
    activations: Tensor
    final: Tensor


def last_memory(memories: Tensor) -> Tensor:
    """The last of [B, T, N, D], a tensor of its own: carrying it must not keep the whole sequence alive."""
    batch, steps, *slots = memories.shape
    if steps == 0:
        return memories.new_zeros((batch, *slots))
    last = memories.squeeze(1) if steps == 1 else memories[:, -1]  # to squeeze has the cheaper backward pass
    return last.clone(memory_format=torch.contiguous_format)


class Backend(Protocol):
    """One way to compute an unroll and its gradient. Backends are stateless; the arithmetic is `reference.py`'s.

    Attributes:
        name: what it is asked for by.
    """

    name: str

    def note(self, spec: CellSpec, dtype: torch.dtype, device: torch.device) -> str:
        """What `explain` adds where this backend runs; empty for nothing."""

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""

    def refuses(self, spec: CellSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this backend does not serve `spec` with tensors of this dtype and device, or None."""

    def passed_over(self, device: torch.device) -> str | None:
        """Why `auto` never takes this backend for tensors on `device`, though it may serve them by name; or None."""

    def fault(
        self, spec: CellSpec, dtype: torch.dtype, device: torch.device, gradients: str, *, check: bool
    ) -> str | None:
        """Why `auto` does not trust the kernels of a call that this backend serves, or None.

        `gradients` is "" for a call without, otherwise its `recompute`. `check` tells whether to compare kernels with
        the reference that have not been compared on this machine.
        """

    def activation_size(self, spec: CellSpec, batch_size: int, steps: int, dtype: torch.dtype) -> int:
        """Bytes that `forward(save=True)` keeps for `backward`; arithmetic only, sizes may be symbolic."""

    def forward(self, spec: CellSpec, call: Call, save: bool) -> Unrolled:
        """Run the sequence."""

    def backward(
        self, spec: CellSpec, call: Call, memories: Tensor, activations: Tensor, grad: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of `sum(memories * grad)` for x, memory, reset_memory and each parameter, in this order.

        Args:
            spec: the cell.
            call: what `forward` was given.
            memories: what `forward` returned.
            activations: likewise; where it is empty, each step is computed again from the memory before it.
            grad: [B, T, N, D], any strides.
            needs: one flag per gradient; where it is False, None stands in its place.
        """
