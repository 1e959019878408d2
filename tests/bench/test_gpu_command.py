"""`make gpu` in the PTX simulator, and that it passes over nothing that is wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call, patch

import pytest
import torch
from torch import Tensor

from rmc_kernels import backends
from rmc_kernels.backends import Unrolled, last_memory
from rmc_kernels.bench import case_run, contestants, parity
from rmc_kernels.bench.cases import Group
from rmc_kernels.bench.contestants import RIVALS
from rmc_kernels.bench.gpu import device, isolated_process, report, runtime, stages
from rmc_kernels.bench.gpu.command import main
from rmc_kernels.bench.gpu.device import Call, Results
from rmc_kernels.bench.gpu.workload import Workload, full, tiny
from rmc_kernels.spec import VARIANTS
from rmc_kernels.verify import baseline
from rmc_kernels.verify.cases import DTYPES
from tests.bench_cases import SMALL, SMALL_TRAINING
from tools.simulate.simulated_device import NO_TIME, Simulated

ROOT = Path(__file__).parents[2]
CPU = backends.BACKENDS["cpu"]
LOOKS = (
    "the same bits 2 times", "the same bits 2 times, from NaN", "replayed as a CUDA graph",
    "on a stream where x comes late", "waits for nothing",
)  # fmt: skip


def _report(out: Path) -> tuple[dict[str, Any], str]:
    (path,) = out.glob("gpu-*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None or torch.cuda.is_available(),
    reason="for a process without a GPU that does not interpret",
)
def test_every_stage_in_the_simulator(tmp_path: Path) -> None:
    from tools.simulate.simulated import simulated

    workload = tiny(["eager", "graph", "lstm"])
    fewest = dict.fromkeys(baseline.FEWEST_DRAWS, 4)
    with simulated("sm_80") as reports, patch.object(baseline, "FEWEST_DRAWS", fewest):
        assert main(["--out", str(tmp_path), "--seconds", "1e6"], Simulated("sm_80"), workload) == 0
    assert len(reports) > 100
    assert not [race for found in reports for race in found.races]
    data, text = _report(tmp_path)
    assert list(data["stages"]) == list(stages.STAGES)
    assert [each["status"] for each in data["stages"]["verify"]["findings"]] == ["right"]
    looks = {each["name"].partition(": ")[0]: each["status"] for each in data["stages"]["runtime"]["findings"]}
    assert looks == dict.fromkeys(LOOKS, "right") | {"on another device than the current one": "not served"}
    for stage in ("forward", "training"):
        (case,) = data["stages"][stage]["cases"]
        assert {figure["contestant"]: figure["status"] for figure in case["figures"]} == {
            "eager": "timed", "graph": "unavailable", "lstm": "timed", "rmc triton": "timed",
        }  # fmt: skip
        assert {second for figure in case["figures"] for second in figure["seconds"]} == {NO_TIME}
    assert "This is no report of a GPU" in text
    assert all(line in text for line in Simulated.stood_in)


# -- what is wrong is told ---------------------------------------------------------------------------------------------


class CpuDevice(Simulated):
    """The C++ backend in place of a GPU: what is wrong with a backend is wrong here."""

    backend = "cpu"

    def __init__(self) -> None:
        super().__init__("nothing")


def _workload() -> Workload:
    return tiny(["eager"])


def _looks(place: device.Device) -> dict[str, str]:
    found = runtime.look_at(place, 2, _workload().subjects[0])
    return {name: status for name, status, *_ in found if status != "not served"}


def _changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, int], Tensor]) -> None:
    """The memories of the C++ backend go through `change`, with the number of the call."""
    forward, calls = CPU.forward, iter(range(10**6))

    def changed(*arguments: Any) -> Unrolled:
        memories, activations, _ = forward(*arguments)
        memories = change(memories, next(calls))
        return Unrolled(memories, activations, last_memory(memories))

    monkeypatch.setattr(CPU, "forward", changed)


def test_what_is_right_passes() -> None:
    assert _looks(CpuDevice()) == dict.fromkeys(LOOKS, "right")


def test_one_bit_in_one_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(memories: Tensor, call: int) -> Tensor:
        if call == 2:
            memories.view(torch.int32)[0, 0, 0, 0] ^= 1
        return memories

    _changed(monkeypatch, change)
    assert [name for name, status in _looks(CpuDevice()).items() if status == "wrong"] == [LOOKS[0]]


def test_memory_that_was_never_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows from NaN alone."""

    def change(memories: Tensor, call: int) -> Tensor:
        stale = torch.empty_like(memories)
        return memories + torch.where(stale.isnan().all(), stale, 0)

    _changed(monkeypatch, change)
    assert [name for name, status in _looks(CpuDevice()).items() if status == "wrong"] == [LOOKS[1]]


