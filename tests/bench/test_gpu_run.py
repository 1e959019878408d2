"""What a run of `make gpu` leaves or loses: processes, clocks and memory of a case; the command of the Makefile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rmc_kernels.bench import memory, models
from rmc_kernels.bench.gpu import device, isolated_process, stages
from tests.bench.test_gpu_command import ROOT, CpuDevice, _workload
from tests.bench_cases import SMALL, SMALL_TRAINING


def _job(name: str) -> str:
    time.sleep(1000 if name == "hangs" else 0)
    return name.upper()


def test_a_job_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    jobs = ["hangs", "a", "b"]
    found = list(isolated_process.run_all(_job, jobs, workers=1, deadline=time.monotonic() + 1000, limit=1))
    assert [(done.job, done.value, done.error) for done in found] == [
        ("hangs", None, "it had not ended after 1 s"), ("a", "A", ""), ("b", "B", ""),
    ]  # fmt: skip
    assert not multiprocessing.active_children()


def test_a_process_that_hangs_at_its_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(isolated_process, "PATIENCE", 0.2)
    child = isolated_process._child

    def hangs(*arguments: Any) -> None:
        child(*arguments)
        time.sleep(1000)

    monkeypatch.setattr(isolated_process, "_child", hangs)
    (done,) = isolated_process.run_all(_job, ["a"], workers=1, deadline=time.monotonic() + 1000)
    assert done.value == "A"
    assert not multiprocessing.active_children()


ORPHANS = """
import multiprocessing, sys, time
context = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method: context
from rmc_kernels.bench.gpu import isolated_process
def job(name):
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(1000)
list(isolated_process.run_all(job, ["a"], workers=1, deadline=time.monotonic() + 1000))
"""


def _gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_run_that_is_killed_leaves_no_process_on_the_gpu() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        child = int(run.stdout.readline())
        assert not _gone(child)
        run.send_signal(signal.SIGTERM)
    end = time.monotonic() + 10
    while not _gone(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert _gone(child)


def test_a_process_compiles_with_one_worker_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    (done,) = isolated_process.run_all(
        os.getenv, ["TORCHINDUCTOR_COMPILE_THREADS"], workers=1, deadline=time.monotonic() + 1000
    )
    assert done.value == "1"


# -- clocks and memory -------------------------------------------------------------------------------------------------


class Clocked(CpuDevice):
    """Tells what it was busy with, or that it is lost."""

    lost = False

    def clocks(self, work: Callable[[], object]) -> str:
        if self.lost:
            raise RuntimeError("the device was lost")
        results: Any = work()
        return f"busy with {tuple(results[0].shape)}"


def test_clocks_are_those_under_the_cell_and_their_loss_loses_no_time() -> None:
    place, group = Clocked(), _workload().timed[0]
    case = group.cases[0]
    output = (case.batch_size, case.steps, case.mem_slots * case.mem_size)
    assert stages.time_case(place, group)[1] == f"busy with {output}"
    place.lost = True
    result, clocks = stages.time_case(place, group)
    assert clocks == "clocks: RuntimeError: the device was lost"
    assert all(figure.seconds for figure in result.figures)


@pytest.mark.parametrize("known", [*device.HELD_DOWN_BY, None])
def test_clocks_are_read_while_work_is_in_flight(known: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what holds them down, under either name."""
    working: list[float] = []
    during: list[int] = []

    def nvidia_smi(which: str, queries: tuple[str, ...]) -> dict[str, str] | None:
        before = len(working)
        time.sleep(0.05)
        during.append(len(working) - before)
        foreign = [name for name in queries if name in device.HELD_DOWN_BY and name != known]
        return None if foreign else dict.fromkeys(queries, which)

    monkeypatch.setattr(device, "nvidia_smi", nvidia_smi)
    monkeypatch.setattr(device, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(device.Cuda, "_identity", "GPU-12")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(1e-3))
    found = device.Cuda().clocks(lambda: working.append(time.monotonic()))
    expected = [*device.WHILE_BUSY, *([known] if known else [])]
    assert found == ", ".join(f"{name} GPU-12" for name in expected)
    assert all(during)


def test_memory_that_cannot_be_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(order: memory.Order, number: int) -> int:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(memory, "device_peak", full)
    assert memory.Meter("cuda").peak(memory.Order(SMALL, (), ["cpu"], False, False), 0) is None


@pytest.mark.parametrize("name", [*models.GATES, "transformer"])
def test_a_forward_pass_alone_keeps_nothing_for_a_backward_pass(name: str) -> None:
    """But for the Transformer, whose path of evaluation is the slower one."""
    for case in (SMALL, SMALL_TRAINING):
        module = models.model(name, case, at_width=False).build()
        training = case is SMALL_TRAINING or name == "transformer"
        assert {part.training for part in module.modules()} == {training}


# -- the Makefile ------------------------------------------------------------------------------------------------------


def test_make_passes_the_seconds_on_and_takes_a_relative_python_and_builds_nothing() -> None:
    order = ["make", "-n", "gpu-verify", "PYTHON=.venv/bin/python", "SECONDS=5", "RESULTS=a"]
    found = subprocess.run(order, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = (line for line in found.splitlines() if "rmc_kernels.bench.gpu" in line)
    assert command == '.venv/bin/python -m rmc_kernels.bench.gpu --out "a" --seconds 5 verify'
    assert "setup.py --quiet" not in found
