"""The parameters of a call as the forward kernel takes them: by role, those of blocks and MLP layers stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rmc_kernels.backends.protocol import Call
from rmc_kernels.spec import CellSpec


@dataclass(frozen=True)
class Linear:
    """Weight [count, out, in] and bias [count, out] of a Linear, or [count, width] twice of a norm; contiguous."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Parameters:
    """Every parameter by role; None where the variant has none. `count` is 1 but where it says otherwise.

    Attributes:
        input_projection: D from I.
        qkv, qkv_norm: F from D; one per block.
        heads: the output projection, D from D.
        attention_norm, mlp_norm: of D; one per block.
        mlp: D from D; one per layer.
        input_gate, memory_gate: G from n * D, G from D.
    """

    input_projection: Linear | None
    qkv: Linear
    qkv_norm: Linear | None
    heads: Linear | None
    attention_norm: Linear | None
    mlp: Linear
    mlp_norm: Linear | None
    input_gate: Linear | None
    memory_gate: Linear | None

    @classmethod
    def of(cls, spec: CellSpec, call: Call) -> Parameters:
        """Those of `call`."""
        named = dict(zip(spec.parameter_names, call.params, strict=True))

        def stacked(names: Sequence[str], present: bool = True) -> Linear | None:
            if not present:
                return None
            return Linear(*(_stack([named[f"{name}.{part}"] for name in names]) for part in ("weight", "bias")))

        def single(name: str, present: bool) -> Linear | None:
            return stacked([name], present)

        def blocks(part: str, present: bool) -> Linear | None:
            return stacked([f"blocks.{b}.{part}" for b in range(spec.num_blocks)], present)

        qkv = blocks("qkv", True)
        mlp = stacked([f"mlp.{layer}" for layer in range(spec.attention_mlp_layers)])
        assert qkv is not None
        assert mlp is not None
        gated = spec.gate_style is not None
        return cls(
            input_projection=single("input_projection", spec.has_input_projection),
            qkv=qkv,
            qkv_norm=blocks("qkv_norm", spec.has_qkv_norm),
            heads=single("blocks.0.output", spec.has_output_projection),
            attention_norm=blocks("attention_norm", spec.has_attention_norm),
            mlp=mlp,
            mlp_norm=blocks("mlp_norm", spec.has_mlp_norm),
            input_gate=single("input_gate", gated),
            memory_gate=single("memory_gate", gated),
        )


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """[len(tensors), ...]; one contiguous tensor is not copied."""
    return tensors[0].contiguous()[None] if len(tensors) == 1 else torch.stack(list(tensors))