class Stale(CpuDevice):
    def capture(self, call: Call) -> tuple[Results, Callable[[], None]]:
        return call(), lambda: None


class Frozen(CpuDevice):
    """A graph that has kept what x was."""

    def capture(self, call: Call) -> tuple[Results, Callable[[], None]]:
        results = call()
        captured = {name: value.clone() for name, value in results.items()}

        def replay() -> None:
            for name, value in results.items():
                value.copy_(captured[name])

        return results, replay


class Early(CpuDevice):
    def on_a_late_stream(self, late: Callable[[], None], call: Call) -> Results:
        results = call()
        late()
        return results


class Waiting(CpuDevice):
    def refusing_to_wait(self) -> AbstractContextManager[None]:
        raise RuntimeError("called a synchronizing operation")


@pytest.mark.parametrize(
    "place, look, status",
    [(Stale(), 2, "wrong"), (Frozen(), 2, "wrong"), (Early(), 3, "wrong"), (Waiting(), 4, "error")],
)
def test_what_a_run_time_gets_wrong_is_told(place: CpuDevice, look: int, status: str) -> None:
    assert _looks(place) == dict.fromkeys(LOOKS, "right") | {LOOKS[look]: status}


def test_wrong_numbers_are_told_by_verify_and_benchmarks_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that fails keeps none of the others from running; one that is run again takes its own place."""
    _changed(monkeypatch, lambda memories, call: memories * 1.001)
    assert main(["--out", str(tmp_path), "--seconds", "1e6"], CpuDevice(), _workload()) == 1
    data, text = _report(tmp_path)
    assert {name: stage["ok"] for name, stage in data["stages"].items()} == {
        "verify": False, "runtime": True, "forward": False, "training": False,
    }  # fmt: skip
    assert text.count("**FAILED**") == 3
    assert "rmc verify --backend cpu" in text
    assert "rmc cpu: parity failed" in text
    monkeypatch.undo()
    assert main(["verify", "--out", str(tmp_path), "--seconds", "1e6"], CpuDevice(), _workload()) == 0
    again, _ = _report(tmp_path)
    assert again["stages"]["verify"]["ok"]
    assert again["stages"]["forward"] == data["stages"]["forward"]


def test_a_stage_that_breaks_or_has_no_time_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> stages.Result:
        raise RuntimeError("out of order")

    monkeypatch.setitem(stages.STAGES, "verify", broken)
    assert main(["verify", "runtime", "--out", str(tmp_path), "--seconds", "0"], CpuDevice(), _workload()) == 1
    data, text = _report(tmp_path)
    (finding,) = data["stages"]["verify"]["findings"]
    assert finding["detail"] == "RuntimeError: out of order"
    assert "in broken" in finding["trace"]
    assert [each["status"] for each in data["stages"]["runtime"]["findings"]] == ["left out"]
    assert "Not run." in text


def test_nothing_is_no_pass() -> None:
    assert not stages.Result([], 0.0).ok
    assert not stages.Result([stages.Finding("a", "not served")], 0.0).ok


# -- what talks to CUDA, with torch.cuda stood in for -----------------------------------------------------------------


@pytest.fixture
def torch_cuda(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Records what is asked of torch.cuda."""
    asked = MagicMock()
    for name in (
        "CUDAGraph", "Stream", "current_stream", "get_sync_debug_mode", "graph", "set_sync_debug_mode", "stream",
        "synchronize",
    ):  # fmt: skip
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, getattr(asked, name))
    return asked


def _order(asked: MagicMock, *names: str) -> list[str]:
    """The calls of these names, in order."""
    return [each[0] for each in asked.mock_calls if each[0] in names]


