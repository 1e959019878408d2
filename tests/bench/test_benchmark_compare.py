"""`rmc bench compare`, `profile` and `report`: what is concluded from results, and what is written of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rmc_kernels import CellSpec
from rmc_kernels.backends import BACKENDS, Call, Unrolled
from rmc_kernels.backends.reference import ReferenceBackend
from rmc_kernels.bench import case_run, ceilings, command, machine, markdown, profiling, report, summary, timing
from rmc_kernels.bench.cases import SUITES, Case, Group, Suite
from rmc_kernels.bench.command import bench
from rmc_kernels.bench.compare import Change, compare, interval
from rmc_kernels.bench.gpu import report as gpu
from rmc_kernels.bench.record import Figure, TimedCase
from rmc_kernels.bench.suite import SuiteResult, run_suite
from rmc_kernels.bench.targets import BOUND, TARGETS
from tests.bench_cases import BRIEF, SMALL, SMALL_TRAINING, figure

ROUNDS = 30
MIB = 1 << 20
Drift = Callable[[int], float]


def noisy(seconds: float, seed: int, drift: Drift = lambda number: 1.0, noise: float = 0.05) -> list[float]:
    """Samples of a machine whose speed drifts from round to round, each with noise of its own."""
    rng = random.Random(seed)
    return [seconds * drift(number) * rng.lognormvariate(0, noise) for number in range(ROUNDS)]


def result(*cases: TimedCase, **about: object) -> SuiteResult:
    return SuiteResult("quick", machine.describe("cpu") | about, {}, list(cases))


def record(factor: float, seed: int, drift: Drift = lambda number: 1.0, peak: int | None = None) -> SuiteResult:
    """A build that is `factor` times slower, on a machine that drifts."""
    eager, ours = noisy(4.0, seed, drift), noisy(1.0 * factor, seed + 1, drift)
    return result(TimedCase(SMALL, [figure("eager", eager), figure("rmc cpu", ours, peak_bytes=peak)], []))


def verdicts(changes: Sequence[Change]) -> list[str]:
    return [change.verdict for change in changes]


# -- compare -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "same"), (1.05, "same"), (1.3, "slower"), (2.0, "slower"), (0.7, "faster")]
)
def test_a_slowed_build_is_flagged(factor: float, verdict: str) -> None:
    (change,) = compare(record(1.0, 0), record(factor, 10))
    assert change.verdict == verdict
    assert change.relative_to == "eager"
    assert change.ratio is not None
    assert change.ratio.low < factor < change.ratio.high


def test_noise_alone_is_never_flagged() -> None:
    for seed in range(0, 100, 2):
        assert verdicts(compare(record(1.0, seed), record(1.0, 1000 + seed))) == ["same"]


def test_a_machine_that_slows_down_is_no_regression() -> None:
    slow, uneven = record(1.0, 2, lambda number: 3.0), record(1.0, 4, lambda number: 1.0 + number % 10)
    assert verdicts(compare(record(1.0, 0), slow)) == ["same"]
    assert verdicts(compare(record(1.0, 0), uneven)) == ["same"]
    assert verdicts(compare(slow, record(1.4, 6))) == ["slower"]


def test_without_eager_the_peak_is_the_measure() -> None:
    def build(seconds: float, fma: float) -> SuiteResult:
        return result(TimedCase(SMALL, [figure("rmc cpu", noisy(seconds, 1, noise=0.01), fma=fma)], []))

    (same,) = compare(build(1.0, 100.0), build(2.0, 50.0))
    (slower,) = compare(build(1.0, 100.0), build(2.0, 100.0))
    assert (same.relative_to, same.verdict, slower.verdict) == ("FMA peak", "same", "slower")


def test_the_interval_holds_the_ratio_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(100):
        found = interval(noisy(1.0, seed), noisy(1.2, 500 + seed))
        inside += found.low < 1.2 < found.high
        assert found.low <= found.middle <= found.high
    assert inside >= 94


def test_memory_that_grew_and_what_was_lost_are_flagged() -> None:
    small, large = record(1.0, 0, peak=10 * MIB), record(1.0, 2, peak=12 * MIB)
    assert verdicts(compare(small, large)) == ["more memory"]
    assert verdicts(compare(large, small)) == ["same"]
    assert verdicts(compare(record(1.0, 0, peak=1000), record(1.0, 2, peak=2000))) == [
        "same"
    ]  # a page is no regression
    failed = Figure("rmc cpu", 1, 1, "CPU time", "parity failed", note="memories")
    broken = result(TimedCase(SMALL, [figure("eager", noisy(4.0, 3)), failed], []))
    assert verdicts(compare(small, broken)) == ["lost"]


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.5, 1)])
def test_the_exit_code_tells(tmp_path: Path, factor: float, code: int) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(record(1.0, 0).to_json())
    new.write_text(replace(record(factor, 10), machine=machine.describe("cpu") | {"torch": "9.9"}).to_json())
    found = CliRunner().invoke(bench, ["compare", str(old), str(new)])
    assert found.exit_code == code, found.output
    assert "Not the same torch" in found.output
    assert SMALL.name in found.output
    assert f"{code} slower" in found.output
    if factor > 1:
        assert CliRunner().invoke(bench, ["compare", str(old), str(new), "--threshold", "0.6"]).exit_code == 0


def test_nothing_in_common_is_no_success(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(record(1.0, 0).to_json())
    new.write_text(result().to_json())
    assert CliRunner().invoke(bench, ["compare", str(old), str(new)]).exit_code == 1
    new.write_text("{}")
    found = CliRunner().invoke(bench, ["compare", str(old), str(new)])
    assert found.exit_code == 2
    assert "schema 1" in found.output


class Working(ReferenceBackend):
    """The reference in the place of "cpu": it does everything several times, and counts that as work."""

    name = "cpu"
    work = 0

    def __init__(self, times: int) -> None:
        self.times = times

    def forward(self, spec: CellSpec, call: Call, save: bool) -> Unrolled:
        for _ in range(self.times):
            Working.work += 1
            found = super().forward(spec, call, save)
        return found


def by_work(call: timing.Call, count: int) -> timing.Reading:
    """A clock that ticks once a call and once for each unit of work: alike on every machine."""
    before = Working.work
    for _ in range(count):
        call()
    return timing.Reading(count + Working.work - before, count)


def test_a_slowed_backend_is_flagged_from_run_to_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Suite((Group((SMALL, SMALL_TRAINING), ("eager",), BRIEF),), 60)
    monkeypatch.setitem(SUITES, "demo", cut)
    monkeypatch.setattr(ceilings, "available", lambda: False)
    monkeypatch.setattr(case_run, "clock_for", lambda device, threads: ("work", by_work))

    def measured(times: int) -> SuiteResult:
        monkeypatch.setitem(BACKENDS, "cpu", Working(times))
        found = run_suite("demo", backend="cpu")
        assert found.ok, found.notes()
        return found

    before = measured(1)
    assert verdicts(compare(before, measured(1))) == ["same", "same"]
    assert verdicts(compare(before, measured(2))) == ["slower", "slower"]
    assert verdicts(compare(measured(2), before)) == ["faster", "faster"]


# -- profile -----------------------------------------------------------------------------------------------------------


def test_the_operators_of_a_case_are_told() -> None:
    found = profiling.profile(SMALL, "eager", 0.0)
    assert {"aten::addmm", "between operators"} <= {part.name for part in found.parts}
    assert found.calls == 1
    assert [part.seconds for part in found.parts] == sorted((part.seconds for part in found.parts), reverse=True)


@pytest.mark.skipif(BACKENDS["cpu"].unavailable() is not None, reason="installed without the C++ extension")
@pytest.mark.parametrize("case", [SMALL, SMALL_TRAINING], ids=lambda case: case.mode)
def test_the_phases_of_a_case_are_told(case: Case) -> None:
    found = profiling.profile(case, "cpu", 0.0)
    names = {part.name for part in found.parts}
    assert {"qkv", "gates", "attention", profiling.OUTSIDE} <= names
    assert ("weight_gradient" in names) == (case.mode == "forward+backward")
    inside = sum(part.seconds for part in found.parts if part.name != profiling.OUTSIDE)
    assert 0 < inside <= found.seconds


def test_the_profile_command() -> None:
    found = CliRunner().invoke(bench, ["profile", SMALL.name, "--contestant", "lstm", "--seconds", "0"])
    assert found.exit_code == 0, found.output
    assert "aten::" in found.output
    for arguments, words in (
        ([SMALL.name, "--contestant", "perceptron"], "contestant takes"),
        (["B=1"], "missing"),
    ):
        found = CliRunner().invoke(bench, ["profile", *arguments])
        assert found.exit_code == 2
        assert words in found.output


# -- report ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole() -> SuiteResult:
    """A case on one and on two threads, and a curve in T where the Transformer is quadratic and ours linear."""
    single = [figure("eager", [4.0] * 3), figure("lstm", [0.5] * 3), figure("rmc cpu", [1.0] * 3)]
    two = [figure("eager", [3.0] * 3, threads=2), figure("rmc cpu", [0.5] * 3, threads=2)]
    cases = [
        TimedCase(Case(16, 16, 8, 256), single, ["other processes were running: load average 3.0 at the start"]),
        TimedCase(Case(16, 16, 8, 256, threads=2), [*single, *two], []),
    ]
    for steps in (10, 100, 1000):
        models = [
            figure("transformer", [1e-6 * steps**2] * 3, flops=steps**2, peak_bytes=steps**2 * MIB),
            figure("rmc cpu", [1e-4 * steps] * 3, flops=steps, peak_bytes=steps * MIB),
        ]
        cases.append(TimedCase(Case(2, steps, 4, 32, mode="forward+backward"), models, []))
    return result(*cases)


def test_the_blocks_tell_wins_and_losses(whole: SuiteResult) -> None:
    assert "1 of 5 cases are in doubt" in markdown.about(whole)
    assert "| batch 16, 8 slots, D = 256 | 4.00 x |  |" in markdown.headline(whole)
    assert "| B=16 T=16 N=8 D=256 H=4, forward | 250,000 | 62,500 | 62,500 | 4.00 |" in markdown.one_thread(whole)
    assert "| B=16 T=16 N=8 D=256 H=4, forward | 2 | 1.33 | 8.00 | 2.00 |" in markdown.threads(whole)
    table = markdown.side_by_side(whole)
    assert "B=2 N=4 D=32 H=4, forward+backward, 1 thread, T to 1000" in table
    assert "| transformer | 1,000 | 1,000.0 | 0.00 | 1,048,576.0 | 2.00 (2.00) | 2.00 (2.00) | 2.00 (2.00) |" in table
    assert "1.00 (1.00) | 1.00 (1.00) | 1.00 (1.00) |" in table
    lines = markdown.losses(whole).splitlines()
    assert "| lstm | 1 | 1 | 2.00 x | 0.50 |  |" in lines
    assert "| transformer | 3 | 1 | 10.00 x | 1.00 | 10.00 x |" in lines
    assert markdown.slopes(whole) == markdown.NOTHING
    assert markdown.targets(whole).splitlines()[2:] == [
        "| B=16 T=16 N=8 D=256 H=4, forward, 1 thread | 65% of the FMA peak | 85% of the FMA peak "
        "| 1% of the FMA peak | missed |",
        "| B=16 T=16 N=8 D=256 H=4, forward, 2 threads | 1.70 x one thread |  | 2.00 x one thread | met |",
    ]
    bound = next(target for target in TARGETS if target.measure is BOUND)
    assert [bound.verdict(value) for value in (3.1, 3.0, 2.0)] == ["missed", "met", "at the aim"]


def test_a_document_is_written_between_its_markers(whole: SuiteResult, tmp_path: Path) -> None:
    stored, page = tmp_path / "r.json", tmp_path / "page.md"
    stored.write_text(whole.to_json())
    page.write_text("# Speed\n<!-- bench headline -->\nold figures\n<!-- /bench -->\nprose stays\n")
    for _ in range(2):
        found = CliRunner().invoke(bench, ["report", str(stored), str(page)])
        assert found.exit_code == 0, found.output
        assert page.read_text() == (
            f"# Speed\n<!-- bench headline -->\n{markdown.headline(whole)}\n<!-- /bench -->\nprose stays\n"
        )
    found = CliRunner().invoke(bench, ["report", str(stored)])
    assert all(f"<!-- bench {name} -->" in found.output for name in markdown.BLOCKS)
    assert report.render(report.everything(whole), whole) == report.everything(whole)


@pytest.mark.parametrize(
    "text", ["no markers", "<!-- bench headline -->\n", "<!-- bench nonsense -->\n<!-- /bench -->"], ids=repr
)
def test_a_document_without_right_markers_is_left_alone(whole: SuiteResult, tmp_path: Path, text: str) -> None:
    stored, page = tmp_path / "r.json", tmp_path / "page.md"
    stored.write_text(whole.to_json())
    page.write_text(text)
    found = CliRunner().invoke(bench, ["report", str(stored), str(page)])
    assert found.exit_code == 2
    assert "block" in found.output
    assert page.read_text() == text


# -- results without samples -------------------------------------------------------------------------------------------


def test_without_samples_medians_quartiles_and_counts_stay(whole: SuiteResult) -> None:
    rival, ours = figure("lstm", [2.0, 3.0, 4.0, 50.0]), figure("rmc cpu", [1.0, 1.0, 4.0, 5.0], peak_bytes=7)
    eager, failed = figure("eager", [4.0] * 4), Figure("rmc new", 1, 5, "CPU time", "parity failed", note="memories")
    before = result(TimedCase(replace(SMALL, batch_size=1), [eager, rival, ours, failed], ["cores changed speed"]))
    text = before.without_samples().to_json()
    after = SuiteResult.from_json(text)
    (case,) = after.cases
    assert (case.case, case.contention, case.ok) == (before.cases[0].case, ["cores changed speed"], False)
    assert case.figures[3] == failed
    summarised = case.figures[2]
    assert (summarised.seconds, summarised.wall, summarised.fma, summarised.peak_bytes) == ([], [], [], 7)
    assert (summarised.rounds, summarised.best, summarised.spread) == (4, 1.0, (1.0, 2.5, 4.25))
    assert case.speed_up(summarised) == (0.95, 2.5, 4.0)
    assert case.times_ours(case.figures[1]) == 2.5  # of 2, 3, 1 and 10
    assert case.times_ours(summarised) is None
    assert summarised.share_of_peak == pytest.approx(ours.share_of_peak)
    assert summarised.times_bound(case.case) == pytest.approx(ours.times_bound(case.case))
    assert case.summary(summarised) == {**before.cases[0].summary(ours), "speed_up_quartiles": [0.95, 4.0]}
    assert after.without_samples().to_json() == text
    assert summary.from_csv(summary.to_csv(before)) == after
    assert report.everything(summary.from_csv(summary.to_csv(whole))) == report.everything(whole)


def test_what_is_odd_comes_back_from_csv() -> None:
    """Figures that failed, texts of several lines, commas, quotes and a line that looks like the header."""
    broken = Figure("rmc cpu", 1, 7, status="error", note='of "x", y', trace="one\n# two: 3\n", is_rmc=False)
    doubted = TimedCase(SMALL, [broken, figure("eager", [1.0])], ["cores changed speed: 20 %", "load: 2.0"])
    failed = TimedCase(replace(SMALL, threads=2), [broken], [])
    odd = replace(result(doubted, failed), absent={"triton": "none: # 0, or\nso"}, command="rmc bench")
    again = summary.from_csv(summary.to_csv(odd))
    assert again == odd.without_samples()
    assert not again.ok
    assert summary.to_csv(again) == summary.to_csv(odd)
    assert summary.from_csv(summary.to_csv(result())) == result()


def test_numbers_without_samples_are_rounded_to_more_than_any_table_shows() -> None:
    third = SuiteResult.from_json(result(TimedCase(SMALL, [figure("eager", [1 / 3])], [])).without_samples().to_json())
    assert third.cases[0].figures[0].best == 0.3333333


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "same"), (1.05, "same"), (1.3, "slower"), (2.0, "slower"), (0.7, "faster")]
)
def test_medians_are_compared_where_samples_are_missing(factor: float, verdict: str) -> None:
    old, new = record(1.0, 0), record(factor, 10, lambda number: 3.0)
    for pair in ((old.without_samples(), new), (old, new.without_samples()), (old.without_samples(),) * 2):
        (change,) = compare(*pair)
        expected = verdict if pair[0] is not pair[1] else "same"
        assert (change.verdict, change.relative_to, change.sampled) == (expected, "eager", False)
        assert change.ratio is not None
        assert change.ratio.middle == pytest.approx(1.0 if pair[0] is pair[1] else factor, rel=0.05)


def test_without_eager_medians_are_relative_to_the_peak_or_to_nothing() -> None:
    def build(seconds: float, fma: float) -> SuiteResult:
        ours = figure("rmc cpu", [seconds] * 3, fma=fma) if fma else replace(figure("rmc cpu", [seconds]), fma=[])
        return result(TimedCase(SMALL, [ours], [])).without_samples()

    (same,) = compare(build(1.0, 100.0), build(2.0, 50.0))
    (slower,) = compare(build(1.0, 100.0), build(2.0, 100.0))
    (bare,) = compare(build(1.0, 0.0), build(2.0, 0.0))
    assert (same.relative_to, same.verdict, slower.verdict) == ("FMA peak", "same", "slower")
    assert (bare.relative_to, bare.verdict) == ("nothing", "slower")


@pytest.mark.parametrize("form", ["csv", "json"])
def test_the_summarize_command(tmp_path: Path, form: str) -> None:
    whole, short = tmp_path / "whole.json", tmp_path / f"short.{form}"
    stored = replace(record(1.0, 0), command="rmc bench --suite quick")
    whole.write_text(stored.to_json())
    found = CliRunner().invoke(bench, ["summarize", str(whole), str(short)])
    assert found.exit_code == 0, found.output
    again = command.read(short)
    assert (again.command, again.machine) == (stored.command, stored.machine)
    assert [figure.rounds for figure in again.cases[0].figures] == [ROUNDS, ROUNDS]
    assert 5 * len(short.read_text().splitlines()) < len(whole.read_text().splitlines())
    found = CliRunner().invoke(bench, ["compare", str(short), str(whole)])
    assert found.exit_code == 0, found.output
    assert "No interval" in found.output
    assert "none" in found.output
    figures = '# schema: 1\ncase,contention\n"a'
    for damaged in (
        "{}",
        "# schema: 2\n",
        "# schema: 1\n",
        "# schema\n",
        "# schema.one: 1\n",
        figures,
        figures + '",b,c\n',
    ):
        whole.write_text(damaged)
        found = CliRunner().invoke(bench, ["summarize", str(whole), str(short)])
        assert found.exit_code == 2
        assert "is no result of `rmc bench`" in " ".join(found.output.replace("│", " ").split())


def test_a_report_of_a_gpu_is_summarized(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    case = record(1.0, 0).cases[0]
    path.write_text(json.dumps({"schema": gpu.SCHEMA, "stages": {"forward": {"ok": True, "cases": [case.as_dict()]}}}))
    refused = CliRunner().invoke(bench, ["summarize", str(path), str(tmp_path / "gpu.csv")])
    assert refused.exit_code == 2
    assert "OUT must be PATH.json" in refused.output
    found = CliRunner().invoke(bench, ["summarize", str(path), str(path)])
    assert found.exit_code == 0, found.output
    stage = json.loads(path.read_text())["stages"]["forward"]
    assert stage["ok"] is True
    assert TimedCase.from_dict(stage["cases"][0]).figures[1].rounds == ROUNDS
    assert "wall" not in path.read_text()


def test_what_is_committed_is_small_and_holds_no_samples() -> None:
    """`rmc bench summarize` makes it of what `--out` wrote."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    for name in ("quick", "targets"):
        stored = command.read(folder / f"cpu-{name}.csv")
        figures = [figure for case in stored.cases for figure in case.figures]
        assert figures
        assert not [figure for figure in figures if figure.seconds or not figure.rounds], name
        assert stored.command.startswith("rmc bench "), name
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 60_000


def test_records_from_before_memory_was_measured_are_read() -> None:
    data = json.loads(record(1.0, 0).to_json())
    for stored in data["cases"][0]["figures"]:
        del stored["peak_bytes"], stored["parameters"]
    old = SuiteResult.from_json(json.dumps(data))
    assert old.cases[0].figures[0].peak_bytes is None
    assert verdicts(compare(old, record(1.0, 2, peak=10))) == ["same"]
    assert "| 1,337,248 | 334,372 | 313,243 | 3.90 |" in markdown.one_thread(old)


@pytest.mark.parametrize(
    ("result", "page"),
    [("cpu-quick", "docs/performance.md"), ("cpu-quick", "README.md"), ("cpu-targets", "docs/targets.md")],
)
def test_a_page_says_what_its_result_says(result: str, page: str) -> None:
    """After a new result: `rmc bench report benchmarks/results/RESULT.csv PAGE`."""
    root = Path(__file__).resolve().parents[2]
    text = (root / page).read_text(encoding="utf-8")
    stored = command.read(root / "benchmarks" / "results" / f"{result}.csv")
    assert report.render(text, stored) == text
