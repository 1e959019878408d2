"""What a report of `make gpu` says where something goes wrong, and what a killed run leaves of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rmc_kernels import errors
from rmc_kernels.bench.gpu import isolated_process, report, runtime, stages
from rmc_kernels.bench.gpu.command import main
from rmc_kernels.bench.record import Figure, TimedCase
from rmc_kernels.verify import check
from rmc_kernels.verify.baseline import NO_YARDSTICK
from tests.bench.test_gpu_command import CPU, CpuDevice, _report, _workload

SILENT = stages.Listener(lambda line: None, lambda result: None)


def test_verify_does_not_pass_by_the_reference_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = replace(_workload(), reference=_workload().verified)
    refusal = check.refusal
    monkeypatch.setattr(
        check, "refusal", lambda case, backend, where: "no" if backend == "cpu" else refusal(case, backend, where)
    )
    assert main(["verify", "--out", str(tmp_path), "--seconds", "1e6"], CpuDevice(), workload) == 1
    data, text = _report(tmp_path)
    assert "no case of it was found right" in text
    statuses = [each["status"] for each in data["stages"]["verify"]["findings"]]
    assert sorted(statuses) == ["not served", "right", "wrong"]


def test_a_backend_that_is_not_there_is_nothing_to_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CPU, "unavailable", lambda: "no compiler")
    assert main(["verify", "--out", str(tmp_path)], CpuDevice(), _workload()) == 2
    assert "no compiler; nothing was run" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(CPU, "refuses", lambda *arguments: "the device is sm_70")
    assert main(["verify", "--out", str(tmp_path)], CpuDevice(), _workload()) == 2
    assert "the device is sm_70; nothing was run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_case_without_a_yardstick_is_listed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no pass, and no refusal that the backend had announced."""
    monkeypatch.setattr(check, "baselines", lambda *arguments, **options: f"{NO_YARDSTICK}: all is flat")
    assert main(["verify", "--out", str(tmp_path), "--seconds", "1e6"], CpuDevice(), _workload()) == 1
    data, text = _report(tmp_path)
    finding = data["stages"]["verify"]["findings"][0]
    assert (finding["status"], finding["detail"]) == ("no yardstick", f"{NO_YARDSTICK}: all is flat")
    assert f"* no yardstick: {finding['name']}" in text
    (log,) = tmp_path.glob("gpu-*.log")
    assert "no case of it was found right" in log.read_text()


def test_what_was_found_before_a_stage_broke_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        yield isolated_process.Done("a", "A")
        raise OSError("no more processes")

    monkeypatch.setattr(isolated_process, "run_all", broken)
    result = stages._collect(
        str.upper, ["a", "b"], str, lambda job, value: [stages.Finding(job, "right")], CpuDevice(), 1.0, SILENT
    )  # fmt: skip
    assert [(each.name, each.status) for each in result.findings] == [("a", "right"), ("the stage", "error")]
    assert not result.ok


