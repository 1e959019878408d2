"""Whatever a program changes of a layer between two calls counts at the next one, without gradients and with."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode

from rmc_kernels import ReadHead, RelationalMemory, RelationalMemoryCell, relational_memory
from rmc_kernels.backends import cpu
from tests.cases import served

Made = tuple[Tensor, Tensor]
BACKENDS = [name for name in ("cpu", "reference") if served(name, "sonnet")]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_MODE = pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
Mode = Callable[[], AbstractContextManager[object]]


def same(ours: Made, theirs: Made) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)


def small_cell(backend: str = "auto", **options: Any) -> tuple[RelationalMemoryCell, Tensor, Tensor]:
    """A cell that has been called, and what it was called with."""
    cell = RelationalMemoryCell(6, 3, 8, 2, backend=backend, **options)
    x, memory = torch.randn(2, 6, dtype=options.get("dtype")), torch.randn(2, 3, 16)
    with torch.no_grad():
        cell(x, memory)
    return cell, x, memory


def expected(cell: Any, x: Tensor, memory: Tensor) -> Made:
    """The step as a function of the weights that the cell's modules hold now."""
    params = {name: reduce(getattr, name.split("."), cell) for name in cell.spec.parameter_names}
    with torch.no_grad():
        memories, final = relational_memory(x[:, None], memory, params, cell.spec, backend=cell.backend)
    return memories.flatten(2)[:, 0], final


def replace_parameter(cell: Any) -> None:
    cell.blocks._modules["0"].qkv.weight = nn.Parameter(torch.randn_like(cell.blocks._modules["0"].qkv.weight))


def replace_module(cell: Any) -> None:
    cell.mlp._modules["0"] = copy.deepcopy(cell.mlp._modules["1"])


def tie_modules(cell: Any) -> None:
    cell.mlp._modules["0"] = cell.mlp._modules["1"]


def move_storage(cell: Any) -> None:
    cell.mlp._modules["0"].weight.data = torch.randn(16, 16)


def transpose_data(cell: Any) -> None:
    cell.mlp._modules["0"].weight.data = cell.mlp._modules["0"].weight.data.t()


def prune_weight(cell: Any) -> None:
    prune.l1_unstructured(cell.mlp._modules["0"], "weight", 0.5)


def parametrize(cell: Any) -> None:
    parametrizations.weight_norm(cell.mlp._modules["0"])
    with torch.no_grad():
        cell.mlp._modules["0"].parametrizations.weight.original0.mul_(2)


def assign(cell: Any) -> None:
    cell.load_state_dict({name: value + 1 for name, value in cell.state_dict().items()}, assign=True)


def load(cell: Any) -> None:
    cell.load_state_dict({name: value + 1 for name, value in cell.state_dict().items()})


def write_in_place(cell: Any) -> None:
    cell.mlp._modules["0"].bias.data.add_(1)


def optimize(cell: Any) -> None:
    for value in cell.parameters():
        value.grad = torch.ones_like(value)
    torch.optim.Adam(cell.parameters(), 0.1).step()


def other_dictionary_of_parameters(cell: Any) -> None:
    node = cell.mlp._modules["0"]
    node._parameters = dict(node._parameters)
    node.weight = nn.Parameter(torch.randn_like(node.weight))


def other_dictionary_of_modules(cell: Any) -> None:
    cell.mlp._modules = dict(cell.mlp._modules)
    replace_module(cell)


def another_spec(cell: Any) -> None:
    cell.spec = replace(cell.spec, forget_bias=5.0)


CHANGES = [
    replace_parameter, replace_module, tie_modules, move_storage, transpose_data, prune_weight, parametrize, assign,
    load, write_in_place, optimize, other_dictionary_of_parameters, other_dictionary_of_modules, another_spec,
]  # fmt: skip


@EVERY_BACKEND
@EVERY_MODE
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: Callable[[Any], None], mode: Mode, backend: str) -> None:
    cell, x, memory = small_cell(backend)
    with mode():
        before = cell(x, memory)
    change(cell)
    with mode():
        after = cell(x, memory)
        same(cell(x, memory), after)
    same(after, expected(cell, x, memory))
    assert not torch.equal(before[1], after[1])


@EVERY_BACKEND
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_layer_is_seen(change: Callable[[Any], None], backend: str) -> None:
    layer, x, memory = RelationalMemory(6, 3, 8, 2, backend=backend), torch.randn(2, 1, 6), torch.randn(2, 3, 16)
    with torch.no_grad():
        layer(x, memory)
        change(layer)
        output, final = layer(x, memory)
    same((output[:, 0], final), expected(layer, x[:, 0], memory))


