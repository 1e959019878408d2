"""Step mode beside what users do to layers and tensors: parametrizations, hooks, autocast, transforms, traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune

from rmc_kernels import RelationalMemory
from rmc_kernels.backends import weights
from rmc_kernels.read_heads import KINDS
from tests.steps import EVERY_BACKEND, NEEDS_CPU, Made, Mine, ordinary, pair, same, steps_alike, tensors


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


#: Not the Linear of float32 beside bfloat16: it takes the memory, but its output is not of x's dtype.
HEADS_BY_DTYPE = [(torch.float32, change) for change in HEADS]
HEADS_BY_DTYPE += [(torch.bfloat16, change) for change in HEADS if change is not HEADS[2]]


@EVERY_BACKEND
@pytest.mark.parametrize(("dtype", "change"), HEADS_BY_DTYPE)
def test_read_heads_of_the_user(dtype: torch.dtype, change: Callable[[Any], object], backend: str) -> None:
    torch.manual_seed(0)
    layer, cell = pair(backend=backend, dtype=dtype)
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
