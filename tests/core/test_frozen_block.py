"""A block of frozen weights: its end, changed parameters, nesting, threads, and freed memory."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from rmc_kernels import RelationalMemoryCell
from rmc_kernels.backends import cpu, weights
from rmc_kernels.frozen import FrozenCell
from rmc_kernels.initial import MEMORY_MODES
from tests.cases import SPECS
from tests.steps import (
    EVERY_BACKEND,
    NATIVE,
    NEEDS_CPU,
    Made,
    Model,
    ordinary,
    pair,
    same,
    steps_alike,
    takes_the_ordinary_way,
    tensors,
)


@EVERY_BACKEND
@pytest.mark.parametrize("head", ["concat", "mean"])
def test_the_end_of_the_block(head: str, backend: str) -> None:
    cell = RelationalMemoryCell(6, 3, 8, 2, backend=backend, read_head=head)
    x = torch.randn(2, 6)
    with cell.frozen_weights() as frozen:
        step = frozen.step
        step(x)
    for call in (frozen.step, step):
        for rows in (x, x[:0], None):
            with pytest.raises(RuntimeError, match=r"^step must be called inside the block of frozen_weights\(\)$"):
                call(rows)  # type: ignore[arg-type]
    with pytest.raises(KeyError), cell.frozen_weights() as frozen:
        raise KeyError
    with pytest.raises(RuntimeError, match="inside the block"):
        frozen.step(x)
    manager = cell.frozen_weights()
    frozen = manager.__enter__()
    frozen.step(x)
    del manager  # as where a generator that holds it is dropped
    with pytest.raises(RuntimeError, match="inside the block"):
        frozen.step(x)
    assert weights.frozen_blocks == ()


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda cell: cell.mlp._modules["0"].bias.add_(1),
    "memory swapped": lambda cell: setattr(cell.mlp._modules["0"].weight, "data", torch.randn(16, 16)),
    "dtype": lambda cell: cell.bfloat16(),
    "loaded": lambda cell: cell.load_state_dict({key: value + 1 for key, value in cell.state_dict().items()}),
    "optimizer": lambda cell: torch.optim.SGD([_with_gradient(cell.mlp._modules["1"].weight)], 0.1).step(),
    "learned memory": lambda cell: cell.learned_memory.mul_(2),
    "read head": lambda cell: cell.read_head.weight.add_(1),
    "pruned": lambda cell: cell.mlp._modules["0"].weight_orig.add_(1),
    "parametrized": lambda cell: cell.mlp._modules["1"].parametrizations.weight.original0.mul_(2),
}


def _with_gradient(parameter: Tensor) -> Tensor:
    parameter.grad = torch.ones_like(parameter)
    return parameter


def changeable(change: str, backend: str) -> Any:
    cell: Any = RelationalMemoryCell(6, 3, 8, 2, backend=backend, initial_memory="learned", read_head="weighted").eval()
    if change == "pruned":
        prune.l1_unstructured(cell.mlp._modules["0"], "weight", 0.5)
    if change == "parametrized":
        parametrizations.weight_norm(cell.mlp._modules["1"])
    return cell


@EVERY_BACKEND
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_parameter_raises_when_the_block_is_left(change: str, backend: str) -> None:
    cell, x = changeable(change, backend), torch.randn(2, 6)
    with pytest.raises(RuntimeError, match=r"^a parameter was changed inside frozen_weights\(\); leave the block"):  # noqa: SIM117, PT012
        with torch.no_grad(), cell.frozen_weights() as frozen:
            frozen.step(x)
            CHANGES[change](cell)
    with pytest.raises(RuntimeError, match="inside the block"):
        frozen.step(x)
    assert weights.frozen_blocks == ()
    with cell.frozen_weights() as frozen:  # a new one reads the parameters as they are now
        rows = x.to(cell.input_gate.weight.dtype)
        same(frozen.step(rows), ordinary(cell, rows, None, None))


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_another_exception_is_not_replaced(error: type[BaseException]) -> None:
    cell = changeable("in place", "auto")
    with pytest.raises(error) as raised, torch.no_grad(), cell.frozen_weights():  # noqa: PT012
        CHANGES["in place"](cell)
        raise error("own")
    assert raised.value.__context__ is None
    assert weights.frozen_blocks == ()


@NEEDS_CPU
def test_a_changed_parameter_raises_at_the_next_call_of_the_layer_and_of_a_nested_block() -> None:
    layer, cell = pair(backend="cpu")
    for model in (layer, cell):
        x, memory, _ = tensors(model, 2)
        want = ordinary(model, x, memory, None)
        with pytest.raises(RuntimeError, match="changed inside frozen_weights"), model.frozen_weights() as frozen:  # noqa: PT012
            same(ordinary(model, x, memory, None), want)
            with torch.no_grad():
                model.mlp._modules["0"].bias.add_(1)  # type: ignore[union-attr, operator]
            for _ in range(2):
                with pytest.raises(RuntimeError, match="changed inside frozen_weights"):
                    ordinary(model, x, memory, None)
                with pytest.raises(RuntimeError, match="changed inside frozen_weights"):
                    model.frozen_weights().__enter__()
            same(frozen.step(x, memory), want)  # not looked at here: it has packed weights
        assert weights.frozen_blocks == ()


@EVERY_BACKEND
def test_nested_blocks(backend: str) -> None:
    layer, cell = pair(backend=backend)
    x, memory, resets = tensors(layer, 3)
    want = ordinary(layer, x, memory, resets)
    with layer.frozen_weights() as outer, cell.frozen_weights() as other:
        with layer.frozen_weights() as inner:
            for frozen in (outer, inner, other):
                same(frozen.step(x, memory, resets=resets), want)
        with pytest.raises(RuntimeError, match="inside the block"):
            inner.step(x)
        for frozen in (outer, other):
            same(frozen.step(x, memory, resets=resets), want)
        same(ordinary(layer, x, memory, resets), want)


@EVERY_BACKEND
def test_a_replaced_parameter_counts_for_calls_of_the_layer_only(backend: str) -> None:
    layer, cell = pair("sonnet", backend=backend)
    x, memory, _ = tensors(cell, 3)
    before = ordinary(cell, x, memory, None)
    replacements: list[Callable[[Any], object]] = [
        lambda model: setattr(model.blocks._modules["0"].qkv, "weight", nn.Parameter(torch.randn(24, 8))),
        lambda model: model.mlp._modules.update({"0": copy.deepcopy(model.mlp._modules["1"])}),
        lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True),
        lambda model: setattr(model, "read_head", nn.Identity()),
        lambda model: setattr(model, "spec", SPECS["no-gate"]),
    ]
    for change in replacements:
        for model in (copy.deepcopy(layer), copy.deepcopy(cell)):
            with model.frozen_weights() as frozen:
                if change is replacements[0]:
                    assert model.blocks._modules["0"].qkv.weight.shape == (24, 8)  # type: ignore[union-attr]
                if change is replacements[-1]:
                    for name in ("input_gate", "memory_gate"):
                        delattr(model, name)
                    model._owners = {path: leaves for path, leaves in model._owners.items() if "gate" not in path[0]}
                change(model)
                same(frozen.step(x, memory), before)
                after = ordinary(model, x, memory, None)
            assert after[0].shape != before[0].shape or not torch.equal(after[0], before[0])


def in_the_middle(monkeypatch: pytest.MonkeyPatch, block: Callable[[], None]) -> list[Made | BaseException]:
    """Steps of a bfloat16 cell in two threads, both stopped where they widen x while `block` runs here."""
    cell = RelationalMemoryCell(6, 3, 8, 2, backend="cpu", dtype=torch.bfloat16)
    x, memory, resets = tensors(cell, 4)
    want = ordinary(cell, x, memory, resets)
    inside, go_on = threading.Barrier(3), threading.Event()
    found: list[Made | BaseException] = []
    widen = Tensor.float

    def wait(tensor: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            inside.wait(20)
            assert go_on.wait(20)
        return widen(tensor)

    def step(frozen: FrozenCell) -> None:
        try:
            found.append(frozen.step(x, memory, resets=resets))
        except BaseException as error:
            found.append(error)

    with cell.frozen_weights() as frozen:
        monkeypatch.setattr(Tensor, "float", wait)
        threads = [threading.Thread(target=step, args=(frozen,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        inside.wait(20)
    with pytest.raises(RuntimeError, match="inside the block"):
        frozen.step(x)
    del frozen
    gc.collect()
    block()
    go_on.set()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    for each in found:
        assert not isinstance(each, BaseException), each
        same(each, want)
    return found


@NATIVE
def test_a_block_that_is_left_during_a_step_ends_with_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither thread has packed the weights yet."""
    assert len(in_the_middle(monkeypatch, lambda: None)) == 2


