"""The definition: its derivatives, its options, its edge cases, and the transforms it works under."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rmc_kernels import CellSpec, relational_memory
from tests import cases
from tests.cases import OPTIONS, SPECS, DrawnCall, draw


def _run(case: DrawnCall) -> tuple[Tensor, Tensor]:
    return relational_memory(**case.arguments(), backend="reference")


def _function(case: DrawnCall):  # type: ignore[no-untyped-def]
    """`case` as a function of its differentiable tensors, for gradcheck."""
    names = list(case.leaves())

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, values, strict=True))
        options = dict(case.options)
        if "reset_memory" in given:
            options["reset_memory"] = given.pop("reset_memory")
        x, memory = given.pop("x"), given.pop("memory")
        return _run(DrawnCall(case.spec, x, memory, given, options))

    return run, tuple(case.leaves().values())


@pytest.mark.parametrize("name", SPECS)
def test_gradcheck(name: str) -> None:
    case = draw(SPECS[name], ("lengths", "resets"), batch=2, steps=2, requires_grad=True, seed=1)
    run, inputs = _function(case)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_gradgradcheck(variant: str) -> None:
    spec = {
        "sonnet": CellSpec.sonnet(2, 2, 2),
        "textbook": CellSpec.textbook(3, 2, 2),
        "l0sg": CellSpec.l0sg(2, 2, 2),
        "r2gen": CellSpec.r2gen(2, 2),
    }[variant]
    run, inputs = _function(draw(spec, ("resets",), batch=1, steps=2, requires_grad=True, seed=2))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", SPECS)
def test_batch_elements_never_interact(name: str) -> None:
    case = draw(SPECS[name], batch=3)
    whole = _run(case)[0]
    options = {key: value[1:2] for key, value in case.options.items()}
    alone = _run(DrawnCall(case.spec, case.x[1:2], case.memory[1:2], case.params, options))[0]
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["sonnet", "blocks", "matrix", "memory-gate", "no-gate", "textbook", "r2gen"])
def test_slots_are_permutation_equivariant(name: str) -> None:
    case = draw(replace(SPECS[name], dropout=0.0))
    order = torch.randperm(case.spec.mem_slots, generator=torch.Generator().manual_seed(3))
    permuted = DrawnCall(case.spec, case.x, case.memory[:, order], case.params, {})
    torch.testing.assert_close(_run(permuted)[0], _run(case)[0][:, :, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_equal_the_whole_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    case = draw(SPECS[name], ("lengths", "resets"), dtype=dtype)
    whole, final = _run(case)
    memory, parts = case.memory, []
    for a, b in ((0, 1), (1, 1), (1, 4), (4, 5)):
        options = dict(case.options)
        options["lengths"] = (options["lengths"] - a).clamp(0, b - a)
        for key in ("resets", "dropout_mask"):
            if key in options:
                options[key] = options[key][:, a:b]
        part, memory = _run(DrawnCall(case.spec, case.x[:, a:b], memory, case.params, options))
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(memory, final)
    assert whole.dtype == (torch.float32)


def test_lengths_freeze_the_memory_and_resets_past_them_are_ignored() -> None:
    case = draw(SPECS["sonnet"], ("lengths", "resets"), batch=4, steps=6)
    case.options["lengths"] = torch.tensor([0, 2, 6, 3])
    case.options["resets"] = torch.ones(4, 6, dtype=torch.bool)
    memories, final = _run(case)
    assert torch.equal(memories[0], case.memory[0].expand(6, -1, -1))
    for b, length in enumerate([0, 2, 6, 3]):
        last = memories[b, length - 1] if length else case.memory[b]
        assert torch.equal(memories[b, length:], last.expand(6 - length, -1, -1))
        assert torch.equal(final[b], last)
    short = DrawnCall(case.spec, case.x[1:2, :2], case.memory[1:2], case.params, {})
    short.options = {"resets": case.options["resets"][1:2, :2], "reset_memory": case.options["reset_memory"][1:2]}
    torch.testing.assert_close(memories[1:2, :2], _run(short)[0], rtol=1e-12, atol=1e-12)


def test_a_reset_starts_from_reset_memory_and_cuts_the_gradient() -> None:
    case = draw(SPECS["sonnet"], ("resets",), batch=1, steps=4, requires_grad=True)
    case.options["resets"] = torch.tensor([[False, False, True, False]])
    memories, _ = _run(case)
    fresh = DrawnCall(case.spec, case.x[:, 2:], case.options["reset_memory"], case.params, {})
    torch.testing.assert_close(memories[:, 2:], _run(fresh)[0], rtol=1e-12, atol=1e-12)
    memories[:, 3].sum().backward()
    assert case.x.grad is not None
    assert case.x.grad[:, :2].abs().max() == 0
    assert case.x.grad[:, 2:].abs().min() > 0
    assert case.memory.grad is not None
    assert case.memory.grad.abs().max() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blocks", "no-gate", "l0sg", "r2gen"])
def test_what_stands_in_the_padding_never_matters(name: str, value: float) -> None:
    """Of x and a dropout mask behind the length; and of both memories where an element never runs."""

    def gradients(case: DrawnCall) -> dict[str, Tensor]:
        memories, _ = _run(case)
        memories.sum().backward()
        return {key: leaf.grad for key, leaf in case.leaves().items() if leaf.grad is not None}

    clean, spoiled = (draw(SPECS[name], ("lengths", "resets"), batch=3, steps=4, requires_grad=True) for _ in range(2))
    for case in (clean, spoiled):
        case.options |= {"lengths": torch.tensor([2, 4, 0]), "resets": torch.arange(4).expand(3, 4) > 0}
    with torch.no_grad():
        spoiled.x[0, 2:] = value
        spoiled.x[2] = value
        spoiled.memory[2] = value
        spoiled.options["reset_memory"][2] = value
        if "dropout_mask" in spoiled.options:
            spoiled.options["dropout_mask"][0, 2:] = value
    assert torch.equal(_run(spoiled)[0][:2], _run(clean)[0][:2])
    frozen = spoiled.memory[2].expand(4, -1, -1)
    torch.testing.assert_close(_run(spoiled)[0][2], frozen, rtol=0, atol=0, equal_nan=True)
    want, got = gradients(clean), gradients(spoiled)
    assert set(want) == set(spoiled.leaves())
    for key, grad in want.items():
        assert torch.equal(got[key], grad), key
    assert not got["x"][0, 2:].any()
    assert torch.equal(got["memory"][2], torch.full_like(got["memory"][2], 4))


def test_infinite_biases_leave_the_memory_exactly_unchanged() -> None:
    spec = replace(SPECS["sonnet"], forget_bias=float("inf"), input_bias=float("-inf"))
    case = draw(spec, dtype=torch.float32)
    memories, final = _run(case)
    assert torch.equal(memories, case.memory[:, None].expand_as(memories))
    assert torch.equal(final, case.memory)


def test_gates_of_half_types_are_float32() -> None:
    """By one gate shut and the other known: M' is then f M, or tanh(C) of a candidate that is a half number."""
    for dtype in (torch.bfloat16, torch.float16):
        case = draw(SPECS["sonnet"], steps=1, dtype=dtype)
        size = case.spec.gate_size
        for name in ("input_gate.weight", "memory_gate.weight", "memory_gate.bias"):
            case.params[name].zero_()
        gates = case.params["input_gate.bias"]  # the input gate's half comes first
        gates[:size] = -1e4
        forget = torch.sigmoid(gates[size:].float() + case.spec.forget_bias)
        torch.testing.assert_close(_run(case)[1], forget * case.memory, rtol=1e-6, atol=0)
        gates[:size], gates[size:] = 1e4, -1e4
        candidate = torch.atanh(_run(case)[1].double())
        torch.testing.assert_close(candidate, candidate.to(dtype).double(), rtol=0, atol=1e-5)


