"""R2Gen: its `RelationalMemory` as a drop-in, and its state_dicts in and out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from rmc_kernels import errors
from rmc_kernels.compat import mapping
from rmc_kernels.compat.mapping import LEAVES, Array, Entry, Layer
from rmc_kernels.compat.port import Port, weights
from rmc_kernels.functional import attention_dropout
from rmc_kernels.module import weight
from rmc_kernels.spec import CellSpec


class RelationalMemory(Port):
    """R2Gen's `modules.encoder_decoder.RelationalMemory`, on the fused backends.

    Same constructor, methods, shapes and state_dict as zhjohnchan/R2Gen and the repositories that copied it; a
    checkpoint loads with `strict=True`, an optimizer's too, since parameters have the original's order.

    Kept from the original:
        * `forward` returns the outputs alone, [B, T, N * D]; the last of them is the memory to go on with, and a memory
          may come as [B, N * D] or [B, N, D]. Nothing is detached.
        * dropout of 0.1 on the attention weights while training, through the module `attn.dropout`.
        * the four projections `attn.linears` start as copies of one another; R2Gen itself draws them again
          (`xavier_uniform_` over every matrix of its model).

    Not kept: `init_memory` is made on the parameters' device; `attn.attn` does not hold the last attention weights.

    Args:
        num_slots: memory slots `N`.
        d_model: features of the input and of a slot, `D`; a multiple of num_heads.
        num_heads: heads. Default: 1.
        backend: "auto", "triton", "cpu" or "reference"; see `explain`.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it takes.
    """

    def __init__(self, num_slots: int, d_model: int, num_heads: int = 1, *, backend: str = "auto") -> None:
        super().__init__(CellSpec.r2gen(num_slots, d_model, num_heads), backend)
        self.num_slots, self.d_model, self.num_heads = num_slots, d_model, num_heads
        self.attn = _Attention(d_model, self.spec.dropout)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, d_model), nn.ReLU())
        self.W = nn.Linear(d_model, 2 * d_model)
        self.U = nn.Linear(d_model, 2 * d_model)

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        """Run the sequence.

        Args:
            inputs: [B, T, D], in the dtype of the parameters.
            memory: [B, N * D] or [B, N, D].

        Returns:
            The memory after every step, [B, T, N * D].

        Raises:
            TypeError, ValueError: naming the argument, what it got and what it takes.
        """
        return self._sequence(self._rows("inputs", inputs, axes=2), memory)

    def forward_step(self, input: Tensor, memory: Tensor) -> Tensor:
        """One step: input [B, D] and memory, [B, N * D] or [B, N, D], give the next memory, [B, N * D]."""
        return self._sequence(self._rows("input", input, axes=1)[:, None], memory)[:, 0]

    def init_memory(self, batch_size: int) -> Tensor:
        """The identity, padded or cut to D columns: [B, N, D]."""
        return self._identity(batch_size)

    def _sequence(self, x: Tensor, memory: Tensor) -> Tensor:
        """The memory after every step, [B, T, N * D]."""
        memory = errors.is_tensor("memory", memory, "a tensor [B, N * D] or [B, N, D]")
        if memory.dim() == 2 and memory.shape[1] == self.num_slots * self.d_model:
            memory = memory.unflatten(1, (self.num_slots, self.d_model))
        dropout = self.attn.dropout
        mask = attention_dropout(x, self.spec, dropout.p) if dropout.training and dropout.p else None
        return self._run(x, memory, mask)[0]

    def _weights(self) -> dict[str, Tensor]:
        owners: dict[str, nn.Module] = {
            "blocks.0.output": self.attn.linears[3],
            "mlp.0": self.mlp[0],
            "mlp.1": self.mlp[2],
            "input_gate": self.W,
            "memory_gate": self.U,
        }
        found = weights(owners)
        heads = (self.num_heads, self.spec.head_size)
        for leaf in LEAVES:  # the joint projection is head-major, and inside a head q, k, v
            parts = [weight(linear, leaf).unflatten(0, heads) for linear in self.attn.linears[:3]]
            found[f"blocks.0.qkv.{leaf}"] = torch.stack(parts, 1).flatten(0, 2)
        return found


class _Attention(nn.Module):
    """R2Gen's names for the projections (q, k, v, output) and the dropout; computes nothing itself."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        projection = nn.Linear(width, width)
        self.linears = nn.ModuleList([copy.deepcopy(projection) for _ in range(4)])
        self.dropout = nn.Dropout(dropout)


def load_variables(layer: Layer, variables: Mapping[str, Array | Tensor]) -> None:
    """Copy R2Gen's state_dict into a layer of the r2gen variant, in place.

    Args:
        layer: the layer or cell; its dtype and device stay.
        variables: state_dict key (`attn.linears.0.weight`, ..., `mlp.0`, `mlp.2`, `W`, `U`) -> array or tensor.

    Raises:
        TypeError, ValueError: wrong layer, missing or unknown names, wrong shapes; nothing is written then.
    """
    mapping.load(layer, _entries(mapping.check_layer(layer, "r2gen")), variables)


def export_variables(layer: Layer, gradients: bool = False) -> dict[str, Array]:
    """The layer's parameters (or gradients, zeros where there is none) under R2Gen's keys and in its layout."""
    return mapping.export(layer, _entries(mapping.check_layer(layer, "r2gen")), gradients)


def _entries(spec: CellSpec) -> list[Entry]:
    entries = [
        Entry(f"attn.linears.{which}.{leaf}", f"blocks.0.qkv.{leaf}", partial(_projection, spec=spec, which=which))
        for which in range(3)
        for leaf in LEAVES
    ]
    modules = {"attn.linears.3": "blocks.0.output", "mlp.0": "mlp.0", "mlp.2": "mlp.1", "W": "input_gate"}
    modules["U"] = "memory_gate"
    return entries + [
        Entry(f"{theirs}.{leaf}", f"{ours}.{leaf}", mapping.whole)
        for theirs, ours in modules.items()
        for leaf in LEAVES
    ]


def _projection(value: Tensor, spec: CellSpec, which: int) -> Tensor:
    """The rows of the joint projection that are R2Gen's q (0), k (1) or v (2): [H, V, ...], viewed head by head."""
    return value.view(spec.num_heads, 3, spec.head_size, *value.shape[1:])[:, which]