@EVERY_BACKEND
def test_threads_step_while_one_leaves_the_block(backend: str) -> None:
    torch.manual_seed(0)
    _, cell = pair("odd", backend=backend)
    small, large = (tensors(cell, batch) for batch in (2, 20))
    wants = [ordinary(cell, *each) for each in (small, large)]
    failures: list[BaseException] = []
    ended = 0

    def work(frozen: FrozenCell, started: threading.Barrier) -> None:
        nonlocal ended
        started.wait(20)
        try:
            while True:
                for (x, memory, resets), want in zip((small, large), wants, strict=True):
                    same(frozen.step(x, memory, resets=resets), want)
        except RuntimeError as error:
            ended += "inside the block" in str(error)
        except BaseException as error:
            failures.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(5):
            started = threading.Barrier(4)
            with cell.frozen_weights() as frozen:
                threads = [threading.Thread(target=work, args=(frozen, started)) for _ in range(3)]
                for thread in threads:
                    thread.start()
                started.wait(20)
                for _ in range(3):
                    same(frozen.step(*small[:2], resets=small[2]), wants[0])
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures, failures[0]
    assert ended == 15


@NEEDS_CPU
def test_two_threads_that_pack_at_once_share_what_was_packed_first() -> None:
    """What the other one packed would be freed while its kernel reads it."""
    both_inside, found = threading.Barrier(2), []

    class Native:
        def pack(self, *_: object) -> object:
            both_inside.wait(20)
            return object()

    block, native = weights.FrozenWeights([torch.zeros(1)], ()), Native()
    threads = [threading.Thread(target=lambda: found.append(block.packed(native, False))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]


def test_a_frozen_cell_is_not_copied_but_its_layer_is() -> None:
    layer, cell = pair()
    for model in (layer, cell):
        x, memory, resets = tensors(model, 2)
        want = ordinary(model, x, memory, resets)

        def copies(model: Model = model, want: Made = want, given: tuple[Any, ...] = (x, memory, resets)) -> None:
            for made in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
                same(ordinary(made, *given), want)
                with made.frozen_weights() as other:
                    same(other.step(*given[:2], resets=given[2]), want)

        with model.frozen_weights() as frozen:
            for made in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match=r"^a FrozenCell cannot be pickled or copied"):
                    made(frozen)
            copies()
            frozen.step(x, memory)
            copies()
            same(frozen.step(x, memory, resets=resets), want)
        copies()


