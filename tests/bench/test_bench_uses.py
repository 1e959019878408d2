"""`rmc bench uses`: the tables of half types, steps and a busy machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rmc_kernels.bench import eager, timing, uses
from rmc_kernels.bench.command import bench
from rmc_kernels.spec import CellSpec

pytest.importorskip("rmc_kernels._C")
SMALL = uses.Figure("step", "B=1", "cell", 2e-5, 1.25)


def test_every_contestant_of_a_table_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uses, "LARGE", CellSpec.sonnet(uses.INPUTS, 2, 4, 2))
    monkeypatch.setattr(uses, "SMALL", CellSpec.sonnet(uses.INPUTS, 1, 4, 1))
    monkeypatch.setattr(eager, "compiled_step", lambda: eager.eager_step)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    for name, contestants in (("half", 5), ("step", 8), ("busy", 2)):
        figures = uses.USES[name].figures(1e-3)
        cases = {figure.case for figure in figures}
        saved = [figure.case for figure in figures if figure.contestant.endswith(", saved")]
        assert len(figures) - len(saved) == contestants * len(cases)
        assert sorted(saved) == sorted(2 * [case for case in cases if case.endswith("backward")])
        assert all(figure.use == name and figure.seconds > 0 and figure.ratio > 0 for figure in figures)
        steps = [figure for figure in figures if figure.besides is not None]
        assert len(steps) == (2 * len(cases) if name == "step" else 0)
        assert all(figure.besides and figure.besides > 0 for figure in steps)


def test_the_tables_go_into_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uses.USES, "step", uses.USES["step"]._replace(figures=lambda seconds: [SMALL]))
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


def test_what_is_outside_of_the_kernel_has_a_column() -> None:
    rows = uses.markdown([SMALL, replace(SMALL, contestant="bound", besides=9e-6)]).splitlines()
    assert rows[2].endswith("| us outside of the kernel |")
    assert rows[3] == "|---|---|---:|---:|---:|"
    assert rows[4:6] == ["| B=1 | cell | 20.0 | 1.25 |  |", "| B=1 | bound | 20.0 | 1.25 | 9.0 |"]


def test_wrong_arguments() -> None:
    result = CliRunner().invoke(bench, ["uses", "other"])
    assert result.exit_code == 2
    assert "half, step, busy" in result.output
    with pytest.raises(ValueError, match="<!-- uses -->"):
        uses.within("no markers", [SMALL])