@EVERY_BACKEND
def test_conversions(backend: str) -> None:
    cell, x, memory = small_cell(backend)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            cell.to(dtype)
            output, final = cell(x.to(dtype), memory)
            wide = expected(cell, x.to(dtype), memory)
            same((output, final), (wide[0].to(dtype), wide[1]))
        cell.double().backend = "auto"
        assert cell(x.double(), memory.double())[0].dtype == torch.float64


def test_gradients_are_not_lost() -> None:
    cell, x, memory = small_cell()
    cell(x, memory)[0].sum().backward()
    assert all(p.grad is not None for p in cell.parameters())


class Doubled(ReadHead):
    def forward(self, memory: Tensor) -> Tensor:
        return 2 * super().forward(memory)


class DoubledCell(RelationalMemoryCell):
    def forward(self, x: Tensor, memory: Tensor | None = None, **options: Any) -> Made:
        output, state = super().forward(x, memory, **options)
        return 2 * output, state


class PutInto:
    """An attribute of a class that is another until this is removed."""

    def __init__(self, owner: type, name: str, value: object) -> None:
        self.before = (owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def remove(self) -> None:
        setattr(*self.before)


#: Each with what it makes of the output, the slots side by side.
HEAD_CHANGES: list[tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = [
    (lambda cell: setattr(cell.read_head, "kind", "mean"), lambda out: out.unflatten(-1, (3, 16)).mean(-2)),
    (
        lambda cell: setattr(cell.read_head, "forward", lambda memory: memory.sum(-2)),
        lambda out: out.unflatten(-1, (3, 16)).sum(-2),
    ),
    (lambda cell: cell.read_head.register_forward_pre_hook(lambda _, given: (given[0] + 1,)), lambda out: out + 1),
    (
        lambda cell: nn.modules.module.register_module_forward_hook(
            lambda module, _, out: out + 1 if module is cell.read_head else None
        ),
        lambda out: out + 1,
    ),
    (
        lambda cell: setattr(cell.read_head, "_forward_hooks", OrderedDict({0: lambda m, _, out: out + 1})),
        lambda out: out + 1,
    ),
    (lambda cell: setattr(cell.read_head, "__class__", Doubled), lambda out: 2 * out),
    (
        lambda cell: PutInto(ReadHead, "forward", lambda self, memory: memory.sum(-2)),
        lambda out: out.unflatten(-1, (3, 16)).sum(-2),
    ),
    (lambda cell: setattr(cell, "read_head", nn.Identity()), lambda out: out.unflatten(-1, (3, 16))),
]
#: Of the cell itself.
CELL_CHANGES: list[tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = [
    (lambda cell: setattr(cell, "forward", lambda x, memory: (x, memory)), lambda out: out),
    (lambda cell: setattr(cell, "_compiled_call_impl", lambda x, memory: (x, memory)), lambda out: out),
    (lambda cell: cell.register_forward_hook(lambda _, given, out: (out[0] + 1, out[1])), lambda out: out + 1),
    (
        lambda cell: nn.modules.module.register_module_forward_hook(
            lambda module, _, out: (out[0] + 1, out[1]) if module is cell else None  # type: ignore[arg-type]
        ),
        lambda out: out + 1,
    ),
    (
        lambda cell: setattr(cell, "_forward_hooks", OrderedDict({0: lambda m, _, out: (out[0] + 1, out[1])})),
        lambda out: out + 1,
    ),
    (lambda cell: setattr(cell, "__class__", DoubledCell), lambda out: 2 * out),
]


@EVERY_BACKEND
@EVERY_MODE
@pytest.mark.parametrize("case", [*HEAD_CHANGES, *CELL_CHANGES])
def test_hooks_and_methods_that_are_put_in_run(
    case: tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]], mode: Mode, backend: str
) -> None:
    change, effect = case
    cell, x, memory = small_cell(backend)
    want = expected(cell, x, memory)
    with mode():
        handle = change(cell)
        try:
            found = [cell(x, memory) for _ in range(2)]
        finally:
            if handle is not None:
                handle.remove()
        again = cell(x, memory)
    if case in CELL_CHANGES[:2]:  # which return what they are given
        want = x, memory
    for each in found:
        same(each, (effect(want[0]), want[1]))
    if handle is not None:
        same(again, want)


@EVERY_BACKEND
def test_a_hook_before_the_cell_changes_its_arguments(backend: str) -> None:
    cell, x, memory = small_cell(backend)
    cell.register_forward_pre_hook(lambda _, given: (given[0] + 1, given[1]))
    with torch.no_grad():
        same(cell(x, memory), expected(cell, x + 1, memory))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_the_layer_run(register: str) -> None:
    layer, seen = RelationalMemory(6, 3, 8, 2), []
    x, memory = torch.randn(2, 1, 6, requires_grad=True), torch.randn(2, 3, 16)
    with torch.no_grad():
        layer(x, memory)
    getattr(layer, register)(lambda *args: seen.append(args))
    layer(x, memory)[0].sum().backward()
    assert len(seen) == 1


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


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
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
    assert seen.count(cell) == seen.count(cell.read_head) == 3


def test_subclasses_have_arguments_and_calls_of_their_own() -> None:
    class Own(RelationalMemoryCell):
        def forward(self, *, state: Tensor, scale: float, row: Tensor) -> Any:  # type: ignore[override]
            return super().forward(row * scale, state)

    class Logged(DoubledCell):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    x, memory = torch.randn(2, 6), torch.randn(2, 3, 16)
    own, logged = Own(6, 3, 8, 2), Logged(6, 3, 8, 2)
    with torch.no_grad():
        for _ in range(3):
            same(own(row=x, scale=2.0, state=memory), expected(own, 2 * x, memory))
            output, final = expected(logged, x, memory)
            same(logged(x, memory), (2 * output, final))


class _Shown(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@EVERY_BACKEND
@pytest.mark.parametrize("mode", [_Shown, lambda: torch.device("cpu"), lambda: torch.device("meta")])
def test_modes_that_are_shown_every_function(mode: Mode, backend: str) -> None:
    cell, x, memory = small_cell(backend)
    want = expected(cell, x, memory)
    with torch.no_grad(), mode():
        same(cell(x, memory), want)


def test_autocast_and_transforms() -> None:
    cell, x, memory = small_cell()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert cell(x, memory)[0].dtype == torch.bfloat16
        many = torch.vmap(cell)(torch.stack([x, x]), torch.stack([memory, memory]))[1]
        torch.testing.assert_close(many[1], cell(x, memory)[1])
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = cell(mode.from_tensor(x), mode.from_tensor(memory))
        assert fake[1].shape == memory.shape


@EVERY_BACKEND
@pytest.mark.filterwarnings("ignore")  # torch warns of each shape that a trace takes for a constant
def test_traced_modules_compute(backend: str) -> None:
    cell, x, memory = small_cell(backend)
    with torch.no_grad():
        traced: Any = torch.jit.trace(cell, (x, memory))
        same(traced(x + 1, memory), cell(x + 1, memory))


@EVERY_BACKEND
def test_layouts(backend: str) -> None:
    cell, x, memory = small_cell(backend)
    flipped = torch._neg_view(x)  # what x.conj().imag and its like give: a sign that is applied when read
    with torch.no_grad():
        same(cell(x.t().contiguous().t(), memory), cell(x, memory))
        same(cell(x, memory.transpose(1, 2).contiguous().transpose(1, 2)), cell(x, memory))
        same(cell(flipped, torch._neg_view(memory)), cell(-x, -memory))
        same(cell(x[:0], memory[:0]), (torch.empty(0, 48), torch.empty(0, 3, 16)))
        output, final = cell(x[0], memory[:1])
        same((output[None], final), cell(x[:1], memory[:1]))


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6), (2, 1, 6), (1, 1, 1, 6)])
def test_a_row_axis_is_one_of_the_spec(shape: tuple[int, ...], rows: int | None) -> None:
    """Shapes that only a cell with matrix input, or only one without, reads as a batch."""
    for kind in (RelationalMemoryCell, RelationalMemory):
        model = kind(6, 3, 8, 2, input_rows=rows)
        axes = len(shape) - len(model.spec.input_shape)
        most = 1 if kind is RelationalMemoryCell else 2
        batch = shape[0] if axes == most else 1
        x, memory = torch.randn(shape), torch.randn(batch, 3, 16)
        with torch.no_grad():
            if axes not in (most - 1, most):
                with pytest.raises(ValueError, match=r"^x must be"):
                    model(x, memory)
                continue
            output, final = model(x, memory)
        assert output.shape == (*shape[:axes], 48)
        assert final.shape == memory.shape


