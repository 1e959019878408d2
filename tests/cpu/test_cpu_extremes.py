"""What padding, infinities, NaN and numbers near overflow do in the C++ backend, on every instruction set."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor

from rmc_kernels.backends.cpu import BFLOAT16_ISAS, CpuBackend
from rmc_kernels.backends.protocol import Call
from rmc_kernels.spec import CellSpec
from tests.cpu_cases import ISAS, REFERENCE, SPECS, everything, make, same_bits
from tests.not_finite import VARIANTS, draw_spec, kinds, spoil, spoil_padding, with_lengths

# The first cannot be rounded to bf16, which the AMX split starts with; the second can.
HUGE, LARGE = 3.4e38, 1e37
INF, NAN = float("inf"), float("nan")
#: Odd sizes, so that every axis is padded on every instruction set.
ODD = {
    "sonnet": CellSpec.sonnet(3, 3, 5, 1),
    "key_size": CellSpec.sonnet(3, 3, 5, 3, key_size=7, gate_style="memory"),
    "matrix": CellSpec.sonnet(3, 2, 5, 1, input_rows=3, gate_style=None),
    "blocks": CellSpec.sonnet(3, 2, 5, 1, num_blocks=2, attention_mlp_layers=3),
    "textbook": CellSpec.textbook(3, 3, 5, 1),
    "r2gen": CellSpec.r2gen(3, 5, 1),
    "l0sg": CellSpec.l0sg(2, 5, 3, 1, num_blocks=2),
    "many_slots": CellSpec.r2gen(33, 5, 1),  # where attention multiplies in another way
}


@pytest.mark.parametrize("isa", ISAS)
def test_padding_does_not_matter(isa: str) -> None:
    spec = SPECS["sonnet"]
    call, grad = make(spec, 7, 5, "lr")
    assert call.lengths is not None
    want = everything(CpuBackend(isa), spec, call, grad)
    past = torch.arange(5) >= call.lengths[:, None]
    poisoned = call.x.clone()
    poisoned[past] = float("nan")
    got = everything(CpuBackend(isa), spec, replace(call, x=poisoned), grad)
    same_bits(want, got)
    assert not got["grad of x"][past].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [name for name in SPECS if name != "sonnet_held"])  # whose gates let nothing in
def test_nan_stays_in_its_element(name: str, isa: str) -> None:
    spec = SPECS[name]
    call, _ = make(spec, 5, 4)
    clean = CpuBackend(isa).forward(spec, call, False)[0]
    x = call.x.clone()
    x[2, 1] = float("nan")
    got = CpuBackend(isa).forward(spec, replace(call, x=x), False)[0]
    want = REFERENCE.forward(spec, replace(call, x=x), False)[0]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("isa", ISAS)
def test_closed_gates_hold_the_memory(isa: str) -> None:
    spec = SPECS["sonnet_held"]
    call, grad = make(spec, 3, 5)
    result = everything(CpuBackend(isa), spec, call, grad)
    assert torch.equal(result["memories"], call.memory[:, None].expand_as(result["memories"]))
    assert all(value.isfinite().all() for value in result.values())


def check_like_reference(isa: str, spec: CellSpec, call: object, grad: Tensor) -> None:
    """NaN and infinities in the same places, everything else close."""
    want, got = everything(REFERENCE, spec, call, grad), everything(CpuBackend(isa), spec, call, grad)  # type: ignore[arg-type]
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [-HUGE, LARGE, INF, -INF, NAN])  # HUGE overflows in the scores
def test_extreme_input(value: float, isa: str) -> None:
    spec = SPECS["textbook_projected"]  # without norms, so that finite results come of it
    call, grad = make(spec, 5, 3)
    x = call.x.clone()
    x[2, 1, 4] = value
    check_like_reference(isa, spec, replace(call, x=x), grad * (torch.arange(5) != 2)[:, None, None, None])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "where, value",
    [("gates", HUGE), ("gates", INF), ("gates", -INF), ("gates", NAN), ("mlp", INF), ("mlp", -INF), ("mlp", NAN)],
)
def test_extreme_weight(where: str, value: float, isa: str) -> None:
    spec = SPECS["sonnet"]
    call, _ = make(spec, 5, 3)
    names = list(spec.parameter_names)
    index = names.index("memory_gate.weight" if where == "gates" else "mlp.0.weight")
    params = list(call.params)
    params[index] = params[index].clone()
    params[index][3, 5] = value
    call = replace(call, params=tuple(params))
    want, got = REFERENCE.forward(spec, call, False)[0], CpuBackend(isa).forward(spec, call, False)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, equal_nan=True)
    if where == "gates" and abs(value) == INF:
        assert want.isfinite().all()  # a gate that is open or closed


@pytest.mark.parametrize("isa", ISAS)
def test_scores_that_are_far_apart(isa: str) -> None:
    """Further than the exponential reaches."""
    spec = SPECS["textbook_projected"]  # without a norm of q and k
    call, grad = make(spec, 5, 3)
    index = list(spec.parameter_names).index("blocks.0.qkv.weight")
    params = [param * 100 if i == index else param for i, param in enumerate(call.params)]
    call = replace(call, params=tuple(params))
    assert all(value.isfinite().all() for value in everything(CpuBackend(isa), spec, call, grad).values())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [HUGE, INF, NAN])
def test_extreme_gradient(value: float, isa: str) -> None:
    spec = SPECS["textbook_projected"]
    call, grad = make(spec, 5, 3)
    grad[1, 2, 0, 3] = value
    plain, got = everything(CpuBackend("generic"), spec, call, grad), everything(CpuBackend(isa), spec, call, grad)
    for name, want in plain.items():
        assert torch.equal(got[name].isfinite(), want.isfinite()), name
    if value != HUGE:  # whose products overflow in some weights only
        assert not got["grad of x"].isfinite().all()


def travels_as_in_eager(backend: CpuBackend, spec: CellSpec, call: Call, grad: Tensor, kind: bool = True) -> int:
    """Nothing is lost that eager PyTorch keeps, and nothing kept that it loses; the rest is close.

    Args:
        kind: whether a lost number must be the same infinity, or NaN, in gradients too. It need not be where an
            infinite gradient goes through a LayerNorm, which adds infinities of either sign in an order of its own.

    Returns:
        How many numbers are lost.
    """
    want = everything(REFERENCE, spec, call, grad)
    full, saved = (everything(backend, spec, call, grad, save) for save in (False, True))
    same_bits(full, saved)
    lost = 0
    for name, value in want.items():
        found, expected = kinds(full[name]), kinds(value)
        if not kind and name != "memories":
            found, expected = found > 0, expected > 0
        assert torch.equal(found, expected), (name, spec)
        lost += int((expected > 0).sum())
        if call.x.dtype is torch.float32:
            torch.testing.assert_close(full[name].nan_to_num(0, 0, 0), value.nan_to_num(0, 0, 0), rtol=1e-3, atol=1e-3)
    return lost


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ODD)
def test_an_infinity_in_each_parameter(name: str, isa: str) -> None:
    """An infinite activation beside padded columns, whose weights are 0."""
    spec = ODD[name]
    call, grad = make(spec, 2, 2)
    spoils = 0
    for i, param in enumerate(call.params):
        for at, value in ((0, -INF), (param.numel() - 1, INF)):
            spoiled = param.clone()
            spoiled.view(-1)[at] = value
            params = (*call.params[:i], spoiled, *call.params[i + 1 :])
            spoils += travels_as_in_eager(CpuBackend(isa), spec, replace(call, params=params), grad) > 0
    assert spoils > len(call.params)  # a gate that is open or closed, or a ReLU that is shut, loses nothing


#: Values, and whether there may be lengths: a step past them multiplies 0 with the parameters, in eager PyTorch too.
PLACES = {"inputs": ((INF, -INF, NAN), True), "parameters": ((INF, -INF), False), "gradient": ((INF, -INF, NAN), True)}


def check_random_cells(isa: str, where: str, seeds: range, dtype: torch.dtype = torch.float32) -> None:
    values, lengths = PLACES[where]
    drawn, lost = set(), 0
    for seed in seeds:
        random = Random(seed)
        spec = draw_spec(random)
        options = random.choice(("", "r", "l", "lr")) if lengths else random.choice(("", "r"))
        call, grad = make(spec, random.choice((1, 3, 5)), random.choice((1, 2, 3)), options, seed=seed)
        call, grad = spoil(random, call, grad, where, values)
        if dtype is not torch.float32:
            mask = None if call.dropout_mask is None else call.dropout_mask.to(dtype)
            params = tuple(param.to(dtype) for param in call.params)
            call = replace(call, x=call.x.to(dtype), params=params, dropout_mask=mask)
        lost += travels_as_in_eager(CpuBackend(isa), spec, call, grad, kind=where != "gradient") > 0
        drawn.add(spec.variant)
    assert drawn == set(VARIANTS)
    assert lost > len(seeds) / 2  # the rest fell on closed gates, ReLUs and elements that do not run


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("where", PLACES)
def test_random_cells(where: str, isa: str) -> None:
    check_random_cells(isa, where, range(12))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("where", PLACES)
def test_many_random_cells(where: str, isa: str) -> None:
    check_random_cells(isa, where, range(1000, 1300))


@pytest.mark.parametrize("isa", BFLOAT16_ISAS)
def test_random_cells_in_bfloat16(isa: str) -> None:
    check_random_cells(isa, "inputs", range(24), torch.bfloat16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["sonnet", "matrix", "textbook", "r2gen", "l0sg"])
@pytest.mark.parametrize("value", [INF, NAN])
def test_what_no_step_reads_does_not_matter(value: float, name: str, isa: str) -> None:
    """The memories of elements that never run, and x and dropout masks past the length."""
    spec, backend = ODD[name], CpuBackend(isa)
    call, grad = make(spec, 4, 3, "r")
    call = with_lengths(call)
    spoiled = spoil_padding(call, value)
    clean = everything(backend, spec, call, grad)
    for save in (False, True):
        got = everything(backend, spec, spoiled, grad, save)
        same_bits(clean, got, tuple(clean.keys() - {"memories"}))
        assert torch.equal(got["memories"][[1, 2]], clean["memories"][[1, 2]])
        assert (kinds(got["memories"][[0, 3]]) == kinds(torch.tensor(value))).all()
        torch.testing.assert_close(got["grad of memory"][[0, 3]], grad[[0, 3]].sum(1))
    for name, gradient in everything(REFERENCE, spec, spoiled, grad).items():
        if name != "memories":
            torch.testing.assert_close(clean[name], gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_a_norm_of_numbers_whose_square_overflows(isa: str) -> None:
    """Its result is its bias, by an infinite deviation. A LayerNorm of PyTorch may give NaN instead."""
    spec = ODD["sonnet"]
    call, _ = make(spec, 3, 2)
    memory = call.memory.clone()
    memory[1] = 1e38  # whose sum overflows too
    clean = CpuBackend(isa).forward(spec, call, False)[0]
    got = CpuBackend(isa).forward(spec, replace(call, memory=memory), False)[0]
    assert got.isfinite().all()
    assert got[1].max() > 1e30
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("isa", ISAS)
def test_huge_numbers_spoil_no_more_than_in_eager(isa: str) -> None:
    """Where queries and keys are normalised: what comes near overflow elsewhere depends on the order of sums."""
    finite_here_only = 0
    for seed in range(40):
        random = Random(seed)
        spec = draw_spec(random, ("sonnet", "l0sg"))
        call, grad = make(spec, 3, random.choice((1, 2)), seed=seed)
        call, _ = spoil(random, call, grad, "inputs", (1e38, -1e38))
        want, got = REFERENCE.forward(spec, call, False)[0], CpuBackend(isa).forward(spec, call, False)[0]
        assert not (want.isfinite() & ~got.isfinite()).any()
        finite_here_only += int((got.isfinite() & ~want.isfinite()).sum())
    assert finite_here_only > 0
