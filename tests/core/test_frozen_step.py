"""`frozen.step` gives the bits of an ordinary call, on every backend, and refuses what an ordinary call refuses."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from rmc_kernels import RelationalMemory, RelationalMemoryCell
from rmc_kernels.backends import cpu
from rmc_kernels.initial import MEMORY_MODES
from rmc_kernels.read_heads import KINDS
from tests.cases import SPECS, served
from tests.steps import EVERY_BACKEND, NATIVE, NEEDS_CPU, Model, ordinary, pair, same, steps_alike, tensors


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
