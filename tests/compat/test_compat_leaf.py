"""Drop-in classes are to torch.fx and torch.jit what the layer is, and explain the same calls."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmc_kernels.compat import l0sg, r2gen, textgan

EVERY_CLASS = pytest.mark.parametrize(
    "make",
    [
        lambda: l0sg.RelationalMemory(3, 4, 8, 2, return_all_outputs=True),
        lambda: textgan.RelationalMemory(3, 4, 8, 2, return_all_outputs=True),
        lambda: r2gen.RelationalMemory(3, 8, 2).eval(),
    ],
    ids=["l0sg", "textgan", "r2gen"],
)


class Model(nn.Module):
    """What users build around a drop-in class."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.embedding, self.core = nn.Linear(5, 8), core

    def forward(self, x, memory):  # type: ignore[no-untyped-def]  # torch.fx cannot pickle annotations that are text
        return self.core(self.embedding(x), memory=memory)


@EVERY_CLASS
def test_a_leaf_of_torch_fx(make: Any) -> None:
    torch.manual_seed(0)
    model, x, memory = Model(make()), torch.randn(2, 4, 5), torch.randn(2, 3, 8)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["embedding", "core"]
    expected = model(x, memory)
    for graph in (traced, pickle.loads(pickle.dumps(traced))):
        found = graph(x, memory)
        for ours, theirs in zip(_tensors(found), _tensors(expected), strict=True):
            assert torch.equal(ours, theirs)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


@EVERY_CLASS
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripting_names_what_works(make: Any) -> None:
    for module in (make(), Model(make())):
        with pytest.raises(TypeError, match=r"cannot compile RelationalMemory; use torch\.compile, torch\.export"):
            torch.jit.script(module)


@EVERY_CLASS
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hx", "pass memory, one tensor"),
        ("mask", r"rmc_kernels\.RelationalMemory takes lengths, \[B\]"),
        ("dones", r"rmc_kernels\.RelationalMemory takes resets"),
        ("src", "pass the input by position"),
    ],
)
def test_arguments_of_others_say_what_to_do_instead(make: Any, name: str, message: str) -> None:
    core, x, memory = make(), torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    for arguments in ((x,), (x, memory)):
        with pytest.raises(TypeError, match=f"^RelationalMemory has no argument '{name}'; {message}"):
            core(*arguments, **{name: memory})


@EVERY_CLASS
def test_messages_do_not_show_contents(make: Any) -> None:
    core, x, secret = make(), torch.randn(2, 4, 8), torch.full((2, 3, 8), 7654321.0)
    for memory in ((secret, secret), [secret], {"memory": secret}, secret.numpy(), secret[..., 1:]):
        with pytest.raises((TypeError, ValueError), match=r"^memory ") as raised:
            core(x, memory)
        assert "7654321" not in str(raised.value)
