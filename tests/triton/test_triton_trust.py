"""Kernels are compared with the reference before `auto` uses them: right, wrong, crashing, hanging ones; the record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("for a process without a GPU that does not interpret", allow_module_level=True)

import triton

from rmc_kernels import CellSpec, RelationalMemory, backends, explain
from rmc_kernels.backends.triton import trust
from tools.offline import offline

SPEC = CellSpec.sonnet(3, 2, 4, 2)
HERE = torch.device("cpu")
#: A comparison that finds what its environment says, and notes in a file that it ran.
_FINDS = (
    "import json, os, sys; open(os.environ['RAN'], 'a').write('x'); json.loads(sys.argv[1]); "
    "print('a line of a library'); print(json.dumps({'fault': os.environ['FAULT']}))"
)


@pytest.fixture(autouse=True)
def a_new_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel has been compared yet, and `auto` takes a simulated GPU whose tensors are on the CPU."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setattr(type(backends.BACKENDS["triton"]), "passed_over", lambda self, device: None)
    forget()
    with offline("sm_90"):
        yield
    forget()


def forget() -> None:
    """As a new process begins."""
    trust._known.clear()
    trust._warned.cache_clear()


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the comparisons; each finds the fault that the environment's FAULT names, "" at first."""
    ran = tmp_path / "ran"
    monkeypatch.setenv("RAN", str(ran))
    monkeypatch.setenv("FAULT", "")
    command(monkeypatch, _FINDS)
    return lambda: len(ran.read_text()) if ran.exists() else 0


def command(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(trust, "COMMAND", (sys.executable, "-c", script))


def fault(gradients: str = "", dtype: torch.dtype = torch.float32, check: bool = True, compiling: bool = False) -> Any:
    return trust.fault(SPEC.as_json, dtype, gradients, HERE, check, compiling)


def records(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "rmc_kernels").glob("*"))


def test_a_kernel_is_compared_once_a_machine(compared: Callable[[], int], tmp_path: Path) -> None:
    assert fault() is None
    assert fault() is None
    assert compared() == 1
    forget()  # the next process
    assert fault() is None
    assert compared() == 1
    (record,) = records(tmp_path)
    found = json.loads(record.read_text())
    assert (found["fault"], found["dtype"], found["spec"]) == ("", "float32", SPEC.as_json)
    assert {"torch", "triton", "rmc_kernels", "sources"} <= found.keys()


def test_other_kernels_are_compared_too(compared: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    for gradients in ("", "full", "none"):
        for dtype in (torch.float32, torch.bfloat16):
            fault(gradients, dtype)
    assert compared() == 6
    forget()
    monkeypatch.setattr(trust, "_versions", lambda: {"triton": "4.0"})
    fault()
    assert compared() == 7


def test_a_fault_is_told_once_and_the_reference_runs(
    compared: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "it differs from the reference by more than rounding: memories")
    layer, x = RelationalMemory.from_spec(SPEC), torch.randn(2, 3, 3)
    said = r"leaves out the Triton kernel \(forward\).*memories; delete .* to compare it again"
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=said):
        output = layer(x)[0]
    layer.backend = "reference"
    torch.testing.assert_close(output, layer(x)[0].detach())
    layer.backend = "auto"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        assert backends.choose("triton", SPEC, x.dtype, HERE).name == "triton", "who names it is not asked"
        found = explain(SPEC, x)
    assert "memories" in found.reasons["triton"]
    assert compared() == 1


@pytest.mark.parametrize(
    ("script", "said", "remembered"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11", True),
        ("import time; time.sleep(60)", "had not ended after 1 s", True),
        ("raise RuntimeError('out of memory')", "exit code 1: RuntimeError: out of memory", False),
        ("print('no JSON')", "failed with exit code 0", False),
        ("print('3')", "failed with exit code 0", False),
    ],
    ids=["crash", "hang", "error", "no answer", "another answer"],
)
def test_a_comparison_that_fails(
    script: str, said: str, remembered: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command(monkeypatch, script)
    monkeypatch.setattr(trust, "LIMIT", 1.0 if "sleep" in script else 60.0)
    with pytest.warns(RuntimeWarning, match=said):
        assert said in fault()
    assert len(records(tmp_path)) == remembered
    forget()
    with pytest.warns(RuntimeWarning, match=said):
        assert said in fault()


def test_what_was_not_compared_is_not_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here the other process has no GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.warns(RuntimeWarning, match="exit code 1: RuntimeError: nothing was compared: "):
        assert fault() is not None
    assert not records(tmp_path)


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trust, "COMMAND", (str(tmp_path / "no such program"),))
    with pytest.warns(RuntimeWarning, match="the comparison did not start"):
        assert fault() is not None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"other": 1}', "\0"])
