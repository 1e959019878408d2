"""Inference on the CPU with a layer's parameters bound once: what a step pays besides the C++ call.

The ordinary way checks every argument and looks up every parameter at each call, in Python. Here both were checked when
they were bound, what may have changed since is compared in C++, and anything unusual is left to the ordinary way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rmc_kernels.backends import cpu, weights
from rmc_kernels.backends.plain import PLAIN_TYPES, UNWATCHED, is_plain, is_watched
from rmc_kernels.backends.protocol import HALF_TYPES
from rmc_kernels.spec import CellSpec

#: (dictionary, key, value): where a module or a parameter was found; (dictionary, key): where nothing was.
Place = tuple[dict[str, Any], str, Any] | tuple[dict[str, Any], str]
#: (type, name, value): what the name is in a type.
Attribute = tuple[type, str, object]
#: torch's table of C functions that tell a tensor's address and layout; torch has it from 2.10 on.
_TENSORS = getattr(Tensor, "__dlpack_c_exchange_api__", None)
#: No autocast of any device: a third of the time of `torch.is_autocast_enabled("cpu")`, 0.3 us of a step.
_NO_AUTOCAST = (torch._C._is_any_autocast_enabled, False)
#: No mode that is shown each function of torch: it would be shown those that are asked about every parameter.
_NO_MODE = (torch._C._len_torch_function_stack, 0)
#: (function, answer) where nothing but values is wanted.
_INFERENCE = ((torch.is_grad_enabled, False), _NO_AUTOCAST, _NO_MODE, *UNWATCHED)
#: The value of `forward_ad._current_level` outside of forward-mode differentiation.
_NO_LEVEL = -1


class Surroundings(NamedTuple):
    """What a layer's calls rely on; where it changes, a call takes the ordinary way and the layer is bound anew.

    Attributes:
        owner: the layer; a copy of it is another.
        places: where every module, parameter and option was found.
        types: (object, its very type).
        attributes: of those and other types.
        empty: dictionaries that hold nothing.
        flat: whether the output is the memories with their last two axes flattened.
        direct: whether a call of the layer is one of its `forward` and no more, and `flat`; the rest sees to that.
    """

    owner: object
    places: tuple[Place, ...]
    types: tuple[tuple[object, type], ...]
    attributes: tuple[Attribute, ...]
    empty: tuple[dict[Any, Any], ...]
    flat: bool
    direct: bool


class BoundLayer:
    """The parameters of a layer that the C++ backend serves, and all that a call relies on. Made by `bind`.

    Attributes:
        flat, direct: see `Surroundings`.
        step: (owner, x, memory, sequence) -> the memories, [B, T, N, D] for x [B, T, I] if `sequence`, else [B, N, D]
            for x [B, I], x with a row axis before I in matrix mode, or where `flat` the output in x's dtype; and the
            final memory. Each has memory of its own. None where the ordinary way is to serve or refuse the call. It
            does not ask whether torch.compile is tracing.
    """

    def __init__(self, backend: cpu.CpuBackend, spec: CellSpec, params: Sequence[Tensor], around: Surroundings) -> None:
        self._borrowed: dict[str, object] = {
            "api": _TENSORS,
            "owner": around.owner,
            "params": tuple(params),
            "places": (
                *around.places,
                *((vars(cpu), name, getattr(cpu, name)) for name in ("forced_isa", "allow_amx_split")),
                (vars(forward_ad), "_current_level", _NO_LEVEL),
            ),
            "empty": around.empty,
            "questions": _INFERENCE,
            "types": around.types,
            "attributes": around.attributes,
            "plain_types": tuple(PLAIN_TYPES),
            "cells": tuple(cpu.cell(spec, *kernels) for kernels in backend.kernels(params[0].dtype)),
            "large": cpu.AMX_ROWS,
            "matrix": spec.input_rows is not None,
            "flat": around.flat,
            "version": inspect.getattr_static(Tensor, "_version"),
            "is_neg": inspect.getattr_static(Tensor, "is_neg"),
            "data_ptr": inspect.getattr_static(Tensor, "data_ptr"),
            "change": (vars(weights), "change"),
            "look": partial(_frozen, tuple(params)),
            "get_num_threads": torch.get_num_threads,
        }
        self.flat, self.direct = around.flat, around.direct
        self.step = cpu.bound_step(self._borrowed)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # copies bind anew


def _frozen(params: tuple[Tensor, ...]) -> tuple[object, Callable[[Any], Any] | None, tuple[int | None, ...] | None]:
    """`weights.change`; how the open block of these parameters packs, and its versions."""
    change, block = weights.change, weights.frozen_block(params)  # in this order: see `change`
    return (change, None, None) if block is None else (change, partial(block.packed, backward=False), block.versions)


def bind(backend: cpu.CpuBackend, spec: CellSpec, params: Sequence[Tensor], around: Surroundings) -> BoundLayer | None:
    """The parameters of a layer, bound.

    Args:
        backend: what served a call of the layer.
        spec: the cell.
        params: in the order of `spec.parameter_names`, as they served a call of the C++ backend.
        around: what else a call of the layer relies on.

    Returns:
        None where this torch does not tell C how tensors lie, or where they do not lie as the C++ code reads them.
    """
    if _TENSORS is None or not is_plain(*params) or any(map(Tensor.is_neg, params)):
        return None
    if params[0].dtype in HALF_TYPES and weights.frozen_block(params) is None:
        return None  # C++ reads packed weights or float32
    try:
        return BoundLayer(backend, spec, params, around)
    except ValueError:
        return None


def is_inference() -> bool:
    """Whether nothing but values is wanted of a call made here."""
    answers = all(function() is answer for function, answer in _INFERENCE)
    return answers and forward_ad._current_level == _NO_LEVEL and not is_watched()
