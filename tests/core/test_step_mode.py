"""Step mode: a layer's parameters bound once give the same bits as the ordinary way, and see whatever changes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune

from rmc_kernels import ReadHead, RelationalMemory, RelationalMemoryCell, module
from rmc_kernels.backends import cpu
from tests.cpu_cases import SPECS, sonnet

pytest.importorskip("rmc_kernels._C")
pytestmark = pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="torch before 2.10 does not tell C how tensors lie"
)
Made = Callable[[], tuple[Tensor, Tensor]]


def ordinary(monkeypatch: pytest.MonkeyPatch, call: Made) -> tuple[Tensor, Tensor]:
    with monkeypatch.context() as patch:
        # What is bound is kept, and not seen.
        patch.setattr(module.MemoryModule, "_bound", property(lambda _: None, lambda m, v: vars(m).update(_bound=v)))
        return call()


@contextmanager
def only_bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where a call goes the ordinary way."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("took the ordinary way")

    with monkeypatch.context() as patch:
        patch.setattr(module, "relational_memory", fail)
        yield


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)


def small_cell(**options: Any) -> tuple[RelationalMemoryCell, Tensor, Tensor]:
    cell = RelationalMemoryCell(6, 3, 8, 2, backend="cpu", **options).eval()
    x, memory = torch.randn(2, 6, dtype=options.get("dtype")), torch.randn(2, 3, 16)
    with torch.no_grad():
        cell(x, memory)
    return cell, x, memory


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("name", SPECS)
def test_same_bits(name: str, batch: int, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    cell, layer = RelationalMemoryCell.from_spec(spec).eval(), RelationalMemory.from_spec(spec).eval()
    layer.load_state_dict(cell.state_dict())
    x, memory = torch.randn(batch, 3, *spec.input_shape), torch.randn(batch, spec.mem_slots, spec.mem_size)
    calls: list[Made] = [lambda: cell(x[:, 0], memory), lambda: layer(x, memory), lambda: layer(x[:, :1], memory)]
    with torch.inference_mode():
        for model, call in zip((cell, layer, layer), calls, strict=True):
            want = ordinary(monkeypatch, call)
            if frozen:
                with model.frozen_weights(), only_bound(monkeypatch):
                    same(call(), want)
                    same(call(), want)
            else:
                with only_bound(monkeypatch):
                    same(call(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["concat", "mean", "weighted", "attention"])
def test_half_types_and_read_heads(dtype: torch.dtype, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell(dtype=dtype, read_head=head)
    with torch.no_grad():
        want = ordinary(monkeypatch, lambda: cell(x, memory))
        same(cell(x, memory), want)
        with cell.frozen_weights():
            same(cell(x, memory), want)
            with only_bound(monkeypatch):
                same(cell(x, memory), want)


@pytest.mark.parametrize("kind", [RelationalMemoryCell, RelationalMemory])
def test_torch_makes_and_computes_nothing(kind: type[RelationalMemoryCell | RelationalMemory]) -> None:
    model = kind(6, 3, 8, 2, backend="cpu").eval()
    x, memory = torch.randn(2, *[1] * (kind is RelationalMemory), 6), torch.randn(2, 3, 16)
    with torch.inference_mode(), model.frozen_weights():
        model(x, memory)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(x, memory)
    assert [event.name for event in profile.events() or () if event.name.startswith("aten::")] == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(2, 6), (2, 1, 6), (2, 5, 6)])
def test_results_are_tensors_like_any(
    shape: tuple[int, ...], mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = RelationalMemory if len(shape) == 3 else RelationalMemoryCell
    model = kind(6, 3, 8, 2, backend="cpu").eval()
    x, memory = torch.randn(shape), torch.randn(2, 3, 16)
    with mode():
        want = ordinary(monkeypatch, lambda: model(x, memory))
        with only_bound(monkeypatch):
            got = model(x, memory)
        output, final = (part.clone() for part in got)
        got[0].add_(1)
    assert torch.equal(got[1], final)  # neither is a view of the other
    assert torch.equal(pickle.loads(pickle.dumps(got[1])), final)
    assert torch.equal(got[1].share_memory_(), final)
    assert torch.equal(got[0], output + 1)
    for part, other in zip(got, want, strict=True):
        assert part.untyped_storage().nbytes() == 4 * part.numel()
        assert part.is_contiguous()
        assert part.data_ptr() % 64 == 0 or part.is_shared()
        assert not part.requires_grad
        assert part.is_inference() == other.is_inference()
    if mode is torch.no_grad:
        got[0].requires_grad_().square().sum().backward()
        assert torch.equal(got[0].grad, 2 * got[0])


def test_results_are_freed() -> None:
    cell, x, memory = small_cell()
    with torch.no_grad():
        seen = [weakref.ref(part) for part in cell(x, memory)]
    assert [ref() for ref in seen] == [None, None]


def replace_parameter(cell: Any) -> None:
    cell.blocks._modules["0"].qkv.weight = nn.Parameter(torch.randn_like(cell.blocks._modules["0"].qkv.weight))


def replace_module(cell: Any) -> None:
    cell.mlp._modules["0"] = copy.deepcopy(cell.mlp._modules["1"])


def move_storage(cell: Any) -> None:
    cell.mlp._modules["0"].weight.data = torch.randn(16, 16)


def transpose_data(cell: Any) -> None:
    cell.mlp._modules["0"].weight.data = cell.mlp._modules["0"].weight.data.t()


def prune_weight(cell: Any) -> None:
    prune.l1_unstructured(cell.mlp._modules["0"], "weight", 0.5)


def parametrize(cell: Any) -> None:
    parametrizations.weight_norm(cell.mlp._modules["0"])


def assign(cell: Any) -> None:
    cell.load_state_dict({name: value + 1 for name, value in cell.state_dict().items()}, assign=True)


def write_in_place(cell: Any) -> None:
    cell.mlp._modules["0"].bias.data.add_(1)


def other_dictionary_of_parameters(cell: Any) -> None:
    node = cell.mlp._modules["0"]
    node._parameters = dict(node._parameters)
    node.weight = nn.Parameter(torch.randn_like(node.weight))


def other_dictionary_of_modules(cell: Any) -> None:
    cell.mlp._modules = dict(cell.mlp._modules)
    replace_module(cell)


CHANGES = [
    replace_parameter, replace_module, move_storage, transpose_data, prune_weight, parametrize, assign, write_in_place,
    other_dictionary_of_parameters, other_dictionary_of_modules,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell()
    with torch.no_grad():
        before = cell(x, memory)
        change(cell)
        after = cell(x, memory)
        same(cell(x, memory), after)
        same(ordinary(monkeypatch, lambda: cell(x, memory)), after)
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("change", [move_storage, lambda cell: cell.mlp._modules["0"].bias.add_(1)])
def test_a_change_of_frozen_weights_raises(change: Callable[[Any], None]) -> None:
    cell, x, memory = small_cell()
    with torch.no_grad(), cell.frozen_weights():
        cell(x, memory)
        change(cell)
        with pytest.raises(RuntimeError, match="changed inside frozen_weights"):
            cell(x, memory)


def test_a_parameter_replaced_in_a_frozen_block_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell()
    with torch.no_grad(), cell.frozen_weights():
        cell(x, memory)
        replace_parameter(cell)
        same(cell(x, memory), ordinary(monkeypatch, lambda: cell(x, memory)))


def test_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell()
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            cell.to(dtype)
            rows = x.to(dtype)
            same(cell(rows, memory), ordinary(monkeypatch, lambda rows=rows: cell(rows, memory)))  # type: ignore[misc]
        cell.double().backend = "auto"
        assert cell(x.double(), memory.double())[0].dtype == torch.float64


def test_gradients_are_not_lost() -> None:
    cell, x, memory = small_cell()
    cell(x, memory)[0].sum().backward()
    assert all(p.grad is not None for p in cell.parameters())


def test_dropout_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = RelationalMemory.from_spec(SPECS["r2gen"]).train()
    x, memory = torch.randn(2, 3, *layer.spec.input_shape), torch.randn(2, 3, layer.spec.mem_size)
    with torch.no_grad():
        assert layer.spec.dropout > 0
        first, second = layer(x, memory)[0], layer(x, memory)[0]
        assert not torch.equal(first, second)


def test_autocast_and_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert cell(x, memory)[0].dtype == torch.bfloat16
        cell.backend = "auto"
        many = torch.vmap(cell)(torch.stack([x, x]), torch.stack([memory, memory]))[1]
        torch.testing.assert_close(many[1], cell(x, memory)[1])
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = cell(mode.from_tensor(x), mode.from_tensor(memory))
        assert fake[1].shape == memory.shape
        with torch.device("meta"):  # where new tensors go by default does not matter
            same(cell(x, memory), cell(x, memory))
            assert cell(x, memory)[0].device.type == "cpu"


@pytest.mark.parametrize(
    "x, memory",
    [
        (torch.randn(2, 7), torch.randn(2, 3, 16)),
        (torch.randn(2, 6), torch.randn(2, 4, 16)),
        (torch.randn(2, 6), torch.randn(3, 3, 16)),
        (torch.randn(2, 6), torch.randn(2, 3, 16).double()),
        (torch.randn(2, 6).double(), torch.randn(2, 3, 16)),
        (torch.randn(2, 6), torch.randn(2, 48)),
        (torch.randn(2, 2, 6), torch.randn(2, 3, 16)),
        (torch.randn(2, 6, device="meta"), torch.randn(2, 3, 16, device="meta")),
        ([1.0], torch.randn(2, 3, 16)),
        (torch.randn(2, 6), [1.0]),
    ],
)
def test_the_errors_are_the_ordinary_ones(x: Any, memory: Any) -> None:
    cell, good, state = small_cell()
    fresh = copy.deepcopy(cell)
    assert fresh._bound is None
    with torch.no_grad():
        cell(good, state)
        assert cell._bound is not None
        errors = []
        for model in (cell, fresh):
            with pytest.raises((TypeError, ValueError)) as caught:
                model(x, memory)
            errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_layouts_that_cplusplus_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell()
    flipped = torch._neg_view(x)  # what x.conj().imag and its like give: a sign that is applied when read
    layouts = [(x.t().contiguous().t(), memory), (x, memory.transpose(1, 2).contiguous().transpose(1, 2))]
    layouts += [(flipped, memory), (x[:0], memory[:0]), (x[0], memory[:1])]
    with torch.no_grad():
        for rows, state in layouts:
            got = cell(rows, state)
            same(got, ordinary(monkeypatch, lambda: cell(rows, state)))  # noqa: B023
        torch.testing.assert_close(cell(flipped, memory)[1], cell(-x, memory)[1])


def test_copies_and_pickles_bind_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell()
    with torch.no_grad():
        want = cell(x, memory)
        for other in (copy.copy(cell), copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
            assert other._bound is None
            same(other(x, memory), want)


def test_hooks_on_the_read_head_run() -> None:
    cell, x, memory = small_cell()
    seen = []
    cell.read_head.register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        cell(x, memory)
    assert len(seen) == 1


def test_another_read_head_runs() -> None:
    cell, x, memory = small_cell()
    cell.read_head = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        output, state = cell(x, memory)
    assert torch.equal(output, state)


HEAD_CHANGES: list[Callable[[Any], Any]] = [
    lambda head: setattr(head, "kind", "mean"),
    lambda head: setattr(head, "forward", lambda memory: memory.sum(-2)),
    lambda head: head.register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
    lambda head: nn.modules.module.register_module_forward_hook(lambda m, _, out: out + 1 if m is head else None),
    lambda head: setattr(head, "_forward_hooks", OrderedDict({0: lambda m, _, out: out + 1})),
    lambda head: setattr(head, "__class__", Doubled),
    lambda head: PutInto(ReadHead, "forward", lambda self, memory: memory.sum(-2)),
]


class PutInto:
    """An attribute of a class that is another until this is removed."""

    def __init__(self, owner: type, name: str, value: object) -> None:
        self.before = (owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def remove(self) -> None:
        setattr(*self.before)


class Doubled(ReadHead):
    def forward(self, memory: Tensor) -> Tensor:
        return 2 * super().forward(memory)


def changed_cell_counts(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell()
    with torch.no_grad():
        before = cell(x, memory)[0]
        handle = change(cell)
        try:
            after = [cell(x, memory) for _ in range(2)]
            same(after[1], ordinary(monkeypatch, lambda: cell(x, memory)))
        finally:
            if handle is not None:
                handle.remove()
    same(*after)
    assert after[0][0].shape != before.shape or not torch.equal(after[0][0], before)


@pytest.mark.parametrize("change", HEAD_CHANGES)
def test_a_changed_read_head_counts(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    changed_cell_counts(lambda cell: change(cell.read_head), monkeypatch)


def test_attributes_that_no_call_uses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dictionaries that change in other places, and such as change back."""
    cell, x, memory = small_cell()
    with torch.no_grad():
        want, bound, mlp = cell(x, memory), cell._bound, cell._modules["mlp"]
        assert mlp is not None
        for _ in range(2):
            cell.note = len(vars(cell))  # type: ignore[assignment]
            mlp.register_module("note", None)
            mlp._modules["0"] = mlp._modules.pop("0")
            with only_bound(monkeypatch):
                same(cell(x, memory), want)
    assert cell._bound is bound


