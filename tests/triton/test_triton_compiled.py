"""The Triton kernels compiled, without a GPU: tiles of the table for their targets, and what a launch promises."""

from __future__ import annotations

import inspect
import os
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("for a process without a GPU that does not interpret", allow_module_level=True)

import triton
from triton.compiler import ASTSource

from rmc_kernels import CellSpec, backends, explain
from rmc_kernels.backends.triton import launch, tiles
from rmc_kernels.backends.triton.activations import training_plan
from rmc_kernels.backends.triton.device.forward_kept import forward_kept
from rmc_kernels.backends.triton.plan import Plan
from rmc_kernels.backends.triton.plan import _source as source_of_plan
from rmc_kernels.backends.triton.tiles import BACKWARD, TABLE, Tile
from tests.cases import SPECS, draw
from tools.compile_matrix.matrix import MEASURED, Job, compile_jobs, load, sample, worse
from tools.offline import offline

TRITON = backends.BACKENDS["triton"]


def test_without_a_device_the_reason_is_given() -> None:
    assert "Triton has no device" in str(TRITON.unavailable())


def test_without_triton_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.setattr("rmc_kernels.backends.triton.backend.find_spec", lambda name: None)
    assert TRITON.unavailable() == "triton is not installed"


def test_triton_is_searched_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was imported stays; a missing package is searched for again, since it may be installed meanwhile."""
    searches: list[str] = []
    monkeypatch.setattr("rmc_kernels.backends.triton.backend.find_spec", searches.append)
    for _ in range(3):
        assert "Triton has no device" in str(TRITON.unavailable())
    assert searches == []
    monkeypatch.delitem(sys.modules, "triton")
    for _ in range(3):
        assert TRITON.unavailable() == "triton is not installed"
    assert searches == ["triton"] * 3


def test_a_triton_that_does_not_compile_the_kernels_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    reason = TRITON.unavailable()
    assert reason == "triton must be 3.6 or newer, got 3.5.1"
    assert explain(SPECS["sonnet"], torch.zeros(1)).reasons["triton"] == reason


def test_whatever_a_driver_raises_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's compiles C, which may fail in many ways."""

    def fail() -> str:
        raise CalledProcessError(1, ["gcc"])

    monkeypatch.setattr(launch, "device_type", fail)
    assert "gcc" in str(TRITON.unavailable())
    assert explain(SPECS["sonnet"], torch.zeros(1)).backend != "triton"


# -- Triton's cache ----------------------------------------------------------------------------------------------------


def test_a_plan_is_known_by_its_fields_and_by_what_computes_its_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = training_plan(SPECS["sonnet"], TABLE[0].tile, "ieee")
    narrow = launch.plan_of(SPECS["sonnet"], TABLE[0].tile, "ieee")

    def key(plan: Plan) -> str:
        return str(ASTSource(forward_kept, {}, {"plan": plan}).hash())

    assert key(plan) == key(replace(plan))
    before = {key(plan), key(narrow), key(replace(plan, G=0))}
    assert len(before) == 3
    text = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda module: text(module).replace("3 * self.D", "4 * self.D"))
    source_of_plan.cache_clear()
    after = key(plan)
    monkeypatch.undo()
    source_of_plan.cache_clear()
    assert after not in before
    assert key(plan) in before


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_width_and_dtype_has_tiles_in_order() -> None:
    for wide in (False, True):
        entries = [entry for entry in TABLE if entry.wide == wide]
        assert entries == sorted(entries, key=lambda entry: (entry.width, entry.tile.rows))
        assert entries[-1].width == tiles.ANY
        for width in {entry.width for entry in entries}:
            rows = [entry.tile.rows for entry in entries if entry.width == width]
            assert (min(rows), max(rows)) == (tiles.LEAST_ROWS, tiles.MOST_ROWS)
    assert [(entry.wide, entry.tile.rows) for entry in BACKWARD] == [
        (wide, rows) for wide in (False, True) for rows in sorted({entry.tile.rows for entry in TABLE})
    ]
    assert all(entry.reason for entry in (*TABLE, *BACKWARD))


