"""What a bound layer holds and reads: one dtype, live memory, frozen weights of one block for a whole call."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rmc_kernels import CellSpec, RelationalMemory, RelationalMemoryCell
from rmc_kernels.backends import weights
from tests.core.test_step_mode import only_bound, ordinary, pytestmark, same, small_cell

assert pytestmark  # pytest reads it: the same needs


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gate_biases_of_another_dtype(dtype: torch.dtype, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one kind of parameter that may differ from the others in dtype."""
    cell = RelationalMemoryCell.from_spec(CellSpec.l0sg(3, 8, 6, 2), backend="cpu").eval()
    for name in ("forget_bias", "input_bias"):
        setattr(cell, name, nn.Parameter(torch.tensor(0.7, dtype=dtype)))
    x, memory = torch.randn(2, 6), torch.randn(2, 3, 16)
    with torch.no_grad():
        want = ordinary(monkeypatch, lambda: cell(x, memory))
        if frozen:
            with cell.frozen_weights():
                for _ in range(3):
                    same(cell(x, memory), want)
        for _ in range(3):
            same(cell(x, memory), want)


def test_packed_weights_of_a_bias_of_another_dtype() -> None:
    """A block of them is packed for whoever asks, in the arithmetic of the first."""
    params = (torch.randn(3, 4), torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.bfloat16))
    assert {read.dtype for read in weights.readable(params)} == {torch.float32}
    assert weights.readable(params)[0] is params[0]


def test_a_block_that_closes_during_a_call_ends_with_that_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread is stopped where it widens x, in the middle of a call."""
    cell, x, memory = small_cell(dtype=torch.bfloat16)
    inside, go_on, found = threading.Event(), threading.Event(), []
    widen = Tensor.float

    def wait(tensor: Tensor) -> Tensor:
        inside.set()
        assert go_on.wait(20)
        return widen(tensor)

    with torch.no_grad():
        with cell.frozen_weights():
            cell(x, memory)
            want = cell(x, memory)
            bound = cell._bound
            assert bound is not None

            def call() -> None:
                with torch.no_grad():
                    found.append(bound.step(cell, x, memory, False))

            monkeypatch.setattr(Tensor, "float", wait)
            thread = threading.Thread(target=call)
            thread.start()
            assert inside.wait(20)
        monkeypatch.undo()
        assert bound.step(cell, x, memory, False) is None
        go_on.set()
        thread.join()
    same(found[0], want)


class _Modes(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Modes, lambda: torch.device("cpu")])
def test_modes_that_are_shown_every_function_get_the_ordinary_way(mode: Callable[[], Any]) -> None:
    """They would be shown the questions about each parameter: Python, which another thread may interrupt."""
    cell, x, memory = small_cell()
    bound = cell._bound
    assert bound is not None
    with torch.no_grad(), cell.frozen_weights():
        want = cell(x, memory)
        assert bound.step(cell, x, memory, False) is not None
        with mode():
            assert bound.step(cell, x, memory, False) is None
            same(cell(x, memory), want)


def test_a_copy_of_the_dictionary_is_another_layer() -> None:
    class Own(RelationalMemoryCell):
        def __getstate__(self) -> dict[str, Any]:
            return self.__dict__.copy()

    cell, x, memory = Own(6, 3, 8, 2, backend="cpu").eval(), torch.randn(2, 6), torch.randn(2, 3, 16)
    with torch.no_grad():
        want = cell(x, memory)
        replica, shallow = cell._replicate_for_data_parallel(), copy.copy(cell)  # type: ignore[no-untyped-call]
        assert replica._bound is shallow._bound is cell._bound is not None
        vars(shallow)["forward"] = lambda x, memory: (x, memory)
        assert shallow(x, memory) == (x, memory)
        replica.read_head = nn.Identity()
        assert replica(x, memory)[0].shape == memory.shape
        same(cell(x, memory), want)


def test_output_and_memory_share_nothing_whatever_the_read_head_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell()
    cell.read_head = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        cell(x, memory)
        with only_bound(monkeypatch):
            output, final = cell(x, memory)
        want = final.clone()
        output.zero_()
    assert torch.equal(final, want)


def test_what_does_not_fit_into_memory_raises_the_ordinary_error() -> None:
    layer = RelationalMemory(1, 1024, 16, 8, backend="cpu").eval()
    memory = layer.initial_memory(1)
    with torch.no_grad():
        layer(torch.zeros(1, 2, 1), memory)
        assert layer._bound is not None
        with pytest.raises(RuntimeError, match="memory"):
            layer(torch.zeros(1, 2**24, 1), memory)  # 8 TB of output


def test_two_threads_that_pack_at_once_share_what_was_packed_first() -> None:
    """What the other one packed would be freed while its kernel reads it."""
    both_inside, found = threading.Barrier(2), []

    class Native:
        def pack(self, *_: object) -> object:
            both_inside.wait(20)
            return object()

    block, native = weights.FrozenWeights([torch.zeros(1)]), Native()
    threads = [threading.Thread(target=lambda: found.append(block.packed(native, False))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]


def test_frozen_weights_of_another_layer_are_not_kept_alive() -> None:
    cell, x, memory = small_cell()
    other = small_cell()[0]
    with torch.no_grad(), other.frozen_weights():
        cell._bound = None
        cell(x, memory)
    assert cell._bound is not None
    seen = weakref.ref(other.mlp._modules["0"].weight)
    del other
    gc.collect()
    assert seen() is None


def test_a_replaced_parameter_is_not_kept_alive() -> None:
    cell, x, memory = small_cell()
    node: Any = cell.mlp._modules["0"]  # type: ignore[union-attr]
    seen = weakref.ref(node.weight)
    node.weight = nn.Parameter(torch.randn_like(node.weight))
    cell(x, memory)  # one that wants a gradient, and so binds nothing
    gc.collect()
    assert seen() is None


def test_a_call_that_the_short_way_was_not_asked_for_does_not_bind_anew() -> None:
    cell, x, memory = small_cell()
    bound = cell._bound
    assert bound is not None
    with torch.no_grad():
        cell(x)
        cell(x, memory)
    assert cell._bound is bound


@pytest.mark.parametrize("name", ["x", "memory", "weight"])
def test_tensors_without_memory_are_refused(name: str) -> None:
    cell, x, memory = small_cell()
    weight: Any = cell.mlp._modules["0"].weight  # type: ignore[union-attr]
    {"x": x, "memory": memory, "weight": weight}[name].untyped_storage().resize_(0)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"has no memory|storage"):
            cell(x, memory)


def test_a_tensor_that_never_had_memory_is_refused() -> None:
    cell, _, memory = small_cell()
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RuntimeError, match="has no memory"):
            cell(torch._efficientzerotensor(2, 6), memory)
