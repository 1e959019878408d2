"""Calls that leave out `nn.Module.__call__` and `forward` do so only where those would do nothing more."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmc_kernels import ReadHead, RelationalMemory, RelationalMemoryCell
from tests.core.test_step_mode import changed_cell_counts, only_bound, pytestmark, same, small_cell

assert pytestmark  # pytest reads it: the same needs


class DoubledCell(RelationalMemoryCell):
    def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, state = super().forward(x, memory)
        return 2 * output, state


#: Of the cell itself.
CELL_CHANGES: list[Callable[[Any], Any]] = [
    lambda cell: setattr(cell, "forward", lambda x, memory: (x, memory)),
    lambda cell: setattr(cell, "_compiled_call_impl", lambda x, memory: (x, memory)),
    lambda cell: cell.register_forward_hook(lambda _, given, out: (out[0] + 1, out[1])),
    lambda cell: cell.register_forward_pre_hook(lambda _, given: (given[0] + 1, given[1])),
    lambda cell: nn.modules.module.register_module_forward_pre_hook(
        lambda m, given: (given[0] + 1, given[1]) if m is cell else None  # type: ignore[arg-type]
    ),
    lambda cell: setattr(cell, "_forward_hooks", OrderedDict({0: lambda m, _, out: (out[0] + 1, out[1])})),
    lambda cell: setattr(cell, "__class__", DoubledCell),
]


@pytest.mark.parametrize("change", CELL_CHANGES)
def test_a_changed_cell_counts(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    changed_cell_counts(change, monkeypatch)


def test_a_subclass_has_arguments_of_its_own() -> None:
    class Own(RelationalMemoryCell):
        def forward(self, *, state: Tensor, scale: float, row: Tensor) -> Any:  # type: ignore[override]
            return super().forward(row * scale, state)

    cell = Own(6, 3, 8, 2, backend="cpu").eval()
    x, memory = torch.randn(2, 6), torch.randn(2, 3, 16)
    with torch.no_grad():
        found = [cell(row=x, scale=2.0, state=memory) for _ in range(3)]
        for each in found:
            same(each, RelationalMemoryCell.forward(cell, 2 * x, memory))


def test_a_forward_that_is_put_into_the_class_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for cell, x in ((small_cell()[0], torch.randn(2, 6)), (RelationalMemory(6, 3, 8, 2).eval(), torch.randn(2, 1, 6))):
        memory = torch.randn(2, 3, 16)
        with torch.no_grad(), monkeypatch.context() as patch:
            cell(x, memory)
            patch.setattr(type(cell), "forward", lambda self, x, memory: (x, memory))
            assert cell(x, memory) == (x, memory)


def test_a_forward_below_a_class_with_a_call_of_its_own_runs() -> None:
    class Logged(DoubledCell):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    cell, x, memory = Logged(6, 3, 8, 2, backend="cpu").eval(), torch.randn(2, 6), torch.randn(2, 3, 16)
    with torch.no_grad():
        first = cell(x, memory)
        for _ in range(2):
            same(cell(x, memory), first)


@pytest.mark.parametrize("name", ["__call__", "_call_impl", "_wrapped_call_impl"])
def test_what_is_put_into_every_module_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.fx does while it traces."""
    inner, seen = getattr(nn.Module, name), []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return inner(self, *args, **kwargs)

    cell, x, memory = small_cell()
    with torch.no_grad():
        want = cell(x, memory)
        monkeypatch.setattr(nn.Module, name, call)
        found = [cell(x, memory) for _ in range(3)]
        monkeypatch.undo()
        for each in (*found, cell(x, memory)):
            same(each, want)
    if name != "_wrapped_call_impl":  # which nothing calls by its name
        assert seen.count(cell) == seen.count(cell.read_head) == 3


@pytest.mark.parametrize("owner", [ReadHead, RelationalMemoryCell])
def test_a_forward_that_wraps_the_class_s_runs_at_each_call(owner: type, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, seen = owner.forward, []  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any) -> Any:
        seen.append(args)
        return inner(self, *args)

    cell, x, memory = small_cell()
    monkeypatch.setattr(owner, "forward", forward)
    with torch.no_grad():
        for _ in range(4):
            cell(x, memory)
    assert len(seen) == 4


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_the_layer_run(register: str) -> None:
    layer, seen = RelationalMemory(6, 3, 8, 2, backend="cpu"), []
    x, memory = torch.randn(2, 1, 6, requires_grad=True), torch.randn(2, 3, 16)
    with torch.no_grad():
        layer(x, memory)
    getattr(layer, register)(lambda *args: seen.append(args))
    layer(x, memory)[0].sum().backward()
    assert len(seen) == 1


def test_a_hooked_cell_keeps_the_short_way_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell()
    cell.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        cell(x, memory)
        with only_bound(monkeypatch):
            cell(x, memory)
