"""Step mode: `frozen.step` gives the bits of an ordinary call, on every backend, and ends with its block."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune

from rmc_kernels import RelationalMemory, RelationalMemoryCell
from rmc_kernels.backends import cpu, weights
from rmc_kernels.frozen import FrozenCell
from rmc_kernels.functional import memory_dtype
from rmc_kernels.initial import MEMORY_MODES
from rmc_kernels.read_heads import KINDS
from tests.cases import SPECS, served

Made = tuple[Tensor, Tensor]
Model = RelationalMemory | RelationalMemoryCell
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not served(name, "sonnet"), reason=f"no {name} backend"))
    for name in ("cpu", "reference")
] + ["auto"]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
NEEDS_CPU = pytest.mark.skipif(not served("cpu", "sonnet"), reason="no C++ extension")
NATIVE = pytest.mark.skipif(
    not served("cpu", "sonnet") or cpu._TENSORS is None, reason="torch before 2.10 does not tell C how tensors lie"
)


def same(ours: Made, theirs: Made) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)
        assert not one.requires_grad


def pair(name: str = "sonnet", **options: Any) -> tuple[RelationalMemory, RelationalMemoryCell]:
    """A layer and a cell with the same weights, which no initial value has left at 0 or 1."""
    layer = RelationalMemory.from_spec(SPECS[name], **options).eval()
    cell = RelationalMemoryCell.from_spec(SPECS[name], **options).eval()
    with torch.no_grad():
        for value in layer.parameters():
            value.add_(0.1 * torch.randn_like(value))
    cell.load_state_dict(layer.state_dict())
    return layer, cell


def tensors(model: Model, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, memory and resets of a step; with more than two elements some start over and some do not."""
    g, spec = torch.Generator().manual_seed(seed), model.spec
    dtype = model.get_parameter(spec.parameter_names[0]).dtype
    x = torch.randn(batch, *spec.input_shape, generator=g).to(dtype)
    memory = torch.randn(batch, spec.mem_slots, spec.mem_size, generator=g).to(memory_dtype(dtype))
    return x, memory, torch.arange(batch) % 3 == 1


def ordinary(model: Model, x: Tensor, memory: Tensor | None, resets: Tensor | None) -> Made:
    """The step as an ordinary call without gradients."""
    with torch.no_grad():
        if isinstance(model, RelationalMemoryCell):
            output, following = model(x, memory, resets=resets)
            return output, following
        output, following = model(x[:, None], memory, resets=None if resets is None else resets[:, None])
        return output[:, 0], following


def steps_alike(layer: RelationalMemory, cell: RelationalMemoryCell, batch: int, native: bool = False) -> None:
    """Every combination of given and missing memory and resets, by the layer, the cell and both frozen."""
    x, memory, resets = tensors(layer, batch)
    for carried in (memory, None):
        for starts in (None, resets):
            made = []
            for model in (layer, cell):
                torch.manual_seed(5)  # "normal" draws the initial memory
                want = ordinary(model, x, carried, starts)
                with model.frozen_weights() as frozen:
                    assert not native or not takes_the_ordinary_way(frozen)
                    for _ in range(2):
                        torch.manual_seed(5)
                        found = frozen.step(x, carried, resets=starts)
                        same(found, want)
                    assert not batch or found[0].untyped_storage().data_ptr() != found[1].untyped_storage().data_ptr()
                made.append(found)
            same(*made)


def takes_the_ordinary_way(frozen: FrozenCell) -> bool:
    return getattr(frozen._step, "__func__", None) is FrozenCell._ordinary


@EVERY_BACKEND
@pytest.mark.parametrize("name", SPECS)
def test_steps_have_the_bits_of_ordinary_calls(name: str, backend: str) -> None:
    torch.manual_seed(0)
    layer, cell = pair(name, backend=backend)
    for batch in (0, 1, 7):
        steps_alike(layer, cell, batch, native=backend == "cpu" and cpu._TENSORS is not None)


@EVERY_BACKEND
@pytest.mark.parametrize("head", KINDS)
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_initial_memories_and_read_heads(mode: str, head: str, backend: str) -> None:
    torch.manual_seed(0)
    steps_alike(*pair(initial_memory=mode, read_head=head, backend=backend), 5)


