"""state_dicts of R2Gen's RelationalMemory, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from rmc_kernels.compat import mapping
from rmc_kernels.compat.mapping import Array, Entry, Layer
from rmc_kernels.spec import CellSpec


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
        for leaf in ("weight", "bias")
    ]
    modules = {"attn.linears.3": "blocks.0.output", "mlp.0": "mlp.0", "mlp.2": "mlp.1", "W": "input_gate"}
    modules["U"] = "memory_gate"
    return entries + [
        Entry(f"{theirs}.{leaf}", f"{ours}.{leaf}", mapping.whole)
        for theirs, ours in modules.items()
        for leaf in ("weight", "bias")
    ]


def _projection(value: Tensor, spec: CellSpec, which: int) -> Tensor:
    """The rows of the joint projection that are R2Gen's q (0), k (1) or v (2): [H, V, ...], viewed head by head."""
    return value.view(spec.num_heads, 3, spec.head_size, *value.shape[1:])[:, which]
