"""How figures grow: curves and their slopes, peak memory, the time budget of a suite, and every plot."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rmc_kernels.bench import growth, memory, plots, roofline
from rmc_kernels.bench.cases import BASE, MODELS, SUITES, Case, around
from rmc_kernels.bench.contestants import YARDSTICK, line_up
from rmc_kernels.bench.palette import LOOKS, looks
from rmc_kernels.bench.record import Figure, TimedCase
from rmc_kernels.bench.scaling import curves, slope
from rmc_kernels.bench.time_budget import LEAST, TimeBudget
from tests.bench_cases import SMALL, SMALL_TRAINING, figure


def measured(cases: Sequence[Case], exponent: float = 1.0) -> list[TimedCase]:
    """Results in which time and memory grow with some power of the product of all sizes."""

    def size(case: Case) -> float:
        return math.pow(case.batch_size * case.steps * case.mem_slots * case.mem_size, exponent)

    return [
        TimedCase(
            case,
            [
                figure("eager", [3e-6 * size(case)] * 3),
                figure("rmc cpu", [1e-6 * size(case)] * 3, flops=case.steps, peak_bytes=int(1e6 * size(case))),
            ],
            [],
        )
        for case in cases
    ]


# -- curves ------------------------------------------------------------------------------------------------------------


def test_a_slope_is_the_exponent() -> None:
    assert slope([(x, 3 * x**1.7) for x in (1, 2, 8, 32)]) == pytest.approx(1.7)
    assert slope([(1, 5), (10, 5)]) == 0


def test_curves_are_found_among_cases() -> None:
    cases = around(Case(4, 16, 4, 64), steps=(4, 16, 64, 256), mem_slots=(1, 4, 16), batch_size=(1, 4))
    found = {(curve.axis, curve.contestant): curve for curve in curves(measured(cases))}
    assert {axis for axis, _ in found} == {"T", "N"}  # two batch sizes are no curve
    curve = found["T", "rmc cpu"]
    assert [point.size for point in curve.points] == [4, 16, 64, 256]
    assert curve.setting == "B=4 N=4 D=64 H=4, forward, 1 thread"
    for quantity in ("seconds", "flops", "peak_bytes"):
        assert curve.slope(quantity) == pytest.approx(1)
        assert curve.last_slope(quantity) == pytest.approx(1)
    assert found["T", "eager"].slope("peak_bytes") is None
    assert curve.holds(Case(4, 16, 4, 64))
    assert not curve.holds(Case(4, 17, 4, 64))
    assert not curve.holds(Case(4, 16, 4, 64, threads=2))


def test_the_end_of_a_curve_tells_where_it_goes() -> None:
    cases = around(BASE, steps=(1, 10, 100, 1000))
    results = [TimedCase(case, [figure("transformer", [case.steps + 0.01 * case.steps**2] * 2)], []) for case in cases]
    (curve,) = curves(results)
    fitted, last = curve.slope("seconds"), curve.last_slope("seconds")
    assert fitted is not None
    assert last is not None
    assert 1 < fitted < last < 2


def test_what_was_not_timed_is_no_point() -> None:
    cases = around(BASE, steps=(4, 16, 64))
    results = measured(cases)
    results[1] = replace(results[1], figures=[Figure("rmc cpu", 1, 1, "CPU time", "parity failed")])
    assert curves(results) == []


@pytest.mark.parametrize("name", ["quick", "full"])
def test_suites_have_a_curve_for_every_size(name: str) -> None:
    cases = SUITES[name].cases
    found = {curve.axis for curve in curves(measured(cases))}
    assert found == {"B", "T", "N", "D"} | ({"H"} if name == "full" else set())
    lengths = [group for group in SUITES[name].groups if group.at_width]
    assert all(group.against == MODELS and group.saved and group.memory for group in lengths)
    assert lengths


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not memory.available("cpu"), reason="the system does not tell the peak of resident memory")
def test_peak_memory_is_that_of_the_call() -> None:
    case = Case(2, 64, 4, 64, 4, 8)
    one_result = 4 * case.batch_size * case.steps * case.mem_slots * case.mem_size
    order = memory.Order(case, (YARDSTICK,), (), False, False)
    training = replace(order, case=replace(case, mode="forward+backward"))
    longer = replace(training, case=replace(training.case, steps=256))
    with memory.Meter("cpu") as meter:
        forward, both, four_times = (meter.peak(one, 0) for one in (order, training, longer))
    assert forward is not None
    assert both is not None
    assert four_times is not None
    assert one_result <= forward < 64 * one_result
    assert both > 2 * forward  # autograd keeps some 20 tensors of a step
    assert 2 * both < four_times < 8 * both


def test_a_child_that_dies_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def apply_async(self, *args: object) -> Broken:
            return self

        def get(self, patience: float) -> int:
            raise multiprocessing.TimeoutError

        def terminate(self) -> None:
            """Nothing to end."""

    meter = memory.Meter("cpu")
    monkeypatch.setattr(meter, "_pool", Broken())
    with meter:
        assert meter.peak(memory.Order(SMALL, (YARDSTICK,), (), False, False), 0) is None


def test_whose_memory_is_measured() -> None:
    found = line_up(replace(SMALL_TRAINING, threads=2), ["eager", "compile", "lstm"], ["cpu"])
    assert [(c.name, c.threads) for c in found if memory.measurable(c)] == [("eager", 1), ("rmc cpu", 1)]


# -- time budget -------------------------------------------------------------------------------------------------------


def run_within(wanted: Sequence[float], limit: float, besides: float) -> tuple[list[float], float]:
    """What each case is given where it costs `besides` times what it wanted on top; and the time of all."""
    clock = [0.0]
    budget = TimeBudget(wanted, limit, now=lambda: clock[0])
    given = []
    for number, seconds in enumerate(wanted):
        given.append(budget.allowance(number))
        clock[0] += given[-1] + besides * seconds
    return given, clock[0]


def test_a_suite_in_time_is_given_what_it_wants() -> None:
    given, total = run_within([10.0, 5.0, 5.0], 40.0, besides=0.9)
    assert given == [10.0, 5.0, 5.0]
    assert total == pytest.approx(38)


def test_a_suite_on_a_busy_machine_ends_in_time() -> None:
    given, total = run_within([5.0] * 16 + [1.0] * 16, 200.0, besides=1.5)
    assert total == pytest.approx(200, rel=0.02)
    assert min(given[1:16]) == pytest.approx(max(given[1:16]))


def test_no_case_is_left_out() -> None:
    given, _ = run_within([5.0] * 4, 10.0, besides=9.0)
    assert given[1:] == [LEAST] * 3


# -- plots -------------------------------------------------------------------------------------------------------------


def test_every_plot_is_drawn(tmp_path: Path) -> None:
    single = [Case(16, 16, 8, 256, mode=mode) for mode in ("forward", "forward+backward")]
    results = measured([*single, *around(BASE, steps=(4, 16, 64), mem_slots=(1, 4, 16))], 0.5)
    written = plots.draw_all(results, tmp_path, "r")
    assert {path.name for path in written} == {
        f"r-{name}.png" for name in ("speedup", "peak", "roofline", "scaling", "memory")
    }
    assert all(path.stat().st_size > 1000 for path in written)


def test_curves_are_labelled() -> None:
    canvas = growth.draw(curves(measured(around(BASE, steps=(4, 16, 64)))), "seconds")
    assert canvas is not None
    (ax,) = canvas.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("T: steps", "time of a call (ms)")
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["eager: 1.00, 1.00", "rmc cpu: 1.00, 1.00"]
    assert growth.draw([], "seconds") is None


def test_the_roofline_is_where_the_counts_say() -> None:
    case = Case(1, 4, 3, 16, 2, 5)
    found = figure("rmc cpu", [1.0], flops=4000)
    assert roofline.intensity(case, found) == 1000 / case.weight_bytes
    assert roofline.intensity(replace(case, mode="forward+backward"), found) == 500 / case.weight_bytes
    assert roofline.draw([TimedCase(case, [replace(found, fma=[])], [])]) is None


def test_no_two_contestants_look_alike() -> None:
    found = looks([*LOOKS, "lstm at D", "gru at D", "transformer at D", "rmc new", "rmc newer"])
    assert len(set(found.values())) == len(found)
    assert found["lstm at D"].colour == found["lstm"].colour
