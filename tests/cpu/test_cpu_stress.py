"""The C++ backend where it is used: worker processes, many Python threads, interrupted calls, calls without end."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rmc_kernels import RelationalMemory, RelationalMemoryCell
from rmc_kernels.backends import cpu, weights
from tests.cpu_cases import SPECS, make, same_bits

_C = pytest.importorskip("rmc_kernels._C")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def layer_and_input(seed: int = 0, batch: int = 24) -> tuple[RelationalMemory, Tensor]:
    torch.manual_seed(seed)
    return RelationalMemory(10, 4, 16, 2, backend="cpu"), torch.randn(batch, 6, 10)


def outputs_and_gradients(layer: RelationalMemory, x: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        inferred = layer(x, torch.zeros(len(x), 4, 32))[0]
    output, memory = layer(x)
    grads = torch.autograd.grad(output.square().sum() + memory.sum(), tuple(layer.parameters()))
    names = (f"grad of {name}" for name, _ in layer.named_parameters())
    return {"inferred": inferred, "output": output.detach()} | dict(zip(names, grads, strict=True))


class Runs(Dataset[dict[str, Tensor]]):
    """Each item is a run of the layer, forward and backward, in the worker that was asked for it."""

    def __init__(self, layer: RelationalMemory, x: Tensor) -> None:
        self.layer, self.x = layer, x

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        torch.set_num_threads(1 + index % 2)
        return outputs_and_gradients(self.layer, self.x)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_loader_workers(start: str) -> None:
    layer, x = layer_and_input()
    want = outputs_and_gradients(layer, x)  # the pool's threads exist before the fork
    loader = DataLoader(Runs(layer, x), batch_size=None, num_workers=2, multiprocessing_context=start)
    results = list(loader)
    assert len(results) == 4
    for got in results:
        same_bits(want, got)


@pytest.mark.parametrize("shared", [True, False])
def test_python_threads(shared: bool) -> None:
    cases = [layer_and_input(0 if shared else seed) for seed in range(4)]
    if shared:
        cases = [cases[0]] * 4
    want = [outputs_and_gradients(*case) for case in cases]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                torch.set_num_threads(1 + (number + turn) % 3)
                same_bits(want[number], outputs_and_gradients(*cases[number]))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]


def test_frozen_weights_in_many_threads() -> None:
    torch.manual_seed(0)
    cell = RelationalMemoryCell(10, 4, 16, 2, backend="cpu")
    x, memory = torch.randn(3, 10), torch.randn(3, 4, 32)
    with torch.no_grad():
        want = cell(x, memory)[1]
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(30):
                with cell.frozen_weights():
                    wrong.extend(1 for _ in range(5) if not torch.equal(cell(x, memory)[1], want))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert weights.frozen_blocks == ()


def test_threads_that_plan_a_cell_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plans one of its own, and its weights are packed for that one."""
    cell = RelationalMemoryCell(10, 4, 16, 2, backend="cpu")
    x, memory = torch.randn(3, 10), torch.randn(3, 4, 32)
    together, plan = threading.Barrier(2, timeout=60), cpu.plan_cell

    def plan_together(*key: Any) -> Any:
        together.wait()
        return plan(*key)

    found: list[Tensor] = []

    @torch.no_grad()
    def work() -> None:
        found.extend(cell(x, memory)[1] for _ in range(3))

    with torch.no_grad(), cell.frozen_weights():
        want = cell(x, memory)[1]
        cpu.planned_cell.cache_clear()
        monkeypatch.setattr(cpu, "plan_cell", plan_together)
        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(found) == 6
    assert all(torch.equal(memory, want) for memory in found)


