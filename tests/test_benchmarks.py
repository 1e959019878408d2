"""The benchmarks: what they count, check and conclude. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from rmc_kernels import CellSpec, backends, reference
from rmc_kernels.benchmarks import ceilings, contention, eager, machine, parity, plots, suite, timing
from rmc_kernels.benchmarks.cases import SPEED_TABLE, SUITES, Case, Suite
from rmc_kernels.benchmarks.ceilings import Ceilings
from rmc_kernels.benchmarks.command import bench
from rmc_kernels.benchmarks.contestants import (
    RIVALS,
    Bound,
    Contestant,
    bind_eager,
    equal_hidden_size,
    line_up,
    timed,
)
from rmc_kernels.benchmarks.problem import Problem, draw
from rmc_kernels.benchmarks.record import CaseResult, Figure, Spread
from rmc_kernels.benchmarks.suite import SuiteResult, run_suite

SMALL = Case(4, 3, 3, 16, 2, 5)
SMALL_TRAINING = replace(SMALL, mode="forward+backward")
ALL_CASES = tuple(dict.fromkeys(case for chosen in SUITES.values() for case in chosen.cases))
BRIEF = 1e-9
QUIET = Ceilings(fma=100.0, gemm=65.0, amx=1000.0, bandwidth=50.0, stretch=1.0)


class CountOps(TorchDispatchMode):
    """Counts dispatched operations, and those of them that are no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Collection[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.ops += 1
        self.kernels += not func.is_view
        return func(*args, **(kwargs or {}))


def ops_of(case: Case) -> CountOps:
    problem = draw(case)
    count = CountOps()
    with torch.no_grad(), count:
        eager.unroll(problem.x, problem.memory, problem.params, problem.spec)
    return count


# -- the yardstick -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SMALL, Case(1, 3, 4, 128), Case(16, 3, 8, 256)], ids=lambda case: case.size)
def test_the_yardstick_is_frozen(case: Case) -> None:
    first, more = ops_of(case), ops_of(replace(case, steps=case.steps + 2))
    assert (more.kernels - first.kernels, more.ops - first.ops) == (
        2 * eager.KERNELS_PER_STEP,
        2 * eager.OPS_PER_STEP,
    )
    assert (eager.KERNELS_PER_STEP, eager.OPS_PER_STEP) == (19, 37)


@pytest.mark.parametrize("biases", [(1.0, 0.0), (-0.5, 2.0)])
@pytest.mark.parametrize("key_size", [None, 3])
def test_the_yardstick_computes_the_cell(biases: tuple[float, float], key_size: int | None) -> None:
    spec = CellSpec.sonnet(5, 3, 8, 2, forget_bias=biases[0], input_bias=biases[1], key_size=key_size)
    problem = replace(draw(SMALL), spec=spec)
    values = {name: torch.randn(shape).double() for name, shape in spec.parameter_shapes.items()}
    x, memory = problem.x.double(), problem.memory.double()
    found = eager.unroll(x, memory, values, spec)
    torch.testing.assert_close(found, reference.unroll(x, memory, values, spec)[0], rtol=1e-10, atol=1e-10)


def test_the_compiled_step_is_the_same_code() -> None:
    problem = draw(SMALL)
    eager_backend: eager.Step = torch.compile(eager.eager_step, fullgraph=True, dynamic=False, backend="eager")
    (found,) = timed(bind_eager(problem, eager_backend), "forward")()
    (plain,) = timed(bind_eager(problem), "forward")()
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize(("gates", "module"), [(4, torch.nn.LSTM), (3, torch.nn.GRU)])
def test_other_models_have_as_many_parameters(gates: int, module: Callable[..., torch.nn.Module]) -> None:
    for case in SPEED_TABLE:
        wanted = case.spec.parameter_count
        hidden = equal_hidden_size(wanted, case.input_size, gates)
        count = sum(value.numel() for value in module(case.input_size, hidden).parameters())
        assert count == gates * hidden * (case.input_size + hidden + 2)
        assert abs(count - wanted) < 0.01 * wanted


# -- cases -------------------------------------------------------------------------------------------------------------


def test_the_speed_table_is_complete() -> None:
    def sizes(threads: int, mode: str) -> set[tuple[int, int, int]]:
        chosen = [case for case in SPEED_TABLE if (case.threads, case.mode) == (threads, mode)]
        assert all((case.num_heads, case.input_size, case.dtype) == (4, 64, "float32") for case in chosen)
        assert all(case.steps == 32 for case in chosen if case.batch_size == 1)
        return {(case.batch_size, case.mem_slots, case.mem_size) for case in chosen}

    large, single = {(16, 8, 256), (64, 8, 256), (64, 4, 128)}, {(1, 8, 256), (1, 4, 128)}
    for mode in ("forward", "forward+backward"):
        assert sizes(1, mode) == large | single
        assert sizes(2, mode) == large
    assert set(SUITES["quick"].cases) == set(SUITES["full"].cases) == set(SPEED_TABLE)


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_every_case_is_buildable(case: Case) -> None:
    assert eager.serves(case.spec)
    names = [contestant.name for contestant in line_up(case, RIVALS, ["cpu"], both_modes=True)]
    assert names[0] == "eager"
    assert {*RIVALS, "rmc cpu"} <= set(names)
    assert ("rmc cpu, saved" in names) == (case.mode == "forward+backward")
    assert len(case.name) > 10
    assert case.spec.mem_size == case.mem_size


@pytest.mark.parametrize("case", [SMALL, SMALL_TRAINING], ids=lambda case: case.mode)
def test_every_contestant_runs(case: Case) -> None:
    problem = draw(case)
    for contestant in line_up(case, ["lstm", "gru"], ["reference"], both_modes=True):
        bound = contestant.bind(problem)
        results = timed(bound, case.mode)()
        assert results[0].shape[:2] == (case.batch_size, case.steps)
        assert len(results) == (1 if case.mode == "forward" else 1 + len(bound.leaves))
        assert "x" in bound.leaves


def test_flops_follow_the_mode() -> None:
    def flops(case: Case) -> dict[str, int]:
        return {c.name: c.flops for c in line_up(case, ["lstm"], ["cpu", "reference"], both_modes=True)}

    forward, training = flops(SMALL), flops(SMALL_TRAINING)
    unit = SMALL.steps * SMALL.spec.flops_per_step(SMALL.batch_size)
    assert forward["eager"] == forward["rmc cpu"] == unit
    assert training["eager"] == training["rmc cpu, saved"] == training["rmc reference"] == 3 * unit
    assert training["rmc cpu"] == 4 * unit
    assert training["lstm"] == 3 * forward["lstm"] > 0


def test_more_threads_are_compared_with_one() -> None:
    found = line_up(replace(SMALL, threads=2), ["lstm"], ["cpu"], both_modes=False)
    assert [(c.name, c.threads) for c in found] == [
        ("eager", 1), ("eager", 2), ("lstm", 2), ("rmc cpu", 1), ("rmc cpu", 2),
    ]  # fmt: skip


def test_relu_inputs_are_clear_of_zero() -> None:
    problem = draw(Case(16, 4, 8, 64)).double()
    inputs: list[torch.Tensor] = []
    memory = problem.memory
    rows, gates = eager.hoist(problem.x, problem.params, problem.spec)
    original = torch.Tensor.relu_

    def recorded(value: torch.Tensor) -> torch.Tensor:
        inputs.append(value.clone())
        return original(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "relu_", recorded)
        for t in range(4):
            memory = eager.eager_step(memory, rows[:, t, None], gates[:, t, None], problem.params, problem.spec)
    values = torch.cat([value.flatten() for value in inputs])
    assert values.abs().min() > 1e-4
    assert 0.4 < float((values > 0).double().mean()) < 0.6


# -- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SMALL, SMALL_TRAINING, replace(SMALL_TRAINING, batch_size=1)], ids=lambda c: c.name)
def test_the_yardstick_is_green(case: Case) -> None:
    verdict = parity.check(bind_eager, case)
    assert verdict.ok, verdict.worst


def spoiled(tensor: str) -> Callable[[Problem], Bound]:
    """The eager loop with one result wrong by a few times its rounding."""

    def bind(problem: Problem) -> Bound:
        bound = bind_eager(problem)
        if tensor == "memories":
            return bound._replace(forward=lambda: bound.forward() * (1 + 3e-6))
        leaf: Any = bound.leaves[tensor]
        leaf.register_hook(lambda grad: grad * (1 + 3e-5))
        return bound

    return bind


@pytest.mark.parametrize("tensor", ["memories", "x", "mlp.0.bias", "blocks.0.qkv.weight"])
def test_a_wrong_tensor_is_red(tensor: str) -> None:
    verdict = parity.check(spoiled(tensor), SMALL_TRAINING)
    assert not verdict.ok
    assert verdict.severity > 1
    assert tensor in verdict.worst or tensor == "memories"


def raising(problem: Problem) -> Bound:
    raise RuntimeError("no such instruction\nand a long story")


def run_small(monkeypatch: pytest.MonkeyPatch, *extra: Contestant, case: Case = SMALL) -> CaseResult:
    """`run_case` with the eager loop and some further contestants, one round."""
    contestants = [*line_up(case, [], [], both_modes=False), *extra]
    monkeypatch.setattr(suite, "line_up", lambda *args: contestants)
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(ceilings, "read", lambda threads, weight_bytes: QUIET)
    return suite.run_case(case, Suite((case,), (), BRIEF), [], "cpu", 0.0, lambda share: None)


def test_red_parity_suppresses_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_small(monkeypatch, Contestant("wrong", spoiled("memories"), 1, 1, ours=True))
    right, wrong = result.figures
    assert (right.status, wrong.status) == ("timed", "parity failed")
    assert right.seconds
    assert wrong.seconds == wrong.wall == []
    assert result.summary(wrong) == {}
    assert not result.ok
    whole = SuiteResult("demo", machine.describe("cpu"), {}, [result])
    assert not whole.ok
    shown = [str(cell) for column in whole.table().columns for cell in column.cells]
    assert sum("parity FAILED" in cell for cell in shown) == 1
    assert any(note.startswith("PARITY FAILED") and "wrong" in note for note in whole.notes())


@pytest.mark.parametrize(("ours", "status", "ok"), [(True, "error", False), (False, "unavailable", True)])
def test_what_breaks_is_named_and_the_rest_is_timed(
    monkeypatch: pytest.MonkeyPatch, ours: bool, status: str, ok: bool
) -> None:
    result = run_small(monkeypatch, Contestant("broken", raising, 1, 1, ours=ours))
    assert (result.figures[0].status, result.figures[1].status) == ("timed", status)
    assert result.figures[1].note == "RuntimeError: no such instruction"
    assert result.ok == ok


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
    assert len(samples[0]) == len(samples[1]) >= timing.FEWEST_ROUNDS
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

    (samples,) = timing.interleave([timing.Entry(lambda: None, 1, clock)], BRIEF, lambda threads: None)
    assert calls == [1] + [10] * timing.FEWEST_ROUNDS
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
    assert timing.clock_for("cuda", 1)[1] is timing.by_events


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


# -- what is concluded -------------------------------------------------------------------------------------------------


def figure(name: str, seconds: list[float], *, threads: int = 1, flops: int = 10**9, fma: float = 100.0) -> Figure:
    count = len(seconds)
    return Figure(
        name, threads, flops, "CPU time" if threads == 1 else "wall time", "timed", severity=0.5, seconds=seconds,
        wall=seconds, fma=[fma] * count, gemm=[90.0] * count, amx=[0.0] * count, bandwidth=[10.0] * count,
    )  # fmt: skip


def test_figures_follow_from_samples() -> None:
    case = Case(2, 4, 3, 16, 2, 5, threads=2)
    slow, one = figure("eager", [4.0, 8.0, 6.0]), figure("rmc cpu", [1.0, 2.0, 1.0])
    two = figure("rmc cpu", [0.5, 2.0, 0.5], threads=2)
    result = CaseResult(case, [slow, one, two], [])
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
    cases = [CaseResult(SMALL_TRAINING, [*figures, failed], ["cores changed speed"]), CaseResult(SMALL, figures, [])]
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
    assert [path.name for path in written] == ["r.json", "r-speedup.png", "r-peak.png"]
    assert all(path.stat().st_size > 1000 for path in written)


def test_plots_without_figures_are_left_out(tmp_path: Path) -> None:
    failed = Figure("rmc cpu", 1, 5, "CPU time", "error", note="broken")
    assert plots.draw_all([CaseResult(SMALL, [failed], [])], tmp_path, "none") == []


# -- the suite and the command -----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo suite cut down to two small cases, without ceilings."""
    cut = Suite((SMALL_TRAINING, replace(SMALL, threads=2)), ("lstm",), BRIEF)
    monkeypatch.setitem(SUITES, "demo", cut)
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(ceilings, "available", lambda: False)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(bench)
    return app


@pytest.mark.usefixtures("tiny")
def test_a_suite_runs(tmp_path: Path) -> None:
    result = run_suite("demo", out_dir=tmp_path, backend="reference", against=[])
    assert result.ok, result.notes()
    assert [case.case.threads for case in result.cases] == [1, 2]
    assert all(figure.status == "timed" and figure.seconds for case in result.cases for figure in case.figures)
    assert SuiteResult.from_json((tmp_path / "bench-demo.json").read_text()) == result
    assert any("Ceilings were not measured" in note for note in result.notes())
    assert [case.case.threads for case in run_suite("demo", backend="reference", threads=[1]).cases] == [1]


@pytest.mark.usefixtures("tiny")
def test_the_command(tmp_path: Path, app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "r.json"
    found = CliRunner().invoke(app, ["--suite", "demo", "--backend", "reference", "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert "rmc reference" in found.output
    assert SuiteResult.from_json(out.read_text()).ok
    monkeypatch.setattr(parity, "check", lambda *args: parity.Verdict(False, 2.0, "memories: too far"))
    found = CliRunner().invoke(app, ["--suite", "demo", "--backend", "reference"])
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
    names, absent = suite.taking_part("reference", [SMALL], "cpu")
    assert (names, absent) == (["reference"], {})
    for backend in backends.BACKENDS.values():
        if backend.name != "reference":
            monkeypatch.setattr(backend, "unavailable", lambda: "not built")
    names, absent = suite.taking_part("all", [SMALL], "cpu")
    assert names == ["reference"]
    assert absent["cpu"] == "not built"
    assert suite.taking_part("cpu", [SMALL], "cpu") == ([], {"cpu": "not built"})
    with pytest.raises(ValueError, match="backend takes one of"):
        suite.taking_part("cobol", [SMALL], "cpu")
