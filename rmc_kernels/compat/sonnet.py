"""DeepMind Sonnet 1.36 variables (`snt.RelationalMemory` under TensorFlow 1), in and out."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from torch import Tensor

from rmc_kernels.compat import checkpoints, mapping
from rmc_kernels.compat.mapping import Array, Entry, Layer
from rmc_kernels.spec import CellSpec

#: The name that Sonnet gives the module by itself.
_MODULE = "relational_memory/"


def load_variables(layer: Layer, variables: Mapping[str, Array | Tensor], *, prefix: str = "") -> None:
    """Copy Sonnet's variables into a layer of the sonnet variant, in place.

    Args:
        layer: the layer or cell; its dtype and device stay.
        variables: TensorFlow op name -> array for every variable of the module, such as
            `relational_memory/linear_1/w` [in, out]; layout as in docs/cell.md.
        prefix: what stands before `relational_memory/`, as in "agent/"; of a module with another name, that name too,
            as in "agent/core/". Names that do not begin so are passed over.

    Raises:
        TypeError, ValueError: wrong layer, missing or unknown names, wrong shapes; nothing is written then.
    """
    entries = _entries(mapping.check_layer(layer, "sonnet"))
    under = mapping.below(variables, prefix)
    if not any(str(name).startswith(_MODULE) for name in under):
        entries = [entry._replace(theirs=entry.theirs.removeprefix(_MODULE)) for entry in entries]
    mapping.load(layer, entries, variables, prefix=prefix)


def export_variables(layer: Layer, gradients: bool = False) -> dict[str, Array]:
    """The layer's parameters under Sonnet's names and in its layout.

    Args:
        layer: a layer or cell of the sonnet variant.
        gradients: give each parameter's `.grad` instead; zeros where there is none.

    Returns:
        name -> fresh array; float32 for half-type layers, the layer's dtype otherwise.
    """
    return mapping.export(layer, _entries(mapping.check_layer(layer, "sonnet")), gradients)


def load(layer: Layer, path: str | PathLike[str], scope: str | None = None) -> None:
    """Read Sonnet's variables from a file into a layer of the sonnet variant, in place.

    Whatever else the file holds (other modules, optimizer slots, the global step) is passed over.

    Args:
        layer: the layer or cell, of the sizes that were trained; its dtype and device stay.
        path: a .npz or .safetensors file, or a TensorFlow checkpoint (a directory or a prefix; needs TensorFlow).
        scope: the module's full name in the file, such as "agent/core/relational_memory"; None finds it where there is
            only one of these sizes.

    Raises:
        FileNotFoundError, ImportError: see `checkpoints.read`.
        TypeError, ValueError: wrong layer; no module of that name and these variables, or several; wrong shapes.
    """
    names = [entry.theirs for entry in _entries(mapping.check_layer(layer, "sonnet"))]
    found = checkpoints.read(path)
    first = "linear/w"
    scopes = [name.removesuffix(f"/{first}") for name in sorted(found) if name.endswith(f"/{first}")]
    chosen = scopes if scope is None else [scope]
    complete = [top for top in chosen if all(f"{top}/{name.removeprefix(_MODULE)}" in found for name in names)]
    if len(complete) != 1:
        raise ValueError(
            f"scope must be the name of one module with this layer's {len(names)} variables, got {scope!r}; "
            f"complete in the file: {complete}, others: {sorted(set(scopes) - set(complete))}"
        )
    load_variables(layer, {name: found[f"{complete[0]}/{name.removeprefix(_MODULE)}"] for name in names})


def save(layer: Layer, path: str | PathLike[str]) -> None:
    """Write the layer's parameters under Sonnet's names to a .npz or .safetensors file.

    Raises:
        TypeError, ValueError: not a layer of the sonnet variant; another suffix.
    """
    checkpoints.write(export_variables(layer), path)


def _entries(spec: CellSpec) -> list[Entry]:
    """Sonnet names modules in order of creation; index 0 has no suffix except inside `mlp/`."""
    entries: list[Entry] = []

    def linear(theirs: str, ours: str) -> None:
        entries.append(Entry(f"{_MODULE}{theirs}/w", f"{ours}.weight", mapping.transposed))
        entries.append(Entry(f"{_MODULE}{theirs}/b", f"{ours}.bias", mapping.whole))

    def norm(index: int, ours: str) -> None:
        theirs = f"{_MODULE}layer_norm" + (f"_{index}" if index else "")
        entries.append(Entry(f"{theirs}/gamma", f"{ours}.weight", mapping.whole))
        entries.append(Entry(f"{theirs}/beta", f"{ours}.bias", mapping.whole))

    linear("linear", "input_projection")
    for b in range(spec.num_blocks):
        linear(f"linear_{1 + b}", f"blocks.{b}.qkv")
        norm(3 * b, f"blocks.{b}.qkv_norm")
        norm(3 * b + 1, f"blocks.{b}.attention_norm")
        norm(3 * b + 2, f"blocks.{b}.mlp_norm")
    for layer in range(spec.attention_mlp_layers):
        linear(f"mlp/linear_{layer}", f"mlp.{layer}")
    if spec.gate_size:
        linear(f"linear_{1 + spec.num_blocks}", "input_gate")
        linear(f"linear_{2 + spec.num_blocks}", "memory_gate")
    return entries
