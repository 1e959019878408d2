"""Read heads: how an output is taken from the memory slots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmc_kernels import errors

KINDS = ("concat", "mean", "weighted", "attention")


class ReadHead(nn.Module):
    """Reads one vector from the memory.

    * "concat": the slots side by side (the paper's output), [..., N * D]; no parameters.
    * "mean": the mean of the slots, [..., D]; no parameters.
    * "weighted": a softmax of one learned weight per slot, [..., D]; `weight` [N], zeros at first: the mean.
    * "attention": a softmax over slots of `M w / sqrt(D)`, [..., D]; `weight` [D], drawn from N(0, 1).

    Args:
        kind: one of the above.
        mem_slots: `N`.
        mem_size: `D`.
        device, dtype: of the parameter.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it got.
    """

    def __init__(
        self,
        kind: str,
        mem_slots: int,
        mem_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        errors.one_of("read_head", kind, KINDS)
        self.kind = kind
        self.mem_slots = errors.positive_int("mem_slots", mem_slots)
        self.mem_size = errors.positive_int("mem_size", mem_size)
        self._shape = (self.mem_slots, self.mem_size)
        size = {"weighted": self.mem_slots, "attention": self.mem_size}.get(kind)
        self.weight = None if size is None else nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def output_size(self) -> int:
        """Width of the output."""
        return self.mem_slots * self.mem_size if self.kind == "concat" else self.mem_size

    def reset_parameters(self) -> None:
        """Draw the parameter again, if there is one."""
        if self.weight is not None:
            nn.init.zeros_(self.weight) if self.kind == "weighted" else nn.init.normal_(self.weight)

    def forward(self, memory: Tensor) -> Tensor:
        """Memory [..., N, D] -> [..., output_size], in the dtype of `memory`."""
        if not errors.is_dense(memory) or memory.shape[-2:] != self._shape:
            layout = f"[..., {self.mem_slots}, {self.mem_size}]"
            if not errors.is_dense(memory):
                raise errors.not_dense("memory", memory, f"a tensor {layout}")
            raise ValueError(f"memory must be {layout}, got {list(memory.shape)}")
        if self.kind == "concat":
            return memory.flatten(-2)
        if self.kind == "mean":
            return memory.mean(-2)
        assert self.weight is not None
        weight = self.weight.to(memory.dtype)
        scores = weight if self.kind == "weighted" else memory @ weight * self.mem_size**-0.5
        return (torch.softmax(scores, -1)[..., None] * memory).sum(-2)

    def extra_repr(self) -> str:
        """The kind and sizes."""
        return f"{self.kind!r}, mem_slots={self.mem_slots}, mem_size={self.mem_size}"
