"""Drop-in classes beside the stand-ins of their originals: pairs with the same weights, and what is asserted of them.

The truth of an edit is the stand-in (tests/originals.py) with the same weights and the same edit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmc_kernels.compat import l0sg, port, r2gen, textgan
from tests import originals

PORTS: dict[str, tuple[Any, Any]] = {
    "l0sg": (l0sg.RelationalMemory, originals.L0SG),
    "textgan": (textgan.RelationalMemory, originals.TextGAN),
    "r2gen": (r2gen.RelationalMemory, originals.R2Gen),
}
SIZES: dict[str, Any] = {"l0sg": (3, 4, 5, 2), "textgan": (3, 4, 5, 2), "r2gen": (3, 8, 2)}
EVERY = pytest.mark.parametrize("name", ["l0sg", "textgan", "r2gen"])


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """A drop-in and the stand-in of its original, with the same weights, in float64 and without dropout."""
    torch.manual_seed(0)
    ours, theirs = (kind(*SIZES[name], **options).double().eval() for kind in PORTS[name])
    if name != "r2gen":
        ours.return_all_outputs = theirs.return_all_outputs = True
    for value in ours.parameters():
        nn.init.normal_(value, std=0.5)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def arguments(model: Any, batch: int = 2, steps: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    spec = model.spec
    x = torch.randn(batch, steps, spec.input_size, generator=generator, dtype=torch.float64)
    memory = torch.randn(batch, spec.mem_slots, spec.mem_size, generator=generator, dtype=torch.float64)
    return x.to(dtype), memory.to(torch.promote_types(dtype, torch.float32))


def results(model: Any, x: Tensor, memory: Tensor) -> dict[str, Tensor | None]:
    """Outputs, final memory and gradients of a call, by name."""
    model.zero_grad()
    x, memory = x.clone().requires_grad_(), memory.clone().requires_grad_()
    found = model(x, memory)
    results = dict(enumerate(found if isinstance(found, tuple) else (found,)))
    losses = [
        (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum()
        for value in results.values()
    ]
    torch.stack(losses).sum().backward()
    gradients = {key: None if value.grad is None else value.grad.clone() for key, value in model.named_parameters()}
    return {
        **{f"result {key}": value.detach() for key, value in results.items()},
        **gradients,
        "x": x.grad,
        "memory": memory.grad,
    }


def agree(ours: Any, theirs: Any, like: Any = None) -> dict[str, Tensor | None]:
    x, memory = arguments(like or ours)
    found, expected = results(ours, x, memory), results(theirs, x, memory)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert found[key] is None, key
        else:
            label = f"{key}: {{}}".format
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-10, msg=label)
    return found


@contextmanager
def told(*texts: str) -> Iterator[None]:
    """Exactly one RuntimeWarning, which says that the drop-in runs step by step, why, and the price."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(each.message) for each in caught if each.category is RuntimeWarning]
    assert len(messages) == 1, messages
    assert "runs step by step" in messages[0]
    assert "times" in messages[0]
    for text in texts:
        assert text in messages[0], messages[0]


@contextmanager
def fused(monkeypatch: pytest.MonkeyPatch, calls: int) -> Iterator[None]:
    """No warning, and as many calls of the fused sequence."""
    made: list[object] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return original(*args, **kwargs)

    original = vars(port)["relational_memory"]
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(port, "relational_memory", counted)
        warnings.simplefilter("error", RuntimeWarning)
        yield
    assert len(made) == calls


def step_by_step(model: nn.Module) -> Any:
    """The model, with a hook that changes nothing on one of its modules."""
    next(part for part in model.modules() if isinstance(part, nn.Linear)).register_forward_hook(lambda *_: None)
    return model


def linears(model: nn.Module) -> list[nn.Linear]:
    return [part for part in model.modules() if isinstance(part, nn.Linear)]


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def set_module(model: nn.Module, path: str, made: Any) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, made)


def scaled_output(module: nn.Module) -> None:
    module.register_forward_hook(lambda _module, _args, output: 1.5 * output)


def residual_step(self: Any, inputs: Tensor, memory: Tensor, treat_input_as_matrix: bool = False) -> Any:
    output, following = type(self).__mro__[1].forward_step(self, inputs, memory)  # type: ignore[attr-defined]
    return output + memory.flatten(1), following + 0.1 * memory


def r2gen_step(self: Any, input: Tensor, memory: Tensor) -> Tensor:
    following = type(self).__mro__[1].forward_step(self, input.tanh(), memory)  # type: ignore[attr-defined]
    return following + memory.reshape_as(following)  # type: ignore[no-any-return]
