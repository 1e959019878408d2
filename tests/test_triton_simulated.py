"""The compiled Triton kernels, run: right by the criterion, no race. A sample; `make simulate` runs all."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("for a process without a GPU that does not interpret", allow_module_level=True)

from rmc_kernels import backends
from rmc_kernels.backends.reference import unroll
from rmc_kernels.verify import criterion
from tests.cases import SPECS, draw
from tests.ptxsim import Schedule
from tests.simulated import simulated

TRITON = backends.BACKENDS["triton"]
SERVED = [name for name, spec in SPECS.items() if spec.variant != "l0sg"]
DTYPES = ("float32", "bfloat16", "float16")
TARGETS = ("sm_80", "sm_90")
SAMPLE = [
    ("sonnet", "float32", "sm_80"),
    ("textbook", "float16", "sm_80"),
    ("matrix-blocks", "bfloat16", "sm_90"),
]
ALL = [
    pytest.param(name, dtype, target, marks=() if (name, dtype, target) in SAMPLE else pytest.mark.simulate)
    for target in TARGETS
    for dtype in DTYPES
    for name in SERVED
]


@pytest.mark.parametrize("name, dtype, target", ALL)
def test_forward(name: str, dtype: str, target: str) -> None:
    """48 steps of batch elements at least: as many errors as `rmc verify` pools."""
    case = draw(SPECS[name], ("lengths", "resets"), batch=17, steps=3, dtype=getattr(torch, dtype))
    exact, eager = unroll(case.spec, case.to(torch.float64).call())[0], unroll(case.spec, case.call())[0]
    schedules: tuple[Schedule, ...] = ("lockstep", "warp")
    for schedule in schedules:
        with simulated(target, schedule, seed=len(name)) as reports:
            memories = TRITON.forward(case.spec, case.call(), False)[0]
        assert [race for report in reports for race in report.races] == []
        found = criterion(memories, eager, exact)
        assert found.ok, f"{schedule}: {found}"


@pytest.mark.simulate
@pytest.mark.parametrize("target", TARGETS)
def test_orders_of_warps_give_the_same_bits(target: str) -> None:
    case = draw(SPECS["blocks"], ("lengths", "resets"), batch=9, steps=2, dtype=torch.bfloat16)
    found = []
    for seed in range(5):
        with simulated(target, "warp", seed):
            found.append(TRITON.forward(case.spec, case.call(), False)[0])
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.simulate
@pytest.mark.parametrize("name, dtype, target", SAMPLE)
def test_backward(name: str, dtype: str, target: str) -> None:
    """All gradients as one, each in units of its largest element, since a draw of a small one is a lottery."""
    case = draw(SPECS[name], ("lengths", "resets"), batch=3, steps=2, dtype=getattr(torch, dtype))
    spec, call = case.spec, case.call()
    needs = [True] * (3 + len(call.params))
    reference = backends.BACKENDS["reference"]
    with simulated(target, "warp", seed=len(name)) as reports:
        memories, activations = TRITON.forward(spec, call, False)
        grad = torch.randn(memories.shape, generator=torch.Generator().manual_seed(1))
        found = TRITON.backward(spec, call, memories, activations, grad, needs)
    assert [race for report in reports for race in report.races] == []
    wide, nothing = case.to(torch.float64).call(), memories.new_empty(0)
    exact = reference.backward(spec, wide, memories, nothing, grad.double(), needs)
    eager = reference.backward(spec, call, memories, nothing, grad, needs)
    together = [
        torch.cat([(g.double() / e.abs().max().clamp(min=1e-30)).flatten() for g, e in zip(each, exact, strict=True)])
        for each in (found, eager, exact)
    ]
    compared = criterion(together[0].float(), together[1].float(), together[2])
    assert compared.ok, str(compared)