def test_a_call_is_captured_after_warm_ups_on_another_stream(torch_cuda: MagicMock) -> None:
    torch_cuda.call.side_effect = [{"run": torch.tensor(float(number))} for number in range(10)]
    results, replay = device.Cuda().capture(torch_cuda.call)
    entered, left = "stream().__enter__", "stream().__exit__"
    assert _order(torch_cuda, "call", entered, left, "graph().__enter__", "graph().__exit__") == [
        entered, *["call"] * device.WARM_UPS, left, "graph().__enter__", "call", "graph().__exit__",
    ]  # fmt: skip
    assert results["run"] == device.WARM_UPS
    replay()
    assert _order(torch_cuda, "CUDAGraph().replay") == ["CUDAGraph().replay"]
    torch_cuda.graph.assert_called_once_with(torch_cuda.CUDAGraph())


def test_what_is_late_and_the_call_are_on_one_stream(torch_cuda: MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DELAY_WIDTH", 4)
    monkeypatch.setattr(device.Cuda, "name", "cpu")
    device.Cuda().on_a_late_stream(torch_cuda.late, torch_cuda.call)
    assert _order(torch_cuda, "late", "call", "stream().__enter__", "stream().__exit__", "synchronize") == [
        "synchronize", "stream().__enter__", "late", "call", "stream().__exit__", "synchronize",
    ]  # fmt: skip


def test_waiting_is_refused_until_the_end(torch_cuda: MagicMock) -> None:
    torch_cuda.get_sync_debug_mode.return_value = 0
    with pytest.raises(KeyError), device.Cuda().refusing_to_wait():
        raise KeyError
    assert torch_cuda.set_sync_debug_mode.mock_calls == [call("error"), call(0)]


def test_the_facts_of_a_device_are_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30, uuid="12-34")
    for name, value in (
        ("current_device", 0), ("device_count", 2), ("get_device_capability", (9, 0)), ("get_device_name", "H100"),
        ("get_device_properties", about),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *which, value=value: value)
    monkeypatch.setattr(device, "nvidia_smi", lambda which, queries: {"of": which})
    found = json.loads(json.dumps(device.Cuda().facts()))
    assert (found["name"], found["processors"], found["capability"]) == ("H100", 132, [9, 0])
    assert found["nvidia_smi"] == {"of": "GPU-12-34"}
    assert {"cuDNN in float32", "products in float32"} <= found.keys()
    assert device.Cuda().second() == "cuda:1"


# -- processes ---------------------------------------------------------------------------------------------------------


def _job(name: str) -> str:
    if name == "raises":
        raise ValueError("no\nmore")
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(1000)
    return name.upper()


def _run_isolated(jobs: list[str], workers: int, seconds: float) -> dict[str, tuple[str | None, str, bool]]:
    found = isolated_process.run_all(_job, jobs, workers=workers, deadline=time.monotonic() + seconds)
    return {done.job: (done.value, done.error, done.begun) for done in found}


def test_a_job_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By fork, which is quick; spawned below."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    assert _run_isolated(["raises", "dies", "a", "b"], 2, 1000) == {
        "raises": (None, "ValueError: no", True),
        "dies": (None, "its process died with exit code 3", True),
        "a": ("A", "", True),
        "b": ("B", "", True),
    }
    assert _run_isolated(["hangs", "b"], 1, 1) == {
        "hangs": (None, "it had not ended when the time was over", True),
        "b": (None, "", False),
    }
    assert not multiprocessing.active_children()


class IsolatedCpuDevice(CpuDevice):
    """With processes, as on a GPU."""

    alone = False


@pytest.mark.slow
def test_stages_run_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that goes there and comes back can be pickled; a wrong result comes back as one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    workload = replace(
        _workload(), timed=[replace(group, against=("eager", "graph")) for group in _workload().timed[1:]]
    )
    stages = ["verify", "runtime", "training"]
    assert main([*stages, "--out", str(tmp_path), "--seconds", "1e6"], IsolatedCpuDevice(), workload) == 0
    data, _ = _report(tmp_path)
    statuses = {name: {each["status"] for each in stage["findings"]} for name, stage in data["stages"].items()}
    assert statuses == {"verify": {"right"}, "runtime": {"right", "not served"}, "training": {"right"}}
    assert [figure["status"] for figure in data["stages"]["training"]["cases"][0]["figures"]] == [
        "timed", "unavailable", "timed",
    ]  # fmt: skip