@EVERY_BACKEND
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_entering_and_leaving_draws_no_random_numbers(mode: str, backend: str) -> None:
    cell = RelationalMemoryCell(6, 3, 8, 2, backend=backend, initial_memory=mode)
    x, memory, resets = tensors(cell, 3)
    before = torch.get_rng_state()
    with cell.frozen_weights() as frozen:
        assert torch.equal(torch.get_rng_state(), before)
        frozen.step(x, memory)
        assert torch.equal(torch.get_rng_state(), before)
        outputs = [frozen.step(x)[0], frozen.step(x, memory, resets=resets)[0], frozen.step(x)[0]]
        assert torch.equal(torch.get_rng_state(), before) == (mode != "normal")
        assert torch.equal(outputs[0], outputs[2]) == (mode != "normal")
        after = torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), after)


@EVERY_BACKEND
@pytest.mark.parametrize("head", ["concat", "mean"])
def test_blocks_leave_nothing_behind(head: str, backend: str) -> None:
    """No collector runs: nothing is kept by a cycle either."""
    cell, x = RelationalMemoryCell(6, 3, 8, 2, backend=backend, read_head=head), torch.randn(2, 6)
    seen: list[weakref.ref[Any]] = []
    gc.collect()
    gc.disable()
    try:
        for number in range(2000):
            with cell.frozen_weights() as frozen:
                if number % 20 == 0:
                    frozen.step(x)
            seen.append(weakref.ref(frozen))
        del frozen
        assert [ref for ref in seen if ref() is not None] == []
    finally:
        gc.enable()
    assert weights.frozen_blocks == ()
    held = weakref.ref(cell)
    with cell.frozen_weights() as frozen:
        frozen.step(x)
    del cell
    gc.collect()
    assert held() is not None  # a closed one may hold the layer
    del frozen
    gc.collect()
    assert held() is None


def test_packed_weights_are_freed() -> None:
    cell, x = RelationalMemoryCell(6, 3, 8, 2), torch.randn(2, 6)
    with cell.frozen_weights() as frozen:
        frozen.step(x)
        (block,) = weights.frozen_blocks
        seen = weakref.ref(block)
        del block
    assert seen() is None
    assert frozen is not None


@NEEDS_CPU
def test_a_torch_that_does_not_tell_c_how_tensors_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_TENSORS", None)
    for name, head in (("sonnet", "concat"), ("matrix", "mean"), ("l0sg", "concat")):
        layer, cell = pair(name, backend="cpu", read_head=head)
        with layer.frozen_weights() as frozen:
            assert takes_the_ordinary_way(frozen)
        steps_alike(layer, cell, 4)
