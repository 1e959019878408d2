"""What a report of `make gpu` says where something goes wrong, and what a killed run leaves of it."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rmc_kernels import errors
from rmc_kernels.benchmarks.gpu import apart, report, stages
from rmc_kernels.benchmarks.gpu.command import main
from rmc_kernels.benchmarks.record import CaseResult, Figure
from tests.test_gpu_command import CPU, Plain, _plan, _report


def test_verify_does_not_pass_by_the_reference_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(_plan(), reference=_plan().verified)
    monkeypatch.setattr(CPU, "refuses", lambda *arguments: "out of order")
    assert main(["verify", "--out", str(tmp_path), "--seconds", "1e6"], Plain(), plan) == 1
    data, text = _report(tmp_path)
    assert "no case of it was found right" in text
    statuses = [each["status"] for each in data["stages"]["verify"]["findings"]]
    assert sorted(statuses) == ["not served", "right", "wrong"]


def test_a_backend_that_is_not_there_is_nothing_to_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CPU, "unavailable", lambda: "no compiler")
    assert main(["verify", "--out", str(tmp_path)], Plain(), _plan()) == 2
    assert "no compiler; nothing was run" in capsys.readouterr().err


def test_what_was_found_before_a_stage_broke_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        yield apart.Done("a", "A")
        raise OSError("no more processes")

    monkeypatch.setattr(apart, "run_all", broken)
    result = stages._collect(
        str.upper, ["a", "b"], str, lambda job, value: [stages.Finding(job, "right")], Plain(), 1.0, lambda line: None
    )  # fmt: skip
    assert [(each.name, each.status) for each in result.findings] == [("a", "right"), ("the stage", "error")]
    assert not result.ok


def test_a_killed_run_leaves_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        main(["verify", "--out", str(tmp_path), "--seconds", "1e6"], Plain(), _plan())
    (log,) = tmp_path.glob("gpu-*.log")
    assert "right: cpu" in log.read_text()


def test_a_report_that_was_cut_off_starts_anew(tmp_path: Path) -> None:
    place = Plain()
    report.path_of(place, tmp_path).write_text('{"schema": 1, "sta')
    finding = stages.Finding("a", "wrong", "off")
    report.add(place, report.machine(place), "verify", stages.Result([finding], 1.0), tmp_path)
    data, _ = _report(tmp_path)
    assert list(data["stages"]) == ["verify"]
    assert not list(tmp_path.glob("*.new"))


def test_an_infinite_severity_is_json(tmp_path: Path) -> None:
    place, case = Plain(), _plan().timed[0].cases[0]
    figure = Figure("rmc cpu", 1, 0, "a clock", "parity failed", severity=float("inf"))
    result = stages.Result([stages.Finding("a", "wrong")], 1.0, [CaseResult(case, [figure], [])])
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


def _job(name: str) -> str:
    time.sleep(1000 if name == "hangs" else 0)
    return name.upper()


def test_a_job_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    jobs = ["hangs", "a", "b"]
    found = list(apart.run_all(_job, jobs, workers=1, deadline=time.monotonic() + 1000, limit=1))
    assert [(done.job, done.value, done.error) for done in found] == [
        ("hangs", None, "it had not ended after 1 s"), ("a", "A", ""), ("b", "B", ""),
    ]  # fmt: skip
    assert not multiprocessing.active_children()


def test_a_process_that_hangs_at_its_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(apart, "PATIENCE", 0.2)
    child = apart._child

    def hangs(*arguments: Any) -> None:
        child(*arguments)
        time.sleep(1000)

    monkeypatch.setattr(apart, "_child", hangs)
    (done,) = apart.run_all(_job, ["a"], workers=1, deadline=time.monotonic() + 1000)
    assert done.value == "A"
    assert not multiprocessing.active_children()
