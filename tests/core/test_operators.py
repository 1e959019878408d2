"""The registered operators: schemas, fakes, compile, export, and where eager calls bypass them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from rmc_kernels import RelationalMemory, backends
from rmc_kernels.backends import Call
from tests.cases import SPECS, DrawnCall, draw, served

BACKENDS = [name for name, backend in backends.BACKENDS.items() if backend.unavailable() is None]


def _forward_arguments(case: DrawnCall, backend: str, save: bool) -> tuple[Any, ...]:
    call = case.call()
    tensors = (call.x, call.memory, list(call.params), call.lengths, call.resets, call.reset_memory, call.dropout_mask)
    return (*tensors, case.spec.as_json, backend, save)


@pytest.mark.parametrize(
    "backend, name, permuted",
    [
        pytest.param(
            b,
            name,
            permuted,
            marks=[pytest.mark.slow] if b == "triton" and (name, permuted) != ("sonnet", True) else [],
        )
        for permuted in (False, True)
        for b in BACKENDS
        for name in ("sonnet", "matrix-blocks", "textbook", "l0sg", "r2gen")
        if served(b, name)
    ],
)
def test_opcheck(backend: str, name: str, permuted: bool) -> None:
    case = draw(SPECS[name], ("lengths", "resets"), batch=2, steps=3, dtype=torch.float32)
    if permuted:
        case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
        case.memory = case.memory.transpose(1, 2).contiguous().transpose(1, 2)
    for save in (False, True):
        # With `save` the traced outputs are not compared: padding inside the activations' bytes is never written.
        utilities = ("test_schema", "test_faketensor", *(() if save else ("test_aot_dispatch_dynamic",)))
        arguments = _forward_arguments(case, backend, save)
        torch.library.opcheck(torch.ops.rmc_kernels.unroll_forward.default, arguments, test_utils=utilities)
        memories, activations = torch.ops.rmc_kernels.unroll_forward(*arguments)
        grad = torch.ones_like(memories)
        needs = [True] * (3 + len(case.params))
        backward = (grad, memories, activations, *arguments[:-1], needs)
        torch.library.opcheck(torch.ops.rmc_kernels.unroll_backward.default, backward, test_utils=utilities)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_eager_calls_bypass_the_operators(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(SPECS["sonnet"], dtype=torch.float32, requires_grad=True)

    class Forbidden:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"operator {name} was called")

    monkeypatch.setattr(torch.ops, "rmc_kernels", Forbidden())
    case.through_function(backend).sum().backward()
    assert case.x.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_make_fx_records_the_operators(backend: str) -> None:
    case = draw(SPECS["sonnet"], dtype=torch.float32)

    def run(x: Tensor) -> Tensor:
        return DrawnCall(case.spec, x, case.memory, case.params, {}).through_function(backend)

    graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(case.x)
    assert any("unroll_forward" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(case.x), run(case.x))


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[pytest.mark.slow] if name == "triton" else []) for name in BACKENDS]
)
def test_compiled_gradients_equal_eager_ones(backend: str) -> None:
    case = draw(SPECS["sonnet"], ("lengths", "resets"), batch=3, steps=4, dtype=torch.float32, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(DrawnCall.through_function, fullgraph=True, backend="aot_eager")
    leaves = tuple(case.leaves().values())
    memories, expected = compiled(case, backend), case.through_function(backend)
    torch.testing.assert_close(memories, expected)
    ours = torch.autograd.grad(memories.square().sum(), leaves)
    theirs = torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def _fused() -> list[str]:
    return [name for name in BACKENDS if name != "reference"]


def _interpreted_is_slow() -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name == "triton" else []) for name in _fused()]


@pytest.mark.parametrize("backend", _interpreted_is_slow())
def test_a_compiled_layer_does_not_recompile_for_other_sizes(backend: str) -> None:
    layer = RelationalMemory(5, 3, 4, 2, backend=backend)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    compilations = set()
    for batch, steps in ((2, 3), (4, 3), (4, 6), (7, 9)):
        x = torch.randn(batch, steps, 5)
        output = compiled(x)[0]
        torch.testing.assert_close(output, layer(x)[0])
        output.sum().backward()
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_export(backend: str) -> None:
    layer = RelationalMemory(5, 3, 4, 2, backend=backend).eval()
    x = torch.randn(2, 3, 5)
    exported = torch.export.export(layer, (x,))
    for ours, theirs in zip(exported.module()(x), layer(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_function_saves_only_inputs_and_memories() -> None:
    case = draw(SPECS["sonnet"], batch=2, steps=8, dtype=torch.float32, requires_grad=True)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        memories = case.through_function("reference")
    call: Call = case.call()
    inputs = sum(tensor.numel() for tensor in (call.x, call.memory, *call.params))
    assert sum(sizes) == 4 * (inputs + memories.numel())
