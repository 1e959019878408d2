"""What every backend has to do, one suite for all: a new backend joins by being listed in `rmc_kernels.backends`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from rmc_kernels import RelationalMemory, backends, explain, functional, relational_memory
from rmc_kernels.read_heads import KINDS
from rmc_kernels.verify import Case, check_case, criterion
from tests import cases
from tests.cases import OPTIONS, SPECS, DrawnCall, draw, served

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = ("float32", "bfloat16", "float16")


def _serving() -> list[Any]:
    """Every (backend, device, dtype) that this machine can run."""
    found = []
    for name in backends.BACKENDS:
        for device in DEVICES:
            for dtype in DTYPES:
                if served(name, "sonnet", dtype, device):
                    found.append(pytest.param(name, device, dtype, id=f"{name}-{device}-{dtype}"))
    return found


def _served(serving: list[Any], names: Iterable[str]) -> list[Any]:
    """(backend, device, dtype, name) for every spec of those names that is served."""
    return [
        pytest.param(*found.values, name, id=f"{found.id}-{name}")
        for found in serving
        for name in names
        if served(found.values[0], name, found.values[2], found.values[1])
    ]


SERVING = _serving()
FLOAT32 = [serving for serving in SERVING if serving.values[2] == "float32"]
SLOW = (("reference", "cpu"), ("reference", "cuda"), ("triton", "cpu"))


def _gradients(case: DrawnCall, memories: Tensor) -> dict[str, Tensor]:
    leaves = case.leaves()
    weight = torch.linspace(-1, 1, memories.numel(), dtype=memories.dtype).view_as(memories)
    found = torch.autograd.grad((memories * weight).sum(), list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, found, strict=True)}


def _marks(found: Any) -> list[pytest.MarkDecorator]:
    """Slow where Triton interprets: `make interpret` has all, `make test` a sample in `test_triton_backward.py`."""
    return [pytest.mark.slow] if found.values[:2] == ("triton", "cpu") else []


def _interpreted_slow(serving: list[Any]) -> list[Any]:
    """The same with `_marks`, for tests that take many launches."""
    return [pytest.param(*found.values, id=found.id, marks=_marks(found)) for found in serving]


def _dear(found: Any, option: str) -> list[pytest.MarkDecorator]:
    """Slow where a cheaper case stands for it: without options, and float16, which is widened as bfloat16 is."""
    backend, _, dtype, name = found.values
    plain = option == "plain" and name not in cases.VARIANTS
    return [pytest.mark.slow] if backend == "cpu" and (plain or dtype == "float16") else []


def _parity_cases() -> list[Any]:
    """Every spec in float32; half types, and the reference against itself, on a sample; `rmc verify` does the rest.

    So it is where Triton interprets; `test_triton_interpreted.py` has every spec and dtype.
    """
    return [
        pytest.param(*found.values, option, id=f"{found.id}-{option}", marks=[*_marks(found), *_dear(found, option)])
        for found in _served(SERVING, SPECS)
        for option in OPTIONS
        if (found.values[2] == "float32" and found.values[:2] not in SLOW)
        or (found.values[3] in cases.VARIANTS and option == "lengths-resets")
    ]


@pytest.mark.parametrize("backend, device, dtype, name, option", _parity_cases())
def test_parity(backend: str, device: str, dtype: str, name: str, option: str) -> None:
    spec, options = SPECS[name], OPTIONS[option]
    case = Case(
        spec, dtype, 5, 5, lengths="lengths" in options, resets="resets" in options, dropout_mask=spec.dropout > 0
    )
    result = check_case(case, backend, device=device)
    assert result.status == "right", (result.reason, result.misses)


def _saved_cases() -> list[Any]:
    names = ["blocks", "matrix", "textbook", "r2gen"]
    return [pytest.param(*found.values, id=found.id, marks=_marks(found)) for found in _served(FLOAT32, names)]


@pytest.mark.parametrize("backend, device, dtype, name", _saved_cases())
def test_parity_with_saved_activations(backend: str, device: str, dtype: str, name: str) -> None:
    result = check_case(Case(SPECS[name], dtype, 5, 5, lengths=True, resets=True, recompute="none"), backend)
    assert result.status == "right", (result.reason, result.misses)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend, device, dtype", SERVING)
def test_read_heads(backend: str, device: str, dtype: str, kind: str) -> None:
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"read_head": kind, "dtype": getattr(torch, dtype)}
    layer = RelationalMemory(5, 3, 4, 2, backend=backend, **kwargs)
    exact_layer = RelationalMemory(5, 3, 4, 2, read_head=kind, dtype=torch.float64, backend="reference")
    eager_layer = RelationalMemory(5, 3, 4, 2, backend="reference", **kwargs)
    exact_layer.load_state_dict(layer.state_dict())
    eager_layer.load_state_dict(layer.state_dict())
    x = torch.randn(4, 6, 5, dtype=getattr(torch, dtype))
    lengths = torch.tensor([6, 0, 3, 5])
    output, _ = layer(x, lengths=lengths)
    found = criterion(output, eager_layer(x, lengths=lengths)[0], exact_layer(x.double(), lengths=lengths)[0])
    assert found.ok, str(found)
    assert output.dtype == x.dtype
    assert output[1].abs().max() == 0
    assert output[2, 3:].abs().max() == 0


def _chunk_cases() -> list[Any]:
    every = [found for found in SERVING if found.values[:2] != ("triton", "cpu")]
    interpreted = [found for found in SERVING if found not in every]
    return _served(every, SPECS) + _served(interpreted, (*cases.VARIANTS, "blocks", "matrix"))


@pytest.mark.parametrize("backend, device, dtype, name", _chunk_cases())
def test_chunks_equal_the_whole_bit_for_bit(backend: str, device: str, dtype: str, name: str) -> None:
    case = draw(SPECS[name], ("lengths", "resets"), dtype=getattr(torch, dtype), steps=6)
    whole = case.through_function(backend)
    memory, parts = case.memory, []
    for a, b in ((0, 1), (1, 4), (4, 6)):
        options = dict(case.options)
        options["lengths"] = (options["lengths"] - a).clamp(0, b - a)
        for key in ("resets", "dropout_mask"):
            if key in options:
                options[key] = options[key][:, a:b]
        part = DrawnCall(case.spec, case.x[:, a:b], memory, case.params, options).through_function(backend)
        memory = part[:, -1]
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("batch, steps", [(0, 3), (2, 0), (1, 1), (1, 2)])
@pytest.mark.parametrize("backend, device, dtype, name", _interpreted_slow(_served(FLOAT32, cases.VARIANTS)))
def test_empty_and_single(backend: str, device: str, dtype: str, name: str, batch: int, steps: int) -> None:
    case = draw(SPECS[name], ("lengths", "resets"), batch=batch, steps=steps, dtype=torch.float32, requires_grad=True)
    memories = case.through_function(backend)
    assert memories.shape == (batch, steps, case.spec.mem_slots, case.spec.mem_size)
    gradients = _gradients(case, memories)
    expected = _gradients(case, relational_memory(**case.arguments(), backend="reference")[0])
    for key, value in gradients.items():
        torch.testing.assert_close(value, expected[key], msg=key)


@pytest.mark.parametrize("backend, device, dtype", _interpreted_slow(FLOAT32))
def test_repeats_bit_for_bit(backend: str, device: str, dtype: str) -> None:
    case = draw(SPECS["blocks"], ("lengths", "resets"), dtype=torch.float32, requires_grad=True)
    first = case.through_function(backend)
    gradients = _gradients(case, first)
    again = case.through_function(backend)
    assert torch.equal(first, again)
    for name, value in _gradients(case, again).items():
        assert torch.equal(value, gradients[name]), name


@pytest.mark.parametrize("backend, device, dtype", _interpreted_slow(FLOAT32))
def test_only_the_gradients_asked_for(backend: str, device: str, dtype: str) -> None:
    case = draw(SPECS["sonnet"], ("resets",), dtype=torch.float32, requires_grad=True)
    everything = _gradients(case, case.through_function(backend))
    for name in ("x", "memory", "reset_memory", "mlp.1.weight", "memory_gate.bias"):
        for other, leaf in case.leaves().items():
            leaf.requires_grad_(other == name)
        memories = case.through_function(backend)
        weight = torch.linspace(-1, 1, memories.numel()).view_as(memories)
        (found,) = torch.autograd.grad((memories * weight).sum(), [case.leaves()[name]])
        torch.testing.assert_close(found, everything[name])


@pytest.mark.parametrize("used", ["memories", "final", "both"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("backend, device, dtype", _interpreted_slow(FLOAT32))
def test_gradients_through_the_memories_and_through_the_final_one(
    backend: str, device: str, dtype: str, steps: int, used: str
) -> None:
    case = draw(SPECS["sonnet"], ("lengths",), batch=2, steps=steps, dtype=torch.float32, requires_grad=True)
    call = case.call()
    memories, final = functional.run(case.spec, call, backend, "full")
    expected = functional.run(case.spec, call, "reference", "full")[0]
    assert torch.equal(final, memories[:, -1])
    weight = torch.linspace(-1, 1, memories.numel()).view_as(memories)

    def loss(memories: Tensor, final: Tensor) -> Tensor:
        whole, last = (memories * weight).sum(), final.square().sum()
        return {"memories": whole, "final": last, "both": whole + last}[used]

    ours = _gradients(case, loss(memories, final))
    theirs = _gradients(case, loss(expected, expected[:, -1]))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("backend, device, dtype", FLOAT32)
def test_gradients_are_contiguous_whatever_the_parameter_is(backend: str, device: str, dtype: str) -> None:
    """As the operators' fakes say, by which torch.compile lays out memory."""
    case = draw(SPECS["sonnet"], dtype=torch.float32)
    weight = case.params["mlp.0.weight"]
    case.params["mlp.0.weight"] = weight.detach().t().contiguous().t().requires_grad_()
    assert not case.params["mlp.0.weight"].is_contiguous()
    (found,) = torch.autograd.grad(case.through_function(backend).sum(), [case.params["mlp.0.weight"]])
    assert found.is_contiguous()


