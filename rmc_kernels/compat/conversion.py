"""A drop-in from a living module of its original's class: weights copied, and both compared on random inputs."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rmc_kernels import backends, errors
from rmc_kernels.compat.port import Port, qualified, recomputes_weight, refuse_quantized
from rmc_kernels.module import weight

#: Of the largest value, at least 1: rounding in float64 stays under 1e-12, and eps=1e-6 in place of 1e-5 makes 1e-6.
_TOLERANCE = 1e-9
_BATCH, _STEPS = 2, 3
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

P = TypeVar("P", bound=Port)


def convert(original: nn.Module, drop_in: type[P], backend: str) -> P:
    """A module of a drop-in class with the weights of `original`, once both have computed the same.

    The `from_module` of each drop-in class documents arguments and errors.
    """
    errors.one_of("backend", backend, backends.CHOICES)
    if not isinstance(original, nn.Module):
        raise TypeError(f"original must be a module of the original's class, got {errors.describe(original)}")
    refuse_quantized(original, "original")
    twin = _copied(original).eval()
    with torch.device("meta"):
        made = drop_in._made_like(twin, backend)
    _take_weights(made, twin)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(_requires_grad(original, name))
    theirs = dict(original.named_modules(remove_duplicate=False))
    for path, module in made.named_modules():
        module.training = theirs.get(path, original).training
    left = sorted(_left_behind(original, made))
    if left:
        warnings.warn(f"from_module leaves behind {', '.join(left)}", RuntimeWarning, stacklevel=3)
    exact = copy.deepcopy(made).double().eval()
    _take_weights(exact, twin.double())  # weights that are computed, as by weight_norm, are not rounded either
    _compare(twin, exact)
    return made


def _copied(original: nn.Module) -> nn.Module:
    """A deep copy without hooks, but for those that only recompute a weight."""
    memo: dict[int, Any] = {}
    for module in original.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # kept from the last call; torch copies none
                memo[id(value)] = value.detach().clone()
        for name in _HOOKS:
            hooks = getattr(module, name)
            memo[id(hooks)] = OrderedDict((key, hook) for key, hook in hooks.items() if recomputes_weight(hook))
    try:
        return copy.deepcopy(original, memo)
    except Exception as error:
        raise ValueError(f"original must allow copy.deepcopy, which raised {errors.in_short(error)}") from error


def _take_weights(made: Port, twin: nn.Module) -> None:
    """Give a drop-in copies of the twin's weights, in their dtypes and on their devices."""
    with torch.no_grad():
        values = {name: _value(twin, name, like) for name, like in made.state_dict().items()}
    made.load_state_dict(values, assign=True)


def _value(twin: nn.Module, name: str, like: Tensor) -> Tensor:
    """A fresh copy of the weight of this name, as a call of its module would use it."""
    path, _, leaf = name.rpartition(".")
    try:
        value = weight(twin.get_submodule(path), leaf)
    except AttributeError:
        value = None
    if not isinstance(value, Tensor) or value.shape != like.shape or value.is_meta:
        raise ValueError(f"original.{name} must be a tensor of shape {tuple(like.shape)}, got {errors.describe(value)}")
    return value.detach().clone()


def _requires_grad(original: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    owner = original.get_submodule(path)
    own = owner._parameters.get(leaf)
    return any(value.requires_grad for value in (owner.parameters() if own is None else [own]))


def _left_behind(original: nn.Module, made: nn.Module) -> Iterator[str]:
    """What of the original has no place in the drop-in."""
    known = dict(made.named_modules(remove_duplicate=False))
    for path, module in original.named_modules(remove_duplicate=False):
        if path in known:
            tensors = {**module._parameters, **module._buffers}
            for name in tensors.keys() - known[path]._parameters.keys():
                yield f"{path}.{name}".removeprefix(".")
            if any(not recomputes_weight(hook) for name in _HOOKS for hook in getattr(module, name).values()):
                yield f"the hooks of {path or 'the module itself'}"
        elif path.rpartition(".")[0] in known:
            yield f"{path} (a {qualified(type(module))})"


def _compare(theirs: nn.Module, ours: Port) -> None:
    """Raise ValueError where two float64 modules compute different things in evaluation mode; warn where in training.

    Both are copies that nobody else has.
    """
    place = qualified(type(ours))
    device = next(ours.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        method, difference = _largest_difference(theirs, ours, device)
        if difference > _TOLERANCE:
            raise ValueError(
                f"original must compute what {place} computes, but {method} differs by {difference:.3g} (in float64, "
                "in evaluation mode, relative to the largest value where that is above 1). Make its class a subclass "
                f"of {place} that overrides the methods which differ: it then runs step by step"
            )
        parts = dict(theirs.named_modules())
        for path, module in ours.named_modules():
            if isinstance(module, nn.Dropout):  # draws
                module.p = 0.0
                if path in parts:
                    parts[path].p = 0.0
        method, difference = _largest_difference(theirs.train(), ours.train(), device)
    if difference > _TOLERANCE:
        warnings.warn(
            f"from_module takes over what the original computes in evaluation mode; in training {method} differs by "
            f"{difference:.3g}",
            RuntimeWarning,
            stacklevel=4,
        )


def _largest_difference(theirs: nn.Module, ours: Port, device: torch.device) -> tuple[str, float]:
    """The method of which results differ most, on random arguments, and by how much."""
    generator = torch.Generator().manual_seed(0)
    spec = ours.spec

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    calls: list[tuple[str, tuple[Any, ...]]] = []
    for scale in (0.3, 1.0, 3.0):  # eps counts where values are small, softmax and tanh where they are large
        x = scale * draw(_BATCH, _STEPS, spec.input_size)
        memory = scale * draw(_BATCH, spec.mem_slots, spec.mem_size)
        calls += [("forward", (x, memory)), ("forward_step", (x[:, 0], memory))]
    calls += [("initial_state", (_BATCH,)), ("init_memory", (_BATCH,))]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return max(
            (
                (name, _difference(theirs, ours, name, arguments))
                for name, arguments in calls
                if hasattr(ours, name) and hasattr(theirs, name)
            ),
            key=lambda found: found[1],
        )


def _difference(theirs: nn.Module, ours: Port, method: str, arguments: tuple[Any, ...]) -> float:
    """The largest between two results of a method, relative to the largest value where that is above 1."""
    try:
        results = _tensors(getattr(theirs, method)(*arguments))
    except Exception as error:
        raise ValueError(
            f"original.{method} must run as in the original's class, it raised {errors.in_short(error)}"
        ) from error
    expected = _tensors(getattr(ours, method)(*arguments))
    shapes, like = [tuple(result.shape) for result in results], [tuple(result.shape) for result in expected]
    if shapes != like:
        raise ValueError(
            f"original.{method} must return tensors of shapes {like}, as {qualified(type(ours))} does, got {shapes}"
        )
    differences = [
        float((result.to(value) - value).abs().max() / value.abs().max().clamp(min=1))
        for result, value in zip(results, expected, strict=True)
    ]
    return max(inf if difference != difference else difference for difference in differences)


def _tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in _tensors(part)]
    return [result] if isinstance(result, Tensor) else []