def test_frozen_weights_of_another_layer_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell()
    other = small_cell()[0]
    with torch.no_grad(), cell.frozen_weights():
        want = cell(x, memory)
        with only_bound(monkeypatch):
            with other.frozen_weights():
                same(cell(x, memory), want)
            same(cell(x, memory), want)


def test_another_spec_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, x, memory = small_cell()
    with torch.no_grad():
        before = cell(x, memory)[1]
        cell.spec = replace(cell.spec, forget_bias=5.0)
        after = cell(x, memory)
        same(after, ordinary(monkeypatch, lambda: cell(x, memory)))
    assert not torch.equal(before, after[1])


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6), (2, 1, 6), (1, 1, 1, 6)])
def test_a_row_axis_is_one_of_the_spec(shape: tuple[int, ...], rows: int | None) -> None:
    """Shapes that only a cell with matrix input, or only one without, reads as a batch."""
    x, memory = torch.randn(shape), torch.randn(shape[0], 3, 16)
    for kind in (RelationalMemoryCell, RelationalMemory):
        model = kind(6, 3, 8, 2, input_rows=rows, backend="cpu").eval()
        fresh = copy.deepcopy(model)
        lead = (2,) if kind is RelationalMemoryCell else (2, 2)
        with torch.no_grad():
            model(torch.randn(*lead, *model.spec.input_shape), torch.randn(2, 3, 16))
            assert model._bound is not None
            assert outcome(model, x, memory) == outcome(fresh, x, memory)