@pytest.mark.parametrize("backend, device, dtype", FLOAT32)
def test_a_mask_that_wants_a_gradient_is_refused(backend: str, device: str, dtype: str) -> None:
    case = draw(SPECS["r2gen"], dtype=torch.float32)
    shape = (*case.x.shape[:2], case.spec.num_heads, case.spec.mem_slots, case.spec.total_rows)
    case.options["dropout_mask"] = torch.ones(shape, requires_grad=True)
    if backend == "reference":
        memories, _ = relational_memory(**case.arguments(), backend=backend)
        (found,) = torch.autograd.grad(memories.sum(), [case.options["dropout_mask"]])
        assert found.abs().sum() > 0
        return
    with pytest.raises(ValueError, match="dropout_mask must not require a gradient"):
        relational_memory(**case.arguments(), backend=backend)
    with torch.no_grad():
        relational_memory(**case.arguments(), backend=backend)


@pytest.mark.parametrize("backend, device, dtype", FLOAT32)
def test_double_backward_names_the_reference(backend: str, device: str, dtype: str) -> None:
    case = draw(SPECS["sonnet"], dtype=torch.float32, requires_grad=True)
    (grad,) = torch.autograd.grad(case.through_function(backend).square().sum(), [case.x], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad.sum().backward()


@pytest.mark.parametrize("backend, device, dtype", FLOAT32)
def test_nan_in_gives_nan_out(backend: str, device: str, dtype: str) -> None:
    case = draw(SPECS["sonnet"], dtype=torch.float32)
    case.x[1, 2, 0] = float("nan")
    memories = case.through_function(backend)
    assert memories[1, 2:].isnan().all()
    assert memories[1, :2].isfinite().all()
    assert memories[[0, 2]].isfinite().all()


def test_explain_names_every_backend() -> None:
    found = explain(SPECS["sonnet"], torch.zeros(1))
    assert {found.backend, *found.reasons} == set(backends.CHOICES) - {"auto"}
    assert all(found.reasons.values())
    assert str(found).startswith(f"{found.backend}: runs")


def test_explain_sends_float64_and_transforms_to_the_reference() -> None:
    spec = SPECS["sonnet"]
    wide = explain(spec, torch.zeros(1, dtype=torch.float64))
    assert wide.backend == "reference"
    meta = explain(spec, torch.zeros(1, device="meta"))
    assert meta.backend == "reference"
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(explain(spec, x).backend)
        return x

    torch.func.vmap(look)(torch.zeros(2, 3))
    assert seen == ["reference"]


def test_an_explicit_backend_that_cannot_serve_raises() -> None:
    case = draw(SPECS["sonnet"])
    for name in set(backends.CHOICES) - {"auto", "reference"}:
        with pytest.raises(ValueError, match=f'backend "{name}" cannot serve'):
            relational_memory(**case.arguments(), backend=name)
    with pytest.raises(ValueError, match="backend must be one of"):
        relational_memory(**case.arguments(), backend="cudnn")
