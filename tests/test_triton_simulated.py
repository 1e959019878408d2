"""The compiled Triton kernels, run: right by the criterion, no race, in any order of warps the same bits.

A sample; `make simulate` runs all.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("for a process without a GPU that does not interpret", allow_module_level=True)

from rmc_kernels import backends
from rmc_kernels.backends.reference import unroll
from rmc_kernels.verify import Case as VerifyCase
from rmc_kernels.verify import baseline, check_case, criterion
from tests.cases import SPECS, Case, draw
from tests.ptxsim import Report
from tests.simulated import simulated

TRITON = backends.BACKENDS["triton"]
SERVED = [name for name, spec in SPECS.items() if spec.variant != "l0sg"]
DTYPES = ("float32", "bfloat16", "float16")
TARGETS = ("sm_80", "sm_90")
#: Run by `make test`. None of the backward pass, whose kernels take minutes to compile and run.
FORWARD_SAMPLE = [("textbook", "float16", "sm_80"), ("memory-gate", "bfloat16", "sm_90")]


def _all(sample: list[tuple[str, str, str]]) -> list[object]:
    """Every kernel; those outside the sample only by `make simulate`."""
    return [
        pytest.param(name, dtype, target, marks=() if (name, dtype, target) in sample else pytest.mark.simulate)
        for target in TARGETS
        for dtype in DTYPES
        for name in SERVED
    ]


def _races(reports: list[Report]) -> list[str]:
    assert reports
    return [race for report in reports for race in report.races]


@pytest.mark.parametrize("name, dtype, target", _all(FORWARD_SAMPLE))
def test_forward(name: str, dtype: str, target: str) -> None:
    """48 steps of batch elements at least: as many errors as `rmc verify` pools."""
    case = draw(SPECS[name], ("lengths", "resets"), batch=17, steps=3, dtype=getattr(torch, dtype))
    with simulated(target, "lockstep") as reports:
        memories = TRITON.forward(case.spec, case.call(), False)[0]
    assert _races(reports) == []
    exact, eager = unroll(case.spec, case.to(torch.float64).call())[0], unroll(case.spec, case.call())[0]
    found = criterion(memories, eager, exact)
    assert found.ok, str(found)
    with simulated(target, "warp", seed=len(name)) as reports:
        assert torch.equal(TRITON.forward(case.spec, case.call(), False)[0], memories)
    assert _races(reports) == []


def _gradients(case: Case, kept: bool) -> list[Tensor]:
    call = case.call()
    memories, activations = TRITON.forward(case.spec, call, kept)
    grad = torch.randn(memories.shape, generator=torch.Generator().manual_seed(1))
    needs = [True, True, call.reset_memory is not None, *[True] * len(call.params)]
    found = TRITON.backward(case.spec, call, memories, activations, grad, needs)
    return [memories, *(gradient for gradient, need in zip(found, needs, strict=True) if need)]


@pytest.mark.parametrize("name, dtype, target", _all([]))
def test_backward(name: str, dtype: str, target: str) -> None:
    """Every gradient, of activations that are computed again and of those that the forward pass kept."""
    spec = SPECS[name]
    case = draw(spec, ("lengths", "resets"), batch=5, steps=2, dtype=getattr(torch, dtype))
    for kept in (False, True):
        found = []
        for schedule in ("lockstep", "warp"):
            with simulated(target, schedule, seed=len(name)) as reports:
                found.append(_gradients(case, kept))
            assert _races(reports) == []
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    verified = VerifyCase(
        spec, dtype, 16, 3, lengths=True, resets=True, dropout_mask=not spec.input_rows_live,
        recompute=("full", "none")[len(name) % 2],
    )  # fmt: skip
    fewest = dict.fromkeys(baseline.FEWEST_DRAWS, 4)
    with patch.object(baseline, "FEWEST_DRAWS", fewest), simulated(target) as reports:
        result = check_case(verified, "triton")
    assert result.status == "right", (result.reason, result.misses)
    assert _races(reports) == []


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
def test_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the criterion, whose yardstick is exact float32: an error of the size of TF32's rounding."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    case = draw(SPECS["sonnet"], batch=9, dtype=torch.float32)
    with simulated("sm_80") as reports:
        memories = TRITON.forward(case.spec, case.call(), False)[0]
    assert _races(reports) == []
    exact = unroll(case.spec, case.to(torch.float64).call())[0]
    assert 1e-5 < float((memories - exact).abs().max()) < 1e-2
