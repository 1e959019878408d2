"""The compiled Triton kernels, run: right by the criterion, no race, in any order of warps the same bits.

A sample; `make simulate` runs all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("for a process without a GPU that does not interpret", allow_module_level=True)

from rmc_kernels import backends
from rmc_kernels.backends.reference import unroll
from tests.cases import SPECS, draw
from tools.simulate import simulate
from tools.simulate.simulated import simulated

TRITON = backends.BACKENDS["triton"]


@pytest.mark.parametrize("cell", [("textbook", "float16", "sm_80"), ("memory-gate", "bfloat16", "sm_90")])
def test_forward(cell: tuple[str, str, str]) -> None:
    assert simulate.forward(*cell).instructions


@pytest.mark.slow
@pytest.mark.parametrize("cell", [("textbook", "float16", "sm_80")])
def test_backward(cell: tuple[str, str, str]) -> None:
    assert simulate.backward(*cell).instructions


def test_cells_begin_with_every_kind() -> None:
    found = list(simulate.cells())
    assert len(found) == len({str(cell) for cell in found}) == 2 * 14 * 6
    first = found[: 2 * 14]
    assert {(cell.run, cell.name) for cell in first} == {(cell.run, cell.name) for cell in found}
    assert {(cell.dtype, cell.target) for cell in first} == set(simulate.KINDS)


def test_the_page_has_what_was_run() -> None:
    text = simulate.PAGE.read_text()
    assert simulate.within(text, simulate.load()) == text, "run `make simulate`"


def test_what_was_found_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = simulate.load()
    assert known
    broken = {"sources": "triton 3.7.1, 0", "outcome": 'AssertionError: "a, b"'}
    found = {**known, "a cell": broken}
    monkeypatch.setattr(simulate, "RESULTS", tmp_path / "simulate.csv")
    assert simulate.load() == {}
    simulate.save(found)
    assert simulate.load() == found


@pytest.mark.slow
def test_orders_of_warps_give_the_same_bits() -> None:
    case = draw(SPECS["blocks"], ("lengths", "resets"), batch=9, steps=2, dtype=torch.bfloat16)
    found = []
    for seed in range(5):
        with simulated("sm_80", "warp", seed):
            found.append(TRITON.forward(case.spec, case.call(), False)[0])
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 allowed; `monkeypatch` would delete torch's setting at the end."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    yield
    matmul.allow_tf32 = before


@pytest.mark.slow
def test_tf32(tf32: None) -> None:
    """Not the criterion, whose yardstick is exact float32: an error of the size of TF32's rounding."""
    case = draw(SPECS["sonnet"], batch=9, dtype=torch.float32)
    with simulated("sm_80") as reports:
        memories = TRITON.forward(case.spec, case.call(), False)[0]
    assert [race for report in reports for race in report.races] == []
    exact = unroll(case.spec, case.to(torch.float64).call())[0]
    assert 1e-5 < float((memories - exact).abs().max()) < 1e-2