@EVERY_BACKEND
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(2, 6), (2, 1, 6), (2, 5, 6)])
def test_results_are_tensors_like_any(shape: tuple[int, ...], mode: Mode, backend: str) -> None:
    kind = RelationalMemory if len(shape) == 3 else RelationalMemoryCell
    model, memory = kind(6, 3, 8, 2, backend=backend), torch.randn(2, 3, 16)
    with mode():
        got = model(torch.randn(shape), memory)
        output, final = (part.clone() for part in got)
        got[0].add_(1)
    assert torch.equal(got[1], final)  # neither is a view of the other
    assert torch.equal(got[0], output + 1)
    assert got[1].untyped_storage().nbytes() == 4 * got[1].numel()  # which keeps no sequence alive
    for part in got:
        assert part.is_contiguous()
        assert not part.requires_grad
        assert part.is_inference() == (mode is torch.inference_mode)
        assert torch.equal(pickle.loads(pickle.dumps(part)), part)


def test_copies_and_replicas_are_layers_of_their_own() -> None:
    class Own(RelationalMemoryCell):
        def __getstate__(self) -> dict[str, Any]:
            return self.__dict__.copy()

    for cell in (small_cell()[0], Own(6, 3, 8, 2)):
        x, memory = torch.randn(2, 6), torch.randn(2, 3, 16)
        with torch.no_grad():
            want = cell(x, memory)
            for other in (copy.copy(cell), copy.deepcopy(cell)):
                same(other(x, memory), want)
            replica, shallow = cell._replicate_for_data_parallel(), copy.copy(cell)  # type: ignore[no-untyped-call]
            vars(shallow)["forward"] = lambda x, memory: (x, memory)
            same(shallow(x, memory), (x, memory))
            replica.read_head = nn.Identity()
            assert replica(x, memory)[0].shape == memory.shape
            same(cell(x, memory), want)
            copied = copy.deepcopy(cell)
            write_in_place(copied)
            assert not torch.equal(copied(x, memory)[1], want[1])
            same(cell(x, memory), want)
    cell = small_cell()[0]
    with torch.no_grad():
        same(pickle.loads(pickle.dumps(cell))(x, memory), cell(x, memory))


