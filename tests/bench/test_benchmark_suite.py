"""The benchmark as it runs: timing, contention, what is concluded, the suite and the command."""

from __future__ import annotations

import io
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from rmc_kernels import backends
from rmc_kernels.bench import case_run, ceilings, contention, machine, parity, plots, suite, timing
from rmc_kernels.bench.cases import SUITES, Case, Group, Suite
from rmc_kernels.bench.ceilings import Ceilings
from rmc_kernels.bench.command import bench
from rmc_kernels.bench.record import Figure, Spread, TimedCase
from rmc_kernels.bench.suite import SuiteResult, run_suite
from tests.bench_cases import BRIEF, QUIET, SMALL, SMALL_TRAINING, figure, run_small

# -- timing ------------------------------------------------------------------------------------------------------------


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    before = torch.get_num_threads()
    seen: list[tuple[str, int]] = []

    def clock(call: timing.Call, count: int) -> timing.Reading:
        call()
        seen.append((order[-1], torch.get_num_threads()))
        return timing.Reading(0.02 * count, 0.03 * count)

    def entry(name: str, threads: int) -> timing.Entry:
        return timing.Entry(lambda: order.append(name), threads, clock)

    entries = [entry("a", 1), entry("b", 2)]
    ticks = itertools.count()
    shares: list[float] = []
    samples = timing.interleave(
        entries, 7.0, lambda threads: replace(QUIET, fma=threads), now=lambda: next(ticks), on_progress=shares.append
    )
    rounds = [name for name, _ in seen[2:]]  # the first two calls are the warm-up's
    assert rounds[:6] == ["a", "b", "b", "a", "a", "b"]
    assert len(samples[0]) == len(samples[1]) >= 5
    assert set(seen) == {("a", 1), ("b", 2)}
    assert [sample.seconds for sample in samples[0]] == [0.02] * len(samples[0])
    assert [sample.ceilings for sample in samples[1] if sample.ceilings and sample.ceilings.fma != 2] == []
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert torch.get_num_threads() == before


def test_short_calls_are_repeated() -> None:
    calls: list[int] = []

    def clock(call: timing.Call, count: int) -> timing.Reading:
        calls.append(count)
        return timing.Reading(0.001 * count, 0.001 * count)

    (samples,) = timing.interleave([timing.Entry(lambda: None, 1, clock)], BRIEF, lambda threads: None, fewest=4)
    assert calls == [1] + [10] * 4
    assert all(sample.seconds == pytest.approx(0.001) for sample in samples)


def test_clocks_tell_time_of_all_calls() -> None:
    done: list[int] = []
    for clock in (timing.by_cpu, timing.by_wall):
        reading = clock(lambda: done.append(1), 3)
        assert reading.seconds >= 0
        assert reading.wall > 0
    assert len(done) == 6
    assert timing.clock_for("cpu", 1)[1] is timing.by_cpu
    assert timing.clock_for("cpu", 2)[1] is timing.by_wall
    assert timing.clock_for("cuda", 1)[1] is timing.by_do_bench


def test_gpu_time_is_what_triton_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")
    asked: list[Any] = []

    def do_bench(call: timing.Call, **options: object) -> float:
        asked.append(call())
        return 4.0

    monkeypatch.setattr(testing, "do_bench", do_bench)
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(len(runs)))
    runs: list[str] = []
    found = timing.by_do_bench(lambda: runs.append("run"), 3)
    assert found.seconds == 0.012
    assert found.wall > 0
    assert waited == [1, 4], "the wall time is that of three calls, done"
    assert len(asked) == 1


@pytest.mark.skipif(not ceilings.available(), reason="installed without the C++ extension")
def test_ceilings_are_read() -> None:
    found = ceilings.read(2, 1 << 16)
    assert found.fma > 0
    assert found.gemm > 0
    assert found.bandwidth > 0
    assert found.stretch > 0.9


# -- contention --------------------------------------------------------------------------------------------------------


def taken(*ceilings_read: Ceilings | None) -> list[timing.Sample]:
    return [timing.Sample(1.0, 1.0, c) for c in ceilings_read]


