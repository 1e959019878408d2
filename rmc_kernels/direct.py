"""Whether a call of a module is one of its `forward` and no more: what `nn.Module.__call__` looks at."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as modules

from rmc_kernels.backends import Attribute, Place

_OWN = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_ALL = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
#: Attributes of an instance that take the place of its class's.
_REPLACEMENTS = ("forward", "_compiled_call_impl")
#: What a call of a module goes through; torch.fx and profilers put their own in these places for a while.
_OF_MODULES: tuple[Attribute, ...] = tuple(
    (nn.Module, name, vars(nn.Module)[name]) for name in ("__call__", "_wrapped_call_impl", "_call_impl")
)


class Direct(NamedTuple):
    """What stays as it is as long as calls are direct.

    Attributes:
        places: as in `Surroundings`.
        attributes, empty: likewise.
    """

    places: tuple[Place, ...]
    attributes: tuple[Attribute, ...]
    empty: tuple[dict[Any, Any], ...]


def direct(module: nn.Module) -> Direct | None:
    """What direct calls of a module rely on; None where they are not."""
    own = vars(module)
    empty = (*(own[name] for name in _OWN), *(getattr(modules, name) for name in _OF_ALL))
    if any(empty) or any(own.get(name) is not None for name in _REPLACEMENTS):
        return None
    if any(vars(owner)[name] is not value for owner, name, value in _OF_MODULES):
        return None
    hooks = [(own, name, own[name]) for name in _OWN]
    replaced = [(own, name, own[name]) if name in own else (own, name) for name in _REPLACEMENTS]
    return Direct((*hooks, *replaced), _OF_MODULES, empty)