def outcome(model: nn.Module, x: Tensor, memory: Tensor) -> object:
    """The values as lists, or the message of the error."""
    try:
        return [part.tolist() for part in model(x, memory)]
    except ValueError as error:
        return str(error)


def test_a_bound_layer_is_collected() -> None:
    cell, x, memory = small_cell()
    cell.read_head.register_forward_hook(cell.forward)  # type: ignore[arg-type]  # a cycle through a hook
    with torch.no_grad():
        cell._bound = None
        hooks = cell.read_head._forward_hooks.copy()
        cell.read_head._forward_hooks.clear()
        cell(x, memory)
        cell.read_head._forward_hooks.update(hooks)
    assert cell._bound is not None
    seen = weakref.ref(cell)
    del cell, hooks
    gc.collect()
    assert seen() is None


def test_a_state_of_a_subclass_s_own() -> None:
    class Own(RelationalMemoryCell):
        def __getstate__(self) -> dict[str, Any]:
            return self.__dict__.copy()

    cell = Own(6, 3, 8, 2, backend="cpu").eval()
    x, memory = torch.randn(2, 6), torch.randn(2, 3, 16)
    with torch.no_grad():
        want = cell(x, memory)
        assert cell._bound is not None
        same(copy.deepcopy(cell)(x, memory), want)