@pytest.mark.parametrize(
    ("samples", "load", "words"),
    [
        (taken(*[QUIET] * 9), 0.1, []),
        (taken(None, None), None, []),
        (taken(*[replace(QUIET, stretch=1.5)] * 9), 0.1, ["waited for a core: wall time 1.50"]),
        (taken(*[QUIET] * 5, *[replace(QUIET, fma=70.0)] * 4), 0.1, ["changed speed: FMA peak spread 30 %"]),
        (taken(*[replace(QUIET, gemm=140.0)] * 9), 0.1, ["FMA peak is none: 100 GFLOP/s, and a GEMM ran at 140"]),
        (taken(*[QUIET] * 9), 3.2, ["load average 3.2"]),
        (taken(*[replace(QUIET, stretch=2.0)] * 9), 3.2, ["waited for a core", "load average"]),
    ],
)
def test_contention_is_detected(samples: list[timing.Sample], load: float | None, words: list[str]) -> None:
    found = contention.reasons(samples, load)
    assert len(found) == len(words)
    assert all(word in reason for word, reason in zip(words, found, strict=True))


def test_contention_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    result = replace(run_small(monkeypatch), contention=["something ran"])
    whole = SuiteResult("demo", machine.describe("cpu"), {}, [result])
    assert any(note.startswith("IN DOUBT") and "something ran" in note for note in whole.notes())
    assert any("in doubt" in str(cell) for cell in whole.table().columns[0].cells)
    console = Console(width=60, file=io.StringIO())
    whole.show(console)
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


# -- what is concluded -------------------------------------------------------------------------------------------------


def test_figures_follow_from_samples() -> None:
    case = Case(2, 4, 3, 16, 2, 5, threads=2)
    slow, one = figure("eager", [4.0, 8.0, 6.0]), figure("rmc cpu", [1.0, 2.0, 1.0])
    two = figure("rmc cpu", [0.5, 2.0, 0.5], threads=2)
    result = TimedCase(case, [slow, one, two], [])
    assert result.speed_up(one) == Spread(4.0, 4.0, 5.0)  # of 4, 4, 6: paired, round by round
    assert result.scaling(two) == Spread(1.5, 2.0, 2.0)
    assert result.scaling(one) is None
    assert one.share_of_peak == pytest.approx(1 / (1.0 * 100))
    assert two.share_of_peak == pytest.approx(1 / (0.5 * 100 * 2))
    summary = result.summary(one)
    assert summary["us_per_step"] == pytest.approx(250000)
    assert summary["us_per_step_best"] == pytest.approx(250000)
    assert summary["tokens_per_second"] == pytest.approx(8)
    assert summary["times_bound"] is None
    assert replace(one, fma=[], bandwidth=[]).share_of_peak is None


def test_one_element_is_held_to_the_larger_bound() -> None:
    case = Case(1, 4, 3, 16, 2, 5)
    names = [name for name in case.spec.parameter_names if not name.startswith(("input_projection", "input_gate"))]
    count = sum(torch.Size(case.spec.parameter_shapes[name]).numel() for name in names)
    assert case.weight_bytes == 4 * count
    by_flops = figure("rmc cpu", [0.02])
    assert by_flops.times_bound(case) == pytest.approx(0.02 / 0.01)
    by_bytes = figure("rmc cpu", [1.0], flops=1)
    seconds = case.steps * case.weight_bytes / 10e9
    assert by_bytes.times_bound(case) == pytest.approx(1 / seconds)
    assert by_bytes.times_bound(replace(case, mode="forward+backward")) == pytest.approx(0.5 / seconds)
    assert replace(by_bytes, is_rmc=False).times_bound(case) is None


def test_json_round_trip(tmp_path: Path) -> None:
    figures = [figure("eager", [2.0, 3.0]), figure("rmc cpu", [1.0, 1.0])]
    failed = Figure("rmc new", 1, 5, "CPU time", "parity failed", note="memories: RMS", severity=3.0)
    cases = [TimedCase(SMALL_TRAINING, [*figures, failed], ["cores changed speed"]), TimedCase(SMALL, figures, [])]
    result = SuiteResult("quick", machine.describe("cpu"), {"triton": "absent"}, cases)
    text = result.to_json()
    again = SuiteResult.from_json(text)
    assert again == result
    data = json.loads(text)
    assert data["schema"] == suite.SCHEMA
    assert data["ok"] is False
    assert {"processor", "torch", "python", "rmc_kernels", "load", "cores", "when"} <= data["machine"].keys()
    assert data["cases"][0]["figures"][1]["summary"]["speed_up"] == 2.5
    assert os.fspath(Path.cwd()) not in text
    with pytest.raises(ValueError, match="schema"):
        SuiteResult.from_json(json.dumps(data | {"schema": 0}))
    written = result.write(tmp_path / "new" / "r.json")
    assert [path.name for path in written] == ["r.json", "r-speedup.png", "r-peak.png", "r-roofline.png"]
    assert all(path.stat().st_size > 1000 for path in written)


