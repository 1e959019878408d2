"""Moves parameters between a layer and another implementation's names and layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rmc_kernels import errors
from rmc_kernels.layers import RelationalMemory, RelationalMemoryCell
from rmc_kernels.spec import CellSpec, Variant

Array = npt.NDArray[np.floating]
Layer = RelationalMemory | RelationalMemoryCell
LEAVES = ("weight", "bias")


class Entry(NamedTuple):
    """One variable of the other implementation and where it lives here.

    Attributes:
        theirs: its name there.
        ours: the parameter's name in the layer's state_dict.
        part: gives, of our tensor, the view that holds exactly this variable in their layout; leading axes that the
            view has more than our tensor are theirs flattened.
    """

    theirs: str
    ours: str
    part: Callable[[Tensor], Tensor]


def whole(value: Tensor) -> Tensor:
    """The variable is the parameter."""
    return value


def transposed(value: Tensor) -> Tensor:
    """Their weight is [in, out], ours [out, in]."""
    return value.t()


def check_layer(layer: Layer, variant: Variant) -> CellSpec:
    """The spec of a layer of the given variant; TypeError or ValueError otherwise."""
    if not isinstance(layer, (RelationalMemory, RelationalMemoryCell)):
        raise TypeError(f"layer must be a RelationalMemory or RelationalMemoryCell, got {errors.describe(layer)}")
    if layer.spec.variant != variant:
        raise ValueError(f"layer must be of the {variant} variant, got one of {layer.spec.variant}")
    return layer.spec


def load(
    layer: nn.Module,
    entries: list[Entry],
    variables: Mapping[str, Array | Tensor],
    *,
    prefix: str = "",
    unused: Set[str] = frozenset(),
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Copy every variable into its parameter; names, shapes and aliases are checked before anything is written.

    Args:
        layer: the layer.
        entries: the variables that it needs.
        variables: name -> value.
        prefix: what stands before each name in `variables`; names without it are passed over.
        unused: names that may be there and are not read.
        aliases: other names of entries -> the entry's name; they may be there, with the entry's value.
    """
    under = below(variables, prefix)
    aliases = aliases or {}
    names = {entry.theirs for entry in entries}
    given = under.keys() - unused - aliases.keys()
    if given != names:
        raise ValueError(
            f"variables must hold exactly this layer's names; {_difference(variables, given, names, prefix)}"
        )
    for alias, name in aliases.items():
        if not agree(under, name, alias):
            raise ValueError(f"variables {disagreement(prefix + name, prefix + alias)}")
    parameters = dict(layer.named_parameters())
    copies: list[tuple[Tensor, Tensor]] = []
    for entry in entries:
        ours = parameters[entry.ours].detach()
        target = entry.part(ours)
        source = torch.as_tensor(under[entry.theirs])
        shape = target.flatten(0, target.dim() - ours.dim()).shape if ours.dim() else ours.shape
        if source.shape != shape:
            name = prefix + entry.theirs
            raise ValueError(f"variables[{name!r}] must be of shape {tuple(shape)}, got {tuple(source.shape)}")
        copies.append((target, source.reshape(target.shape)))
    for target, source in copies:
        target.copy_(source)


def below(variables: Mapping[str, Array | Tensor], prefix: str) -> Mapping[str, Array | Tensor]:
    """The variables whose names begin with a prefix, by the rest of their names."""
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables must be a mapping from names to arrays, got {errors.describe(variables)}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a str, got {errors.describe(prefix)}")
    if not prefix:
        return variables
    names = [name for name in variables if isinstance(name, str) and name.startswith(prefix)]
    return {name.removeprefix(prefix): variables[name] for name in names}


def _difference(variables: Mapping[str, object], given: Set[str], names: Set[str], prefix: str) -> str:
    """How the names that were given differ from those that a layer needs, and what to do."""
    first = min(names)
    tops = [name.removesuffix(first) for name in map(str, variables) if name.endswith(first)]
    elsewhere = sorted(top for top in tops if top != prefix and all(top + name in variables for name in names))
    if elsewhere:
        return f"got prefix={prefix!r}, but they are under {' and '.join(map(repr, elsewhere))}: pass that as prefix"
    missing, unknown = sorted(names - given), sorted(map(str, given - names))
    shown = [f"{names[:8]} and {len(names) - 8} more" if len(names) > 8 else str(names) for names in (missing, unknown)]
    return f"missing: {shown[0]}, unknown: {shown[1]}" + (f" (under prefix {prefix!r})" if prefix else "")


def agree(values: Mapping[str, Any], first: str, second: str) -> bool:
    """Whether two names of one parameter do not stand for different values (NaN equals NaN)."""
    if first not in values or second not in values or values[first] is values[second]:
        return True
    one, other = (torch.as_tensor(values[name]) for name in (first, second))
    if hasattr(one, "to_local") and hasattr(other, "to_local"):  # DTensor: this process's shards
        one, other = one.to_local(), other.to_local()
    if one.is_meta or other.is_meta:
        return True
    return one.shape == other.shape and torch.allclose(one, other.to(one), rtol=0, atol=0, equal_nan=True)


def disagreement(first: str, second: str) -> str:
    """Says what `agree` denies, of an argument whose name comes before."""
    return (
        f"must hold the same values under {first!r} and {second!r}, which name one parameter, got different ones: they "
        "come from a fork with a layer for each. Give a drop-in class modules of their own there, and it runs step by "
        "step"
    )


def export(layer: nn.Module, entries: list[Entry], gradients: bool) -> dict[str, Array]:
    """Every variable (or its gradient; zeros where there is none) as a fresh array in their layout."""
    parameters = dict(layer.named_parameters())
    found: dict[str, Array] = {}
    for entry in entries:
        value = parameters[entry.ours]
        if gradients:
            value = torch.zeros_like(value) if value.grad is None else value.grad  # type: ignore[assignment]
        part = entry.part(value.detach()).cpu()
        part = part.flatten(0, part.dim() - value.dim()) if value.dim() else part
        wide = part if part.dtype in (torch.float32, torch.float64) else part.float()
        found[entry.theirs] = np.array(wide.numpy(), order="C")
    return found