@pytest.mark.filterwarnings("ignore")  # torch warns of each shape that a trace takes for a constant
def test_traced_modules_compute() -> None:
    cell, x, memory = small_cell()
    with torch.no_grad():
        traced = torch.jit.trace(cell, (x, memory))
        same(traced(x + 1, memory), cell(x + 1, memory))


def test_the_final_memory_keeps_no_sequence_alive() -> None:
    layer = RelationalMemory(6, 3, 8, 2, backend="cpu").eval()
    with torch.no_grad():
        for _ in range(2):
            memory = layer(torch.randn(1, 50, 6), torch.randn(1, 3, 16))[1]
            assert memory.untyped_storage().nbytes() == 4 * memory.numel()


def test_options_take_the_ordinary_way() -> None:
    layer = RelationalMemory(6, 3, 8, 2, backend="cpu").eval()
    x, memory = torch.randn(2, 5, 6), torch.randn(2, 3, 16)
    with torch.no_grad():
        layer(x, memory)
        short = layer(x, memory, lengths=torch.tensor([2, 5]))[1]
        torch.testing.assert_close(short[0], layer(x[:, :2], memory)[1][0], rtol=0, atol=0)
        resets = torch.zeros(2, 5, dtype=torch.bool)
        resets[:, 2] = True
        start = layer.initial_memory(2)
        assert torch.equal(layer(x, memory, resets=resets)[1], layer(x[:, 2:], start)[1])
        assert len(layer(x, memory, return_attention=True)) == 3


def test_options_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = sonnet(10, 8, 16, 2)
    layer = RelationalMemory.from_spec(spec, backend="cpu").eval()
    x, memory = torch.randn(20, 3, 10), torch.randn(20, 8, 32)
    with torch.no_grad():
        layer(x, memory)
        for isa in cpu.ISAS:
            monkeypatch.setattr(cpu, "forced_isa", isa)
            same(layer(x, memory), ordinary(monkeypatch, lambda: layer(x, memory)))
        layer.backend = "reference"
        assert layer._bound is not None
        assert layer._bound.step(layer, x, memory, True) is None