def test_calls_keep_no_layer_and_no_parameter_alive() -> None:
    cell, x, memory = small_cell()
    node: Any = cell.mlp._modules["0"]  # type: ignore[union-attr]
    seen = weakref.ref(node.weight)
    node.weight = nn.Parameter(torch.randn_like(node.weight))
    cell(x, memory)
    gc.collect()
    assert seen() is None
    with torch.no_grad():
        results = [weakref.ref(part) for part in cell(x, memory)]
    assert [ref() for ref in results] == [None, None]
    owner = weakref.ref(cell)
    cell.read_head.register_forward_hook(cell.forward)  # type: ignore[arg-type]  # a cycle through a hook
    del cell, node
    gc.collect()
    assert owner() is None


def test_dropout_is_drawn_at_each_call() -> None:
    from tests.cases import SPECS

    layer = RelationalMemory.from_spec(SPECS["r2gen"])
    x = torch.randn(2, 3, *layer.spec.input_shape)
    with torch.no_grad():
        assert layer.spec.dropout > 0
        assert not torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.skipif(not cpu.ISAS, reason="no C++ extension")
def test_options_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = RelationalMemory(10, 8, 16, 2, backend="cpu")
    x, memory = torch.randn(20, 3, 10), torch.randn(20, 8, 32)
    with torch.no_grad():
        for isa in cpu.ISAS:
            monkeypatch.setattr(cpu, "forced_isa", isa)
            native: Any = cpu.planned_cell(layer.spec, *cpu.kernels(torch.float32, isa)[1]).given_addresses
            assert native.isa == isa
            want = relational_memory(x, memory, dict(layer.named_parameters()), layer.spec, backend="cpu")
            same((layer(x, memory)[0], layer(x, memory)[1]), (want[0].flatten(2), want[1]))


@pytest.mark.skipif(not cpu.ISAS, reason="no C++ extension")
@pytest.mark.parametrize("name", ["x", "memory", "weight"])
@pytest.mark.parametrize("grad", [False, True])
def test_tensors_without_memory_are_refused(grad: bool, name: str) -> None:
    cell, x, memory = small_cell("cpu")
    weight: Any = cell.mlp._modules["0"].weight  # type: ignore[union-attr]
    {"x": x, "memory": memory, "weight": weight}[name].untyped_storage().resize_(0)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"has no memory|storage"):
        cell(x, memory)


@pytest.mark.skipif(not cpu.ISAS, reason="no C++ extension")
def test_what_does_not_fit_into_memory_raises() -> None:
    layer = RelationalMemory(1, 1024, 16, 8, backend="cpu")
    with torch.no_grad(), pytest.raises(RuntimeError, match="memory"):
        layer(torch.zeros(1, 2**24, 1), layer.initial_memory(1))  # 8 TB of output