def test_a_killed_run_leaves_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log, and a report that fails, with the times so far."""
    jobs = isolated_process.run_all

    def killed(*arguments: Any, **options: Any) -> Any:
        yield next(iter(jobs(*arguments, **options)))
        raise KeyboardInterrupt

    monkeypatch.setattr(isolated_process, "run_all", killed)
    for stage in ("verify", "forward"):
        with pytest.raises(KeyboardInterrupt):
            main([stage, "--out", str(tmp_path), "--seconds", "1e6"], CpuDevice(), _workload())
    (log,) = tmp_path.glob("gpu-*.log")
    assert "right: cpu" in log.read_text()
    data, text = _report(tmp_path)
    for found in data["stages"].values():
        assert not found["ok"]
        assert [each["status"] for each in found["findings"]] == ["right", "left out"]
    assert text.count(stages.REST.detail) == 2
    (case,) = data["stages"]["forward"]["cases"]
    assert all(figure["seconds"] for figure in case["figures"])


def test_a_report_that_cannot_be_written_ends_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(report, "add", full)
    assert main(["verify", "runtime", "--out", str(tmp_path), "--seconds", "1e6"], CpuDevice(), _workload()) == 1
    (log,) = tmp_path.glob("gpu-*.log")
    assert "the report could not be written: OSError: no space left" in log.read_text()
    assert "==> runtime passed" in log.read_text()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "file")], CpuDevice(), _workload())
    assert f"--out takes a folder that can be written; got {tmp_path / 'file'}: " in capsys.readouterr().err


def test_facts_that_cannot_be_told_keep_nothing_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: Any) -> Any:
        raise RuntimeError("the device was lost")

    monkeypatch.setattr(report, "facts", lost)
    monkeypatch.setattr(CpuDevice, "facts", lost)
    assert main(["runtime", "--out", str(tmp_path), "--seconds", "1e6"], CpuDevice(), _workload()) == 0
    assert "not told RuntimeError: the device was lost" in _report(tmp_path)[1]


def test_a_report_that_was_cut_off_starts_anew(tmp_path: Path) -> None:
    place = CpuDevice()
    for old in ('{"schema": 2, "sta', "[]"):
        report.path_of(place, tmp_path).write_text(old)
        finding = stages.Finding("a", "wrong", "off")
        report.add(place, report.machine(place), "verify", stages.Result([finding], 1.0), tmp_path)
        data, _ = _report(tmp_path)
        assert list(data["stages"]) == ["verify"]
        assert not list(tmp_path.glob("*.new"))


def test_an_infinite_severity_is_json(tmp_path: Path) -> None:
    place, case = CpuDevice(), _workload().timed[0].cases[0]
    figure = Figure("rmc cpu", 1, 0, "a clock", "parity failed", severity=float("inf"))
    result = stages.Result([stages.Finding("a", "wrong")], 1.0, [TimedCase(case, [figure], [])])
    path, _ = report.add(place, report.machine(place), "forward", result, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (found,) = json.loads(path.read_text(), parse_constant=refuse)["stages"]["forward"]["cases"]
    assert found["figures"][0]["severity"] is None


def test_an_error_says_what_it_comes_from() -> None:
    def fail() -> None:
        try:
            raise AttributeError("'Blocks' object has no attribute 'type'")
        except AttributeError as error:
            raise RuntimeError("at 116:12:\n  a = resident(") from error

    try:
        fail()
    except RuntimeError as error:
        found = errors.in_short(error)
    assert found == "RuntimeError: at 116:12: (AttributeError: 'Blocks' object has no attribute 'type')"
    assert errors.in_short(ValueError("no\nmore")) == "ValueError: no"
    alone = ValueError("no")
    alone.__context__, alone.__suppress_context__ = KeyError("unrelated"), True
    assert errors.in_short(alone) == "ValueError: no"


def test_every_stage_keeps_the_trace_of_a_kernel_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        try:
            raise AttributeError("no attribute 'type'")
        except AttributeError as error:
            raise RuntimeError("at 116:12:\n  a = resident(") from error

    monkeypatch.setattr(CPU, "forward", fail)
    monkeypatch.setattr(CpuDevice, "capture", fail)
    graph = "replayed as a CUDA graph"
    monkeypatch.setattr(runtime, "_evaluate", lambda *arguments: {})
    assert main(["--out", str(tmp_path), "--seconds", "1e6"], CpuDevice(), _workload()) == 1
    data, _ = _report(tmp_path)
    for stage, found in data["stages"].items():
        finding = next(each for each in found["findings"] if stage != "runtime" or each["name"].startswith(graph))
        assert "RuntimeError: at 116:12: (AttributeError: no attribute 'type')" in finding["detail"], stage
        assert finding["trace"].index("no attribute 'type'") < finding["trace"].index("a = resident("), stage
    figure = data["stages"]["forward"]["cases"][0]["figures"][-1]
    assert (figure["status"], "a = resident(" in figure["trace"]) == ("error", True)


def test_a_row_says_in_which_arithmetic_float32_was(tmp_path: Path) -> None:
    place, cases = CpuDevice(), [_workload().timed[0].cases[0]]
    cases.append(replace(cases[0], dtype="bfloat16"))
    figures = [Figure(name, 1, 0, "a clock", "timed", seconds=[1.0]) for name in ("eager", "lstm")]
    result = stages.Result([], 1.0, [TimedCase(case, figures, []) for case in cases])
    about = {"products in float32": "high", "cuDNN in float32": "TF32 allowed"}
    report.add(place, report.machine(place) | {"device": about}, "forward", result, tmp_path)
    rows = [line.split("|") for line in _report(tmp_path)[1].splitlines() if "| lstm" in line or "| eager" in line]
    assert [row[-2].strip() for row in rows] == ["products in float32: high", "cuDNN in float32: TF32 allowed", "", ""]