@pytest.mark.parametrize(
    "dtype, backend",
    [
        pytest.param(torch.bfloat16, "cpu", marks=NEEDS_CPU), pytest.param(torch.float16, "cpu", marks=NEEDS_CPU),
        (torch.bfloat16, "reference"), (torch.float16, "auto"), (torch.float64, "auto"), (torch.float64, "reference"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("head", KINDS)
@pytest.mark.parametrize("mode", ["identity", "learned"])
def test_dtypes(mode: str, head: str, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    for name in ("sonnet", "l0sg"):
        steps_alike(*pair(name, dtype=dtype, read_head=head, initial_memory=mode, backend=backend), 3)


@NEEDS_CPU
def test_every_instruction_set_on_both_sides_of_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large batches may run on other kernels than small ones, of one block."""
    torch.manual_seed(0)
    layer, cell = pair("odd", backend="cpu")
    few, many = cpu.AMX_ROWS // 5, cpu.AMX_ROWS // 5 + 1
    for isa in ("", *cpu.ISAS):
        monkeypatch.setattr(cpu, "forced_isa", isa)
        for batch in (few, many, 5 * many):
            steps_alike(layer, cell, batch)
        with cell.frozen_weights() as frozen:
            for batch in (many, few, many):
                x, memory, resets = tensors(cell, batch)
                same(frozen.step(x, memory, resets=resets), ordinary(cell, x, memory, resets))


@EVERY_BACKEND
def test_dropout_is_off(backend: str) -> None:
    torch.manual_seed(0)
    layer, cell = pair("r2gen", backend=backend)
    x, memory, resets = tensors(layer, 4)
    want = ordinary(layer, x, memory, resets)
    for model in (layer.train(), cell.train()):
        assert model.spec.dropout > 0
        with model.frozen_weights() as frozen:
            same(frozen.step(x, memory, resets=resets), want)


@pytest.mark.skipif(not served("triton", "sonnet"), reason="needs triton, and a GPU or TRITON_INTERPRET=1")
def test_the_triton_backend_steps() -> None:
    torch.manual_seed(0)
    layer, cell = pair(backend="triton", device="cuda" if torch.cuda.is_available() else "cpu")
    device = next(layer.parameters()).device
    x, memory, resets = (tensor.to(device) for tensor in tensors(layer, 3))
    for model in (layer, cell):
        for carried, starts in ((memory, resets), (None, None)):
            want = ordinary(model, x, carried, starts)
            with model.frozen_weights() as frozen:
                same(frozen.step(x, carried, resets=starts), want)


@NATIVE
@pytest.mark.parametrize("kind", [RelationalMemory, RelationalMemoryCell])
@pytest.mark.parametrize("mode", ["identity", "zeros", "learned"])
def test_torch_makes_and_computes_nothing(mode: str, kind: type[Model]) -> None:
    model = kind(6, 3, 8, 2, backend="cpu", initial_memory=mode)
    x, memory, resets = tensors(model, 4)
    with model.frozen_weights() as frozen:
        frozen.step(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for carried in (memory, None):
                for starts in (resets, None):
                    frozen.step(x, carried, resets=starts)
            torch.neg(x)
    assert [event.name for event in profile.events() or () if event.name.startswith("aten::")] == ["aten::neg"]


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    layer, cell = pair("matrix", dtype=dtype, backend=backend)
    x, memory, resets = tensors(layer, 4)
    wide = torch.float32
    xs = [
        x.mT.contiguous().mT, x.repeat(2, 1, 1)[::2], x[:1].expand(4, -1, -1), torch._neg_view(x), x.requires_grad_(),
        torch.complex(x.detach().float(), x.detach().float()).conj().imag.to(dtype), nn.Parameter(x.detach()),
    ]  # fmt: skip
    if dtype is torch.float32:  # the conversion of the half type has resolved it
        assert xs[5].is_neg()
    memories = [
        memory.mT.contiguous().mT, memory.repeat(2, 1, 1)[1::2], memory[:1].expand(4, -1, -1), torch._neg_view(memory),
        torch.complex(memory, memory).conj().imag, memory.clone().requires_grad_(),
    ]  # fmt: skip
    starts = [resets.repeat_interleave(2)[::2], torch.tensor(True).expand(4), resets.flip(0), ~resets]
    assert memory.dtype == wide
    for model in (layer, cell):
        with model.frozen_weights() as frozen:
            for rows in xs:
                same(frozen.step(rows, memory, resets=resets), ordinary(model, rows, memory, resets))
            for state in memories:
                same(frozen.step(x, state, resets=resets), ordinary(model, x, state, resets))
            for flags in starts:
                same(frozen.step(x, memory, resets=flags), ordinary(model, x, memory, flags))
            turned = frozen.step(torch._neg_view(x), torch._neg_view(memory))
            same(turned, ordinary(model, -x, -memory, None))


@EVERY_BACKEND
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("head", ["concat", "mean"])
def test_results_are_tensors_like_any(head: str, mode: Callable[[], Any], backend: str) -> None:
    cell = RelationalMemoryCell(6, 3, 8, 2, backend=backend, read_head=head, initial_memory="learned")
    x, memory, resets = tensors(cell, 4)
    given = [tensor.clone() for tensor in (x, memory, resets)]
    with mode(), cell.frozen_weights() as frozen:
        got = frozen.step(x, memory, resets=resets)
        output, final = (part.clone() for part in got)
        got[0].add_(1)
        assert torch.equal(got[1], final)  # neither is a view of the other
        got[1].add_(1)
        same(frozen.step(x, memory, resets=resets), (output, final))  # nor of anything that is kept
    assert all(torch.equal(a, b) for a, b in zip((x, memory, resets), given, strict=True))
    for part in got:
        assert part.is_contiguous()
        assert not part.requires_grad
        assert part.grad_fn is None
        assert part.is_inference() == (mode is torch.inference_mode)
        assert torch.equal(pickle.loads(pickle.dumps(part)), part)
    if mode is not torch.inference_mode:
        leaf = got[1].requires_grad_()
        leaf.square().sum().backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, 2 * leaf)


def test_results_are_freed() -> None:
    cell = RelationalMemoryCell(6, 3, 8, 2)
    with cell.frozen_weights() as frozen:
        seen = [weakref.ref(part) for part in frozen.step(torch.randn(2, 6))]
        assert [ref() for ref in seen] == [None, None]


@EVERY_BACKEND
def test_a_whole_episode_of_steps_is_the_sequence(backend: str) -> None:
    torch.manual_seed(0)
    layer, _ = pair("matrix-blocks", backend=backend, initial_memory="learned")
    x = torch.randn(3, 9, *layer.spec.input_shape)
    resets = torch.rand(3, 9) < 0.3
    with torch.no_grad():
        want = layer(x, resets=resets)
    memory, outputs = None, []
    with layer.frozen_weights() as frozen:
        for t in range(9):
            output, memory = frozen.step(x[:, t], memory, resets=resets[:, t])
            outputs.append(output)
    assert memory is not None
    same((torch.stack(outputs, 1), memory), want)


class Mine(Tensor):
    """Behaves as torch's."""


ERRORS: list[tuple[Any, Any, Any, type[Exception], str]] = [
    (torch.zeros(2, 6), None, None, ValueError, r"^x must be \[B, 5\], got \[2, 6\]$"),
    (torch.zeros(5), None, None, ValueError, r"^x must be \[B, 5\], got \[5\]$"),
    (torch.zeros(2, 1, 5), None, None, ValueError, r"^x must be \[B, 5\], got \[2, 1, 5\]$"),
    (torch.zeros(2, 5).long(), None, None, TypeError, r"^x must be one of torch.float32, .*, got torch.int64; convert"),
    (torch.zeros(2, 5).double(), None, None, TypeError, "^x must be torch.float32 on cpu, .*, got torch.float64 on"),
    (torch.zeros(2, 5).bfloat16(), None, None, TypeError, "^x must be torch.float32 on cpu, .*, got torch.bfloat16"),
    (torch.zeros(2, 5, device="meta"), None, None, TypeError, "^x must be torch.float32 on cpu, .* on meta"),
    (torch.zeros(2, 5).to_sparse(), None, None, TypeError, r"^x must be a tensor \[B, 5\], got a torch.sparse_coo"),
    ([[0.0] * 5], None, None, TypeError, r"^x must be a tensor \[B, 5\], got a list of length 1"),
    (None, None, None, TypeError, r"^x must be a tensor \[B, 5\], got None"),
    (2, torch.zeros(2, 4, 8), None, ValueError, r"^memory must be \[B, N, D\] = \[2, 3, 8\], got \[2, 4, 8\]$"),
    (2, torch.zeros(3, 3, 8), None, ValueError, r"^memory must be \[B, N, D\] = \[2, 3, 8\], got \[3, 3, 8\]$"),
    (2, torch.zeros(2, 24), None, ValueError, r"^memory must be \[B, N, D\] = \[2, 3, 8\], got \[2, 24\]$"),
    (2, torch.zeros(3, 8), None, ValueError, r"^memory must be \[B, N, D\] = \[2, 3, 8\], got \[3, 8\]$"),
    (2, torch.zeros(2, 3, 8).double(), None, TypeError, "^memory must be torch.float32, got torch.float64$"),
    (2, torch.zeros(2, 3, 8, device="meta"), None, ValueError, "^memory must be on the device of x .cpu., got meta$"),
    (2, (torch.zeros(2, 3, 8),) * 2, None, TypeError, r"^memory must be one tensor \[B, N, D\] .*no cell state: pass"),
    (2, [1.0], None, TypeError, r"^memory must be a torch.float32 tensor \[B, N, D\] = \[2, 3, 8\], got a list"),
    (2, torch.zeros(2, dtype=torch.bool), None, TypeError, "^memory must .*; lengths and resets are passed by name$"),
    (2, None, torch.zeros(3).bool(), ValueError, r"^resets must be \[B\] = \[2\], got \[3\]$"),
    (2, None, torch.zeros(2, 1).bool(), ValueError, r"^resets must be \[B\] = \[2\], got \[2, 1\]$"),
    (2, None, torch.tensor(True), ValueError, r"^resets must be \[B\] = \[2\], got \[\]$"),
    (2, None, torch.zeros(2), TypeError, "^resets must be torch.bool, got torch.float32$"),
    (2, None, torch.zeros(2).int(), TypeError, "^resets must be torch.bool, got torch.int32$"),
    (2, None, [True, False], TypeError, r"^resets must be a bool tensor \[B\] = \[2\], got a list of length 2"),
    (2, None, True, TypeError, r"^resets must be a bool tensor \[B\] = \[2\], got True"),
    (2, None, torch.zeros(2, device="meta").bool(), ValueError, "^resets must be on the device of x .cpu., got meta$"),
]


@EVERY_BACKEND
@pytest.mark.parametrize("case", range(len(ERRORS)))
@pytest.mark.parametrize("head", ["concat", "mean"])
def test_errors(head: str, case: int, backend: str) -> None:
    x, memory, resets, error, message = ERRORS[case]
    rows = torch.zeros(2, 5) if isinstance(x, int) else x
    for kind in (RelationalMemory, RelationalMemoryCell):
        model = kind(5, 3, 4, 2, backend=backend, read_head=head, initial_memory="normal")
        with model.frozen_weights() as frozen:
            before = torch.get_rng_state()
            with pytest.raises(error, match=message):
                frozen.step(rows, memory, resets=resets)
            if not (rows is None or memory is None):  # where it is None, one was drawn
                assert torch.equal(torch.get_rng_state(), before)
            with pytest.raises(TypeError, match="positional"):
                frozen.step(torch.zeros(2, 5), None, None)  # type: ignore[call-arg]


@NEEDS_CPU
def test_a_refused_step_computes_nothing() -> None:
    cell = RelationalMemoryCell(5, 3, 4, 2, backend="cpu")
    extension: Any = cpu._C
    with cell.frozen_weights() as frozen:
        frozen.step(torch.zeros(2, 5))
        extension.time_calls(True)
        try:
            extension.call_nanoseconds()
            for x, memory, resets, error, _ in ERRORS:
                with pytest.raises(error):
                    frozen.step(torch.zeros(2, 5) if isinstance(x, int) else x, memory, resets=resets)
            assert extension.call_nanoseconds() == 0
            frozen.step(torch.zeros(2, 5))
            assert extension.call_nanoseconds() > 0
        finally:
            extension.time_calls(False)


@NEEDS_CPU
@pytest.mark.parametrize("name", ["x", "memory", "weight"])
def test_tensors_without_memory_are_refused(name: str) -> None:
    cell = RelationalMemoryCell(6, 3, 8, 2, backend="cpu")
    x, memory, _ = tensors(cell, 2)
    weight: Any = cell.mlp._modules["0"].weight  # type: ignore[union-attr]
    {"x": x, "memory": memory, "weight": weight}[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"has no memory|storage"), cell.frozen_weights() as frozen:
        frozen.step(x, memory)
    with pytest.raises(RuntimeError, match=r"has no memory|storage"), torch.no_grad():
        cell(x, memory)


@NEEDS_CPU
def test_a_tensor_that_never_had_memory_is_refused() -> None:
    cell = RelationalMemoryCell(6, 3, 8, 2, backend="cpu")
    with cell.frozen_weights() as frozen, pytest.raises(RuntimeError, match="has no memory"):
        frozen.step(torch._efficientzerotensor(2, 6))


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


def parametrize(cell: Any) -> None:
    parametrizations.weight_norm(cell.mlp._modules["0"])
    parametrizations.spectral_norm(cell.input_gate)


def prune_weight(cell: Any) -> None:
    prune.l1_unstructured(cell.mlp._modules["0"], "weight", 0.5)


def old_weight_norm(cell: Any) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(cell.mlp._modules["0"])


@EVERY_BACKEND
@pytest.mark.parametrize("change", [parametrize, prune_weight, old_weight_norm])
def test_computed_weights(change: Callable[[Any], None], backend: str) -> None:
    """They are computed once, when the block is entered."""
    layer, cell = pair(backend=backend)
    for model in (layer, cell):
        x, memory, resets = tensors(model, 3)
        before = ordinary(model, x, memory, resets)
        change(model)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.01)
        want = ordinary(model, x, memory, resets)
        assert not torch.equal(before[1], want[1])
        with model.frozen_weights() as frozen:
            same(frozen.step(x, memory, resets=resets), want)
            same(ordinary(model, x, memory, resets), want)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gate_biases_of_another_dtype(dtype: torch.dtype, backend: str) -> None:
    """The one kind of parameter that may differ from the others in dtype."""
    layer, cell = pair("l0sg", backend=backend)
    for model in (layer, cell):
        for name in ("forget_bias", "input_bias"):
            setattr(model, name, nn.Parameter(torch.tensor(0.7, dtype=dtype)))
    steps_alike(layer, cell, 3)


def test_packed_weights_of_a_bias_of_another_dtype() -> None:
    params = (torch.randn(3, 4), torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.bfloat16))
    assert {read.dtype for read in weights.readable(params)} == {torch.float32}
    assert weights.readable(params)[0] is params[0]


@EVERY_BACKEND
def test_hooks_of_the_layer_fire_for_its_calls_alone(backend: str) -> None:
    layer, cell = pair(backend=backend)
    for model in (layer, cell):
        x, memory, _ = tensors(model, 2)
        want = ordinary(model, x, memory, None)
        seen: list[str] = []
        model.register_forward_pre_hook(lambda *_: seen.append("before"))  # noqa: B023
        model.register_forward_hook(lambda *_: seen.append("after"))  # noqa: B023
        with model.frozen_weights() as frozen:
            same(frozen.step(x, memory), want)
            assert seen == []
            same(ordinary(model, x, memory, None), want)
            assert seen == ["before", "after"]


class Doubled(nn.Module):
    """Its result has the axes of a memory: whoever reads that again doubles it twice."""

    def forward(self, memory: Tensor) -> Tensor:
        return 2 * memory


HEADS: list[Callable[[Any], object]] = [
    lambda model: setattr(model, "read_head", Doubled()),
    lambda model: setattr(model, "read_head", nn.Identity()),
    lambda model: setattr(model, "read_head", nn.Sequential(model.read_head, nn.Linear(24, 3))),
    lambda model: setattr(model.read_head, "forward", lambda memory: memory.sum(-2)),
    lambda model: setattr(model.read_head, "kind", "mean"),
    lambda model: model.read_head.register_forward_hook(lambda *args: args[-1] + 1),
    lambda model: model.read_head.register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
]


@EVERY_BACKEND
@pytest.mark.parametrize("change", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_heads_of_the_user(dtype: torch.dtype, change: Callable[[Any], object], backend: str) -> None:
    torch.manual_seed(0)
    layer, cell = pair(backend=backend, dtype=dtype)
    if dtype is torch.bfloat16 and change is HEADS[2]:
        pytest.skip("a Linear of float32 takes the memory, and gives x's dtype")
    plain = ordinary(cell, *tensors(cell, 3))[0]
    for model in (layer, cell):
        torch.manual_seed(1)
        change(model)
        x, memory, resets = tensors(model, 3)
        want = ordinary(model, x, memory, resets)
        assert want[0].shape != plain.shape or not torch.equal(want[0], plain)
        with model.frozen_weights() as frozen:
            for rows, state, starts in ((x, memory, resets), (x[:0], memory[:0], resets[:0]), (x, None, None)):
                # With B = 0, or a sign to be flipped, the C++ step leaves the memory to the ordinary one.
                same(frozen.step(rows, state, resets=starts), ordinary(model, rows, state, starts))
            same(frozen.step(torch._neg_view(x), memory), ordinary(model, -x, memory, None))
            output, following = frozen.step(x, memory, resets=resets)
            output.zero_()
            assert torch.equal(following, want[1])


@EVERY_BACKEND
@pytest.mark.parametrize("head", KINDS)
def test_autocast_has_no_effect(head: str, backend: str) -> None:
    layer, cell = pair(backend=backend, read_head=head)
    for model in (layer, cell):
        x, memory, resets = tensors(model, 3)
        want = ordinary(model, x, memory, resets)
        with torch.autocast("cpu", torch.bfloat16):
            with model.frozen_weights() as frozen:
                same(frozen.step(x, memory, resets=resets), want)
                same(frozen.step(torch._neg_view(-x), memory, resets=resets), want)
            assert model(*((x[:, None], memory) if model is layer else (x, memory)))[0].dtype == torch.bfloat16


@EVERY_BACKEND
def test_subclasses_of_tensors(backend: str) -> None:
    _, cell = pair(backend=backend)
    x, memory, resets = tensors(cell, 3)
    want = ordinary(cell, x, memory, resets)
    with cell.frozen_weights() as frozen:
        for given in ((x.as_subclass(Mine), memory, resets), (x, memory.as_subclass(Mine), resets.as_subclass(Mine))):
            found = frozen.step(*given[:2], resets=given[2])
            same((found[0].as_subclass(Tensor), found[1].as_subclass(Tensor)), want)
    gate: Any = cell.input_gate
    gate.weight = nn.Parameter(gate.weight.detach().as_subclass(Mine))
    assert type(gate.weight) is Mine
    with cell.frozen_weights() as frozen:
        found = frozen.step(x, memory, resets=resets)
        same((found[0].as_subclass(Tensor), found[1].as_subclass(Tensor)), want)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_transforms(backend: str) -> None:
    _, cell = pair(backend=backend, initial_memory="learned")
    x, memory, resets = (torch.stack([each, each.roll(1, 0)]) for each in tensors(cell, 3))
    with cell.frozen_weights() as frozen:
        many = torch.vmap(lambda x, memory, resets: frozen.step(x, memory, resets=resets))(x, memory, resets)
        for i in range(2):
            for one, other in zip(many, frozen.step(x[i], memory[i], resets=resets[i]), strict=True):
                torch.testing.assert_close(one[i], other)
        assert torch.vmap(lambda x: frozen.step(x)[0])(x).shape == (2, 3, 24)
        gradient = torch.func.grad(lambda x: (x * frozen.step(x, memory[0])[0].sum()).sum())(x[0])
        torch.testing.assert_close(gradient, frozen.step(x[0], memory[0])[0].sum().expand_as(gradient))  # of x * const


@NEEDS_CPU
def test_a_transform_is_refused_by_a_backend_that_was_named() -> None:
    _, cell = pair(backend="cpu")
    with cell.frozen_weights() as frozen, pytest.raises(ValueError, match=r"a torch.func transform is active"):
        torch.vmap(lambda x: frozen.step(x)[0])(torch.randn(2, 3, 5))


@EVERY_BACKEND
def test_fake_tensors(backend: str) -> None:
    _, cell = pair(backend=backend)
    x, memory, resets = tensors(cell, 3)
    want = ordinary(cell, x, memory, resets)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, cell.frozen_weights() as frozen:
        output, following = frozen.step(mode.from_tensor(x), mode.from_tensor(memory))
        assert (type(output).__name__, output.shape) == ("FakeTensor", (3, 24))
        assert following.shape == memory.shape
    with cell.frozen_weights() as frozen:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(each) for each in (x, memory, resets)]
            assert frozen.step(*fakes[:2], resets=fakes[2])[1].shape == memory.shape
        same(frozen.step(x, memory, resets=resets), want)


@EVERY_BACKEND
@pytest.mark.filterwarnings("ignore")  # torch warns of each shape that a trace takes for a constant
def test_traces(backend: str) -> None:
    _, cell = pair(backend=backend)
    cell.requires_grad_(False)  # torch.jit.trace takes no other tensor for a constant
    x, memory, resets = tensors(cell, 3)
    with cell.frozen_weights() as frozen:

        def step(x: Tensor, memory: Tensor, resets: Tensor) -> Made:
            return frozen.step(x, memory, resets=resets)

        want = step(x + 1, memory, ~resets)
        recorded: Any = make_fx(step)(x, memory, resets)
        with torch.no_grad():
            same(recorded(x + 1, memory, ~resets), want)
            traced: Any = torch.jit.trace(step, (x, memory, resets))
            same(traced(x + 1, memory, ~resets), want)


@EVERY_BACKEND
def test_compiled_functions(backend: str) -> None:
    """A block outside is traced through; one inside breaks the graph, and nothing has changed when it is left."""
    torch._dynamo.reset()
    _, cell = pair(backend=backend)
    x, memory, resets = tensors(cell, 3)
    want = ordinary(cell, 2 * x, memory, resets)
    with cell.frozen_weights() as frozen:

        @torch.compile(backend="aot_eager", fullgraph=True)
        def act(x: Tensor, memory: Tensor, resets: Tensor) -> Made:
            return frozen.step(2 * x, memory, resets=resets)

        close(act(x, memory, resets), want)
    with pytest.raises(RuntimeError, match="inside the block"):
        act(x, memory, resets)

    @torch.compile(backend="eager")
    def loop(x: Tensor, memory: Tensor) -> Made:
        with cell.frozen_weights() as frozen:
            return frozen.step(2 * x, memory, resets=resets)

    close(loop(x, memory), want)
    assert weights.frozen_blocks == ()


def close(ours: Made, theirs: Made) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_where_new_tensors_go_by_default_does_not_matter() -> None:
    _, cell = pair()
    x, memory, resets = tensors(cell, 3)
    want = ordinary(cell, x, memory, resets), ordinary(cell, x, None, None)
    with torch.device("meta"), cell.frozen_weights() as frozen:
        same(frozen.step(x, memory, resets=resets), want[0])
        same(frozen.step(x), want[1])


@NEEDS_CPU
def test_what_does_not_fit_into_memory_raises() -> None:
    layer = RelationalMemory(1, 1024, 16, 8, backend="cpu")
    x = torch.zeros(1, 1).expand(2**24, 1)  # 8 TB of memory
    with layer.frozen_weights() as frozen, pytest.raises(RuntimeError, match="memory"):
        frozen.step(x)