@pytest.mark.slow
def test_jobs_are_spawned() -> None:
    assert _run_isolated(["a", "dies"], 2, 1000) == {
        "a": ("A", "", True), "dies": (None, "its process died with exit code 3", True),
    }  # fmt: skip


def test_in_one_process_the_same_is_told() -> None:
    assert _run_isolated(["raises", "a"], 0, 1000) == {"raises": (None, "ValueError: no", True), "a": ("A", "", True)}
    assert _run_isolated(["a"], 0, 0) == {"a": (None, "", False)}


# -- what is done, and where it can be ---------------------------------------------------------------------------------


def test_the_full_plan_has_everything() -> None:
    workload = full()
    assert {(case.spec.variant, case.dtype) for case in workload.verified} == {(v, d) for v in VARIANTS for d in DTYPES}
    for flag in ("lengths", "resets", "dropout_mask", "strided"):
        assert {getattr(case, flag) for case in workload.verified} == {False, True}
    assert {(case.spec.variant, case.dtype) for case in workload.subjects} >= {
        (variant, dtype) for variant in ("sonnet", "textbook", "r2gen") for dtype in DTYPES
    }
    assert workload.repeats == 100
    assert all({"eager", "graph", "compile", "lstm"} == set(group.against) <= set(RIVALS) for group in workload.timed)


def test_the_loop_that_is_captured_computes_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients; a capture that hands the function back stands in for CUDA graphs."""

    def capture(function: Callable[..., Tensor], sample: tuple[Tensor, ...], allow_unused_input: bool) -> Any:
        assert all(tensor.requires_grad and tensor.is_leaf for tensor in sample)
        assert function(*sample).requires_grad
        return function

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True), raising=False)
    verdict = parity.check(contestants.bind_graphed, SMALL_TRAINING)
    assert verdict.ok, verdict.worst


def test_in_half_types_rivals_are_timed_without_parity() -> None:
    case = replace(SMALL, dtype="bfloat16")
    group = Group((case,), ("eager", "lstm"), 1e-9, fewest_rounds=1)
    found = case_run.run_case(case, group, ["cpu"], "cpu", None, CpuDevice(), clock=CpuDevice().clock)
    assert [(f.contestant, f.status, f.is_rmc) for f in found.figures] == [
        ("eager", "timed", False), ("lstm", "timed", False), ("rmc cpu", "timed", True),
    ]  # fmt: skip
    assert "bfloat16" in found.figures[0].note


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert f"torch {torch.__version__} sees no GPU; nothing was run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_says_that_there_is_no_gpu() -> None:
    found = subprocess.run(["make", "gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert "sees no GPU; nothing was run" in found.stderr


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fly"], CpuDevice(), _workload())
    assert "STAGE takes some of verify, runtime, forward, training; got fly" in capsys.readouterr().err


def test_no_library_of_a_terminal_is_needed() -> None:
    """No typer, rich or matplotlib, and no C++ extension."""
    absent = dict.fromkeys(("typer", "rich", "matplotlib", "rmc_kernels._C"))
    code = f"import sys; sys.modules.update({absent}); import rmc_kernels.bench.gpu.command"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "output, expected",
    [
        ("550.1, P0, 1755 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 90.1 W, 700 W, 31", "1755 MHz"),
        ("No devices were found", None),
    ],
)
def test_clocks_are_read_where_nvidia_smi_is(
    output: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.nvidia_smi("0", device.QUERIES) is None
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{output}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = device.nvidia_smi("0", device.QUERIES)
    assert (found and found["clocks.sm"]) == expected


def test_a_report_is_named_after_its_device(tmp_path: Path) -> None:
    place = CpuDevice()
    place.title = "NVIDIA H100 80GB HBM3"
    assert report.path_of(place, tmp_path) == tmp_path / "gpu-nvidia-h100-80gb-hbm3.json"
