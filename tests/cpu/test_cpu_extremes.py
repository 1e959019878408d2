"""What padding, infinities, NaN and numbers near overflow do in the C++ backend, on every instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rmc_kernels.backends.cpu import CpuBackend
from rmc_kernels.spec import CellSpec
from tests.cpu_cases import ISAS, REFERENCE, SPECS, everything, make, same_bits

# The first cannot be rounded to bf16, which the AMX split starts with; the second can.
HUGE, LARGE = 3.4e38, 1e37
INF, NAN = float("inf"), float("nan")


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