class Stop(Exception):
    """What the handler of the tests raises."""


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Starts a timer after which SIGINT arrives, whose handler raises Stop."""

    def handler(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGINT, handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    yield timer.start
    timer.join()
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupted_call_stops(threads: int, interrupt: Callable[[], None]) -> None:
    """Its last step is never reached; 60,000 of them take minutes."""
    spec = SPECS["sonnet"]
    call, _ = make(spec, 64, 4)
    native = cpu.plan_cell(spec, "float32", "generic")
    steps = 60_000
    x = torch.zeros(1, steps, spec.input_size).expand(64, -1, -1)
    rows, memories = x.contiguous(), torch.full((64, steps, spec.mem_slots, spec.mem_size), torch.nan)
    pointers = tuple(p.data_ptr() for p in call.params)
    inputs = (rows.data_ptr(), call.memory.data_ptr(), 0, 0, 0, 0)
    interrupt()
    with pytest.raises(Stop):
        native.forward((64, steps, threads), inputs, pointers, None, memories.data_ptr(), 0, 0)
    assert memories[:, -1].isnan().all()


def test_after_an_interrupted_backward_pass(interrupt: Callable[[], None]) -> None:
    layer, x = layer_and_input()
    want = outputs_and_gradients(layer, x)
    output = layer(torch.randn(64, 3000, 10))[0].sum()

    def backward() -> None:
        output.backward()
        time.sleep(60)  # where the machine was faster than the signal

    interrupt()
    with pytest.raises(Stop):
        backward()
    layer.zero_grad()
    same_bits(want, outputs_and_gradients(layer, x))


def test_a_handler_may_call_a_layer() -> None:
    """In the middle of a call, with sizes of its own; neither sees the other."""
    layer, _ = layer_and_input()
    other, x = RelationalMemory(10, 8, 32, 4, backend="cpu"), torch.randn(64, 3000, 10)
    small = torch.randn(200, 2, 10)
    calls = []

    def handler(*_: object) -> None:
        calls.append(other(small)[1])
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # not before: a starved machine would call it inside itself

    with torch.no_grad():
        want, expected = layer(x)[1], other(small)[1]
        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            got = layer(x)[1]
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert torch.equal(got, want)
    assert calls
    assert all(torch.equal(found, expected) for found in calls)


def test_idle_threads_sleep() -> None:
    spec = SPECS["sonnet"]
    call, _ = make(spec, 64, 4)
    before = _C.parallel_regions()
    cpu.CpuBackend().forward(spec, call, False)
    assert _C.parallel_regions() == before + 1
    time.sleep(0.05)
    used = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - used < 0.1  # of half a second; torch's own threads may wake


#: A daemon thread calls a layer as the interpreter exits: in a child each time, which shares what was imported.
_EXITS = """
import os, sys, threading, time, torch, rmc_kernels
mode, runs = sys.argv[1], int(sys.argv[2])
layer = rmc_kernels.RelationalMemory(64, 8, 32, 4, backend="cpu")
x = torch.randn(16, 5 if mode == "short" else 200, 64)

def call_for_ever(entered):
    with torch.set_grad_enabled(mode == "training"):
        entered.set()
        while True:
            output = layer(x)[0]
            if mode == "training":
                output.sum().backward()

failed = 0
for run in range(runs):
    child = os.fork()
    if not child:
        entered = threading.Event()
        threading.Thread(target=call_for_ever, args=(entered,), daemon=True).start()
        entered.wait()
        time.sleep(0.001 * (run % 20))
        sys.exit()
    failed += os.waitpid(child, 0)[1] != 0
print(failed, "of", runs)
"""


@pytest.mark.parametrize("mode", ["long", "short", "training"])
@pytest.mark.parametrize("runs", [4, pytest.param(70, marks=pytest.mark.slow)])
def test_exit_while_a_daemon_thread_is_inside_a_call(mode: str, runs: int) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _EXITS, mode, str(runs)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == f"0 of {runs}", done.stderr


#: Calls with more and more address space: each gives its result or raises.
_LITTLE_MEMORY = """
import resource, torch, rmc_kernels
torch.set_num_threads(2)
layer = rmc_kernels.RelationalMemory(64, 4, 256, 4, backend="cpu")
x, memory = torch.randn(12, 2, 64), layer.initial_memory(12)
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
want, ends = None, {"done": 0, "raised": 0}
for training in (False, True):
    for mib in range(0, 400, 16):
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (mib << 20), hard))
        try:
            with torch.set_grad_enabled(training):
                output = layer(x, memory)[0]
                if training:
                    output.sum().backward()
            end = "done"
        except (MemoryError, RuntimeError):
            end = "raised"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        ends[end] += 1
        if end == "done":
            want = output.detach() if want is None else want
            assert torch.equal(output, want)
assert min(ends.values()) > 0, ends
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_calls_with_little_address_space() -> None:
    done = subprocess.run([sys.executable, "-c", _LITTLE_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_growth_over_100000_calls() -> None:
    layer, x = layer_and_input(batch=2)
    cell = RelationalMemoryCell(10, 4, 16, 2, backend="cpu")
    rows, memory = torch.randn(2, 10), torch.randn(2, 4, 32)

    def calls(count: int) -> int:
        for _ in range(count):
            with torch.inference_mode():
                cell(rows, memory)
        for _ in range(count // 50):
            with torch.inference_mode(), cell.frozen_weights():
                cell(rows, memory)
            outputs_and_gradients(layer, x)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = calls(5_000)
    assert calls(100_000) - before < 4_096  # KiB: less than 42 bytes a call