def test_a_target_that_is_not_in_the_table_takes_the_tile_of_its_maker() -> None:
    spec = CellSpec.sonnet(5, 8, 16, 4)
    assert tiles.choose(spec, torch.bfloat16, "sm_121", 10**6, 132).warps == 8
    assert tiles.choose(spec, torch.bfloat16, "gfx950", 10**6, 132).warps == tiles.AMD_WARPS


@pytest.mark.parametrize(
    "slots, batch, rows",
    [(8, 1, 16), (8, 264, 16), (8, 132 * 4, 32), (8, 132 * 8, 64), (8, 10**6, 64), (33, 1, 64), (3, 132 * 4, 16)],
)
def test_a_small_batch_is_spread_over_the_processors(slots: int, batch: int, rows: int) -> None:
    spec = CellSpec.sonnet(5, slots, 16, 4)
    assert tiles.choose(spec, torch.bfloat16, "sm_90", batch, 132).rows == rows


def test_a_tile_is_not_wider_than_the_cell() -> None:
    assert Tile(16, 64, 128, 64, 4, 2).fitted(40) == Tile(16, 64, 64, 64, 4, 2)
    assert Tile(16, 64, 128, 64, 4, 2).fitted(3) == Tile(16, 16, 16, 64, 4, 2)


def _sample() -> list[Any]:
    """Two of them in `make test`."""
    quick = [("forward", "sm_80"), ("forward", "gfx942")]
    return [
        pytest.param(
            job,
            id=f"{job.kernel}-{job.target}-{job.cell}",
            marks=[] if (job.kernel, job.target) in quick else [pytest.mark.slow],
        )
        for job in sample(triton.__version__)
    ]


@pytest.mark.parametrize("job", _sample())
def test_no_kernel_is_worse_than_its_committed_figures(job: Job) -> None:
    """A sample; `make matrix` compiles all, and writes new figures where they are meant to change."""
    (found,) = compile_jobs([job]).values()
    assert found.inner == 0
    assert found.shared <= tiles.SHARED_MEMORY[job.target]
    committed = load().get(job)
    assert committed is not None or triton.__version__ not in MEASURED, f"{job}: `make matrix` compiles it"
    if committed is not None:
        assert not worse(found, committed.usage)


@pytest.mark.slow
def test_one_compilation_of_the_backward_pass_serves_every_batch_and_length() -> None:
    found = []
    for batch, steps in ((1, 1), (2, 16), (17, 3)):
        case = draw(SPECS["sonnet"], ("lengths", "resets"), batch=batch, steps=steps, dtype=torch.float32)
        call = case.call()
        with offline("sm_80") as launches, _Operators() as operators:
            memories, activations, _ = TRITON.forward(case.spec, call, False)
            needs = [True] * (3 + len(call.params))
            TRITON.backward(case.spec, call, memories, activations, torch.zeros_like(memories), needs)
        names = ("recompute", "backward")
        found.append([(each.name, each.metadata.hash) for each in launches if each.name in names])
        assert not re.search("_local_scalar_dense|nonzero|equal|item", " ".join(operators.names))
    assert found[0] == found[1] == found[2]
    assert [name for name, _ in found[0]] == ["recompute", "backward"]


# -- launches ----------------------------------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_one_compilation_serves_every_batch_and_length_without_waiting_for_the_device() -> None:
    found = []
    for batch, steps in ((1, 1), (2, 16), (17, 3)):
        case = draw(SPECS["sonnet"], ("lengths", "resets"), batch=batch, steps=steps, dtype=torch.float32)
        with offline("sm_80") as launches, _Operators() as operators:
            TRITON.forward(case.spec, case.call(), False)
        found.append((launches[-1].name, launches[-1].metadata.hash, len(launches)))
        assert not re.search("_local_scalar_dense|nonzero|equal|item", " ".join(operators.names))
    assert len(set(found)) == 1
    assert found[0][0] == "forward"
    assert found[0][2] == 4