def test_a_damaged_record_is_made_again(damage: str, compared: Callable[[], int], tmp_path: Path) -> None:
    fault()
    (record,) = records(tmp_path)
    record.write_text(damage)
    forget()
    assert fault() is None
    assert compared() == 2
    assert json.loads(record.read_text())["fault"] == ""


def test_a_folder_that_cannot_be_written_to(compared: Callable[[], int], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in place of the folder")
    assert fault() is None
    assert fault() is None
    assert compared() == 1, "this process knows"
    assert explain(SPEC, torch.zeros(1)).note.endswith(": forward")


def test_processes_that_write_at_once(compared: Callable[[], int], tmp_path: Path) -> None:
    """Each reads either nothing or all of it."""
    script = (
        "import sys, torch, triton; from tools.offline import offline; from rmc_kernels.backends.triton import trust\n"
        "triton.knobs.cache.dir = sys.argv[1]\n"
        "with offline('sm_90'):\n"
        "    kernel = trust.Kernel(sys.argv[2], torch.float32, '', torch.device('cpu'), 'ieee')\n"
        "    for number in range(100):\n"
        "        trust._remembered(kernel, '')\n"
        "        assert trust._read(kernel) == ''\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "cache"), SPEC.as_json]
    running = [subprocess.Popen(arguments) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(records(tmp_path)) == 1


def test_threads_wait_for_one_comparison(compared: Callable[[], int]) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(fault())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [None] * 4
    assert compared() == 1


def test_nothing_is_compared_during_a_capture(compared: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_device_name", str)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    arguments = (SPEC.as_json, torch.float32, "", torch.device("cuda", 0), True, False)
    with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured: make a warm-up call before the capture"):
        trust.fault(*arguments)
    assert compared() == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert trust.fault(*arguments) is None
    assert trust.fault(*arguments) is None, "a kernel that has been compared may be captured"


def test_nothing_is_compared_while_a_compiler_traces(compared: Callable[[], int]) -> None:
    with pytest.warns(
        RuntimeWarning, match="not been compared with the reference yet; make a call before it is compiled"
    ):
        assert fault(compiling=True) is not None
    assert compared() == 0
    assert fault() is None
    assert fault(compiling=True) is None
    assert compared() == 1


def test_a_compiled_layer(compared: Callable[[], int]) -> None:
    layer, x = RelationalMemory.from_spec(SPEC), torch.randn(2, 3, 3)

    def names() -> set[str]:
        """The backends that a compiled call asks for."""
        torch._dynamo.reset()
        graphs: list[torch.fx.GraphModule] = []
        with torch.no_grad():
            torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)(x)  # type: ignore[func-returns-value]
        nodes = [node for graph in graphs for node in graph.graph.nodes if "unroll_forward" in str(node.target)]
        return {str(node.args[-2]) for node in nodes}

    with pytest.warns(RuntimeWarning, match="make a call before it is compiled"):
        assert "triton" not in names()
    with torch.no_grad():
        layer(x)
    assert names() == {"triton"}
    assert compared() == 1


def test_random_state_is_untouched(compared: Callable[[], int]) -> None:
    before = torch.get_rng_state()
    fault()
    assert compared() == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_the_environment_turns_it_off() -> None:
    script = "from tools.offline import offline; from rmc_kernels.backends.triton import trust; print(trust.enabled)"
    for value, enabled in (("0", "False"), ("1", "True"), (None, "True")):
        environment = {name: each for name, each in os.environ.items() if name != "RMC_KERNELS_CHECK"}
        environment |= {} if value is None else {"RMC_KERNELS_CHECK": value}
        found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert found.stdout.strip() == enabled, found.stderr


def test_explain_says_what_was_compared(compared: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert explain(SPEC, x).note == "compared with the reference on this machine: nothing yet"
    fault()
    fault("full")
    assert explain(SPEC, x).note == 'compared with the reference on this machine: forward, recompute="full"'
    assert compared() == 2, "to explain compares nothing"
    monkeypatch.setattr(trust, "enabled", False)
    assert explain(SPEC, x).note == "not compared with the reference, since RMC_KERNELS_CHECK is 0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [("right", ""), ("wrong", "differs from the reference"), ("crash", "signal 11"), ("hang", "had not ended")],
)
@pytest.mark.filterwarnings("ignore:backend=.auto. leaves out")
def test_kernels_in_the_simulator(kind: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "COMMAND", (sys.executable, "-m", "tests.triton.faulty_kernel", kind))
    monkeypatch.setattr(trust, "LIMIT", 20.0 if kind == "hang" else 600.0)
    found = fault()
    assert said in found if said else found is None
    assert (backends.choose("auto", SPEC, torch.float32, HERE).name == "triton") == (kind == "right")