def test_plots_without_figures_are_left_out(tmp_path: Path) -> None:
    failed = Figure("rmc cpu", 1, 5, "CPU time", "error", note="broken")
    assert plots.draw_all([TimedCase(SMALL, [failed], [])], tmp_path, "none") == []


# -- the suite and the command -----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo suite cut down to two small cases, without ceilings."""
    threaded = replace(SMALL, batch_size=16, steps=1, threads=2)  # few operators: each may wait long for a core
    cases = (SMALL_TRAINING, threaded)
    monkeypatch.setitem(SUITES, "demo", Suite((Group(cases, ("eager", "lstm"), BRIEF, fewest_rounds=1),), 60))
    monkeypatch.setattr(ceilings, "available", lambda: False)


@pytest.fixture
def app() -> typer.Typer:
    return bench


@pytest.mark.usefixtures("tiny")
def test_a_suite_runs(tmp_path: Path) -> None:
    result = run_suite("demo", out_dir=tmp_path, backend="reference", against=["eager"])
    assert result.ok, result.notes()
    assert [case.case.threads for case in result.cases] == [1, 2]
    assert all(figure.status == "timed" and figure.seconds for case in result.cases for figure in case.figures)
    assert SuiteResult.from_json((tmp_path / "bench-demo.json").read_text()) == result
    assert result.machine["seconds"] > 0
    assert any("Ceilings were not measured" in note for note in result.notes())
    assert [case.case.threads for case in run_suite("demo", backend="reference", threads=[1]).cases] == [1]


@pytest.mark.usefixtures("tiny")
def test_passes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "demo", replace(SUITES["demo"], passes=3))
    result = run_suite("demo", backend="reference", against=["eager"])
    assert [case.case.threads for case in result.cases] == [1, 2]
    assert all(len(f.seconds) == len(f.wall) >= 3 for case in result.cases for f in case.figures)


def test_what_failed_in_one_pass_has_failed() -> None:
    right = Figure("rmc cpu", 1, 10, "CPU time", "timed", seconds=[1.0], wall=[2.0])
    wrong = Figure("rmc cpu", 1, 10, "CPU time", "parity failed", note="far off")
    first = TimedCase(SMALL, [right], ["cores changed speed: by 20 %"])
    again = first.then(
        replace(first, figures=[replace(right, seconds=[3.0])], contention=["cores changed speed: by 30 %"])
    )
    assert (again.figures[0].seconds, again.figures[0].wall) == ([1.0, 3.0], [2.0, 2.0])
    assert again.contention == ["cores changed speed: by 30 %"]
    failed = TimedCase(SMALL, [wrong], [])
    assert first.then(failed).figures == failed.then(first).figures == [wrong]


@pytest.mark.usefixtures("tiny")
def test_the_command(tmp_path: Path, app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    out, arguments = tmp_path / "r.json", ["--suite", "demo", "--backend", "reference", "--threads", "1"]
    found = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert "rmc reference" in found.output
    assert SuiteResult.from_json(out.read_text()).ok
    monkeypatch.setattr(parity, "check", lambda *args: parity.Verdict(False, 2.0, "memories: too far"))
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 1
    assert "parity FAILED" in found.output


@pytest.mark.parametrize(
    "arguments",
    [["--suite", "huge"], ["--backend", "cobol"], ["--against", "lstm,perceptron"], ["--device", "tpu"]],
    ids=lambda arguments: arguments[0],
)
def test_the_command_names_what_it_takes(app: typer.Typer, arguments: list[str]) -> None:
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert "takes one of" in found.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(app: typer.Typer) -> None:
    found = CliRunner().invoke(app, ["--device", "cuda"])
    assert found.exit_code == 1
    assert "There is no GPU" in found.output


def test_who_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    names, absent = case_run.taking_part("reference", [SMALL], "cpu")
    assert (names, absent) == (["reference"], {})
    for backend in backends.BACKENDS.values():
        if backend.name != "reference":
            monkeypatch.setattr(backend, "unavailable", lambda: "not built")
    names, absent = case_run.taking_part("all", [SMALL], "cpu")
    assert names == ["reference"]
    assert absent["cpu"] == "not built"
    assert case_run.taking_part("cpu", [SMALL], "cpu") == ([], {"cpu": "not built"})
    with pytest.raises(ValueError, match="backend takes one of"):
        case_run.taking_part("cobol", [SMALL], "cpu")
