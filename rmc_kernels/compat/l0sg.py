"""state_dicts of L0SG/relational-rnn-pytorch (and its TextGAN copy), in and out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rmc_kernels.compat import mapping
from rmc_kernels.compat.mapping import Array, Entry, Layer
from rmc_kernels.spec import CellSpec


def load_variables(layer: Layer, variables: Mapping[str, Array | Tensor]) -> None:
    """Copy the port's state_dict into a layer of the l0sg variant, in place.

    Args:
        layer: the layer or cell; its dtype and device stay.
        variables: state_dict key -> array or tensor. The port lists its one MLP layer `L` times
            (`attention_mlp.0` ... `attention_mlp.{L-1}`); the aliases may be left out.

    Raises:
        TypeError, ValueError: wrong layer, missing or unknown names, wrong shapes; nothing is written then.
    """
    spec = mapping.check_layer(layer, "l0sg")
    aliases = {f"attention_mlp.{i}.{leaf}" for i in range(1, spec.attention_mlp_layers) for leaf in ("weight", "bias")}
    mapping.load(layer, _entries(spec), variables, ignored=aliases)


def export_variables(layer: Layer, gradients: bool = False) -> dict[str, Array]:
    """The layer's parameters (or gradients, zeros where there is none) under the port's keys, without MLP aliases."""
    return mapping.export(layer, _entries(mapping.check_layer(layer, "l0sg")), gradients)


def _entries(spec: CellSpec) -> list[Entry]:
    modules = {
        "qkv_projector": "blocks.0.qkv",
        "qkv_layernorm": "blocks.0.qkv_norm",
        "attention_mlp.0": "mlp.0",
        "attended_memory_layernorm": "blocks.0.attention_norm",
        "attended_memory_layernorm2": "blocks.0.mlp_norm",
        "input_projector": "input_projection",
    }
    if spec.gate_size:
        modules |= {"input_gate_projector": "input_gate", "memory_gate_projector": "memory_gate"}
    entries = [
        Entry(f"{theirs}.{leaf}", f"{ours}.{leaf}", mapping.whole)
        for theirs, ours in modules.items()
        for leaf in ("weight", "bias")
    ]
    biases = ("forget_bias", "input_bias") if spec.trains_gate_biases else ()
    return entries + [Entry(name, name, mapping.whole) for name in biases]