def test_nan_in_gives_nan_out_for_that_element_only() -> None:
    case = draw(SPECS["sonnet"], dtype=torch.float32)
    case.x[1, 2, 0] = float("nan")
    memories, _ = _run(case)
    assert memories[1, 2:].isnan().all()
    assert memories[1, :2].isfinite().all()
    assert memories[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("batch, steps", [(0, 3), (2, 0), (0, 0), (1, 1)])
def test_empty_and_single(name: str, batch: int, steps: int) -> None:
    case = draw(SPECS[name], ("lengths", "resets"), batch=batch, steps=steps, requires_grad=True)
    memories, final = _run(case)
    assert memories.shape == (batch, steps, case.spec.mem_slots, case.spec.mem_size)
    assert final.shape == case.memory.shape
    if not steps:
        assert torch.equal(final, case.memory)


def test_under_torch_func() -> None:
    case = draw(SPECS["sonnet"], batch=2, steps=3)

    def total(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return relational_memory(x[None], case.memory[:1], params, case.spec)[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(case.params, case.x)
    for b in range(2):
        alone = torch.func.grad(total)(case.params, case.x[b])
        for name, gradient in alone.items():
            torch.testing.assert_close(per_sample[name][b], gradient, rtol=1e-10, atol=1e-12)
    tangent = torch.randn_like(case.x)
    forward = torch.func.jvp(lambda x: total(case.params, x), (case.x[0],), (tangent[0],))[1]
    reverse = (torch.func.grad(total, argnums=1)(case.params, case.x[0]) * tangent[0]).sum()
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("name", ["sonnet", "textbook", "l0sg", "r2gen"])
def test_compiles_without_graph_break(name: str) -> None:
    case = draw(SPECS[name], OPTIONS["lengths-resets"], batch=2, steps=2, dtype=torch.float32, requires_grad=True)
    torch._dynamo.reset()  # the cases before compiled the same function for other specs
    compiled = torch.compile(_run, fullgraph=True, backend="aot_eager")
    memories, final = compiled(case)
    expected, expected_final = _run(case)
    torch.testing.assert_close(memories, expected)
    torch.testing.assert_close(final, expected_final)
    leaves = tuple(case.leaves().values())
    ours = torch.autograd.grad(memories.sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad(expected.sum(), leaves, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
