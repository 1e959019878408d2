"""`rmc bench uses`: the tables of half types, steps, steps with gradients, and a busy machine."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rmc_kernels import RelationalMemory, RelationalMemoryCell
from rmc_kernels.backends import cpu
from rmc_kernels.bench import eager, timing, use_cases
from rmc_kernels.bench.command import bench
from rmc_kernels.spec import CellSpec

pytest.importorskip("rmc_kernels._C")
SMALL = use_cases.Figure("step", "B=1", "cell", 2e-5, 1.25)


def test_every_contestant_of_a_table_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use_cases, "LARGE", CellSpec.sonnet(use_cases.INPUTS, 2, 4, 2))
    monkeypatch.setattr(use_cases, "SMALL", CellSpec.sonnet(use_cases.INPUTS, 1, 4, 1))
    monkeypatch.setattr(use_cases, "TINY", CellSpec.sonnet(use_cases.INPUTS, 1, 2, 1))
    compiled = functools.partial(torch.compile, eager.eager_step, backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(eager, "compiled_step", compiled)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    for name, contestants in (("half", 5), ("step", 10), ("train", 6), ("busy", 2)):
        figures = use_cases.USE_CASES[name].figures(1e-3)
        cases = {figure.case for figure in figures}
        saved = [figure.case for figure in figures if figure.contestant.endswith(", saved")]
        assert len(figures) - len(saved) == contestants * len(cases)
        assert sorted(saved) == sorted(2 * [case for case in cases if case.endswith("backward")])
        assert all(figure.use == name and figure.seconds > 0 and figure.ratio > 0 for figure in figures)
        timed = {figure.contestant for figure in figures if figure.outside is not None}
        calls = {"cell", "layer, T=1"}
        assert timed == {
            "step": calls | {"frozen.step", "frozen.step, resets"}, "train": calls | {"empty autograd.Function"}
        }.get(name, set())  # fmt: skip
        assert all(figure.outside is None or figure.outside > 0 for figure in figures)


def test_what_is_outside_is_the_least_wall_time_that_is_not_in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    extension: Any = cpu._C
    clock, inside, calls = 0, 0, 0

    def call() -> None:  # 500 ns, of which 300 are in C++; 700 in the first round
        nonlocal clock, inside, calls
        clock += 700 if calls < use_cases._ROUND else 500
        inside, calls = inside + 300, calls + 1

    def in_cpp() -> int:
        nonlocal inside
        inside, asked = 0, inside
        return asked

    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter_ns", lambda: clock)
        patch.setattr(extension, "call_nanoseconds", in_cpp)
        assert use_cases._outside(call, 0) == pytest.approx(400e-9)  # a budget of none is one round
        patch.setattr(time, "perf_counter", lambda: 1e-9 * clock)
        calls = 0
        assert use_cases._outside(call, 20e-6) == pytest.approx(200e-9)
    layer, x = RelationalMemory.from_spec(use_cases.TINY, backend="cpu"), torch.randn(1, 1, use_cases.INPUTS)
    assert use_cases._outside(lambda: layer(x), 0) > 0
    layer(x)
    assert extension.call_nanoseconds() == 0  # the clock is off again


def test_the_clock_is_off_after_an_error() -> None:
    extension: Any = cpu._C
    layer, x = RelationalMemory.from_spec(use_cases.TINY, backend="cpu"), torch.randn(1, 1, use_cases.INPUTS)

    def call() -> None:
        layer(x)
        raise KeyError

    with pytest.raises(KeyError):
        use_cases._outside(call, 0)
    assert extension.call_nanoseconds() > 0
    layer(x)
    assert extension.call_nanoseconds() == 0


def test_the_empty_function_has_as_many_gradients_as_the_cell() -> None:
    cell = RelationalMemoryCell.from_spec(use_cases.TINY)
    x, params = torch.randn(2, use_cases.INPUTS), list(cell.parameters())
    output = use_cases._empty(x, params, use_cases.TINY)()
    assert output.numel() == cell(x)[0].numel()
    grads = torch.autograd.grad(output, params, torch.ones_like(output))
    assert [grad.shape for grad in grads] == [value.shape for value in params]


def test_the_tables_go_into_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        use_cases.USE_CASES, "step", use_cases.USE_CASES["step"]._replace(figures=lambda seconds: [SMALL])
    )
    page, out = tmp_path / "page.md", tmp_path / "uses.json"
    page.write_text("before\n<!-- uses -->\nold\n<!-- /uses -->\nafter\n")
    result = CliRunner().invoke(bench, ["uses", "step", "--out", str(out), "--document", str(page)])
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert "| B=1 | cell | 20.0 | 1.25 |" in text
    assert "old" not in text
    assert text.startswith("before\n<!-- uses -->")
    assert text.endswith("<!-- /uses -->\nafter\n")
    assert json.loads(out.read_text())[0]["contestant"] == "cell"
    table = out.with_suffix(".csv")
    result = CliRunner().invoke(bench, ["uses", "step", "--out", str(table)])
    assert result.exit_code == 0, result.output
    assert use_cases.from_csv(table.read_text()) == [SMALL]


def test_figures_come_back_from_csv_rounded_to_more_than_a_table_shows() -> None:
    figures = [replace(SMALL, case="B=1, 4 slots", outside=1.23456789e-5), replace(SMALL, seconds=1 / 3)]
    again = [replace(figures[0], outside=1.234568e-5), replace(figures[1], seconds=0.3333333)]
    assert use_cases.from_csv(use_cases.as_csv(figures)) == again


def test_the_page_says_what_its_figures_say() -> None:
    """After new figures: `rmc bench uses --out benchmarks/results/cpu-uses.csv --document docs/cpu-backend.md`."""
    root = Path(__file__).resolve().parents[2]
    figures = use_cases.from_csv((root / "benchmarks" / "results" / "cpu-uses.csv").read_text(encoding="utf-8"))
    page = (root / "docs" / "cpu-backend.md").read_text(encoding="utf-8")
    assert figures
    assert use_cases.within(page, figures) == page


def test_what_is_outside_of_the_kernel_has_a_column() -> None:
    rows = use_cases.markdown([SMALL, replace(SMALL, contestant="frozen.step", outside=9e-6)]).splitlines()
    assert rows[2].endswith("| us outside of the kernel |")
    assert rows[3] == "|---|---|---:|---:|---:|"
    assert rows[4:6] == ["| B=1 | cell | 20.0 | 1.25 |  |", "| B=1 | frozen.step | 20.0 | 1.25 | 9.0 |"]


def test_wrong_arguments() -> None:
    result = CliRunner().invoke(bench, ["uses", "other"])
    assert result.exit_code == 2
    assert "half, step, train, busy" in result.output
    with pytest.raises(ValueError, match="<!-- uses -->"):
        use_cases.within("no markers", [SMALL])
