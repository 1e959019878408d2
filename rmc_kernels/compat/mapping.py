"""Moves parameters between a layer and another implementation's names and layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import NamedTuple

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
        raise TypeError(f"layer takes a RelationalMemory or RelationalMemoryCell, got {errors.describe(layer)}")
    if layer.spec.variant != variant:
        raise ValueError(f"layer takes a layer of the {variant} variant, got one of {layer.spec.variant}")
    return layer.spec


def load(
    layer: nn.Module,
    entries: list[Entry],
    variables: Mapping[str, Array | Tensor],
    ignored: Set[str] = frozenset(),
) -> None:
    """Copy every variable into its parameter; names and shapes are checked before anything is written."""
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables takes a mapping from names to arrays, got {errors.describe(variables)}")
    names = {entry.theirs for entry in entries}
    given = variables.keys() - ignored
    if given != names:
        missing, unknown = sorted(names - given), sorted(map(str, given - names))
        raise ValueError(f"variables takes exactly this layer's names; missing: {missing}, unknown: {unknown}")
    parameters = dict(layer.named_parameters())
    copies: list[tuple[Tensor, Tensor]] = []
    for entry in entries:
        ours = parameters[entry.ours].detach()
        target = entry.part(ours)
        source = torch.as_tensor(variables[entry.theirs])
        shape = target.flatten(0, target.dim() - ours.dim()).shape if ours.dim() else ours.shape
        if source.shape != shape:
            raise ValueError(f"variables[{entry.theirs!r}] takes shape {tuple(shape)}, got {tuple(source.shape)}")
        copies.append((target, source.reshape(target.shape)))
    for target, source in copies:
        target.copy_(source)


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
