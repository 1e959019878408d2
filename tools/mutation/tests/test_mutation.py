"""The generators of mutants: what they make of a small function, and that they make nothing else. And a few mutants."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.mutation import jobs, page, python_mutants, results
from tools.mutation.mutant import SURVIVED, Mutant

PYTHON = '''"""A module."""


def gate(x: int, bias: float = 1.0) -> float:
    """Docstring with 1 + 2."""
    assert x < 3, f"{x + 1}"
    i, f = split(x, 2)
    if x <= 4:
        i += bias
    return sigmoid(i) * f
'''

CPP = """// a + b
constexpr int kSize = 3 + 4;
template <class V>
struct Cell {
  explicit Cell(int n) : n_(n + 1) {}
  V gate(V x, const V* p) const {
    if (n_ <= 4) throw std::invalid_argument("n + " + n_);
    clock.end(Phase::kGates);
    V i = tanh(fma(x, p[0], x));
    i.store(p);
    return i;
  }
  int n_;
};
"""
Generator = Callable[[str, str], Iterable[Mutant]]


def cpp_generator() -> Generator:
    pytest.importorskip("tree_sitter_cpp")
    from tools.mutation import cpp_mutants

    return cpp_mutants.mutants


def test_every_rule_for_python_leaves_its_mutant() -> None:
    keys = {mutant.key for mutant in python_mutants.mutants("m.py", PYTHON)}
    assert keys == {
        "gate: `(i, f)` -> `(f, i)`",
        "gate: `2` -> `3`",
        "gate: `x <= 4` -> `x < 4`",
        "gate: `4` -> `5`",
        "gate: `if x <= 4: i += bias` -> `if not x <= 4: i += bias`",
        "gate: `i += bias` -> `pass`",
        "gate: `sigmoid(i) * f` -> `sigmoid(i) / f`",
        "gate: `sigmoid(i) * f` -> `sigmoid(i)`",
        "gate: `sigmoid(i) * f` -> `f`",
        "gate: `sigmoid(i)` -> `i`",
    }


def test_every_rule_for_cpp_leaves_its_mutant() -> None:
    assert {mutant.key for mutant in cpp_generator()("cell.h", CPP)} == {
        "Cell::Cell: `n + 1` -> `n - 1`",
        "Cell::Cell: `n + 1` -> `n`",
        "Cell::Cell: `n + 1` -> `1`",
        "Cell::Cell: `1` -> `2`",
        "Cell::gate: `(n_ <= 4)` -> `(!(n_ <= 4))`",
        "Cell::gate: `n_ <= 4` -> `n_ < 4`",
        "Cell::gate: `4` -> `5`",
        "Cell::gate: `tanh(fma(x, p[0], x))` -> `(fma(x, p[0], x))`",
        "Cell::gate: `fma(x, p[0], x)` -> `x`",
        "Cell::gate: `fma(x, p[0], x)` -> `(x) * (p[0])`",
        "Cell::gate: `fma(x, p[0], x)` -> `fnma(x, p[0], x)`",
        "Cell::gate: `(x, p[0], x)` -> `(p[0], x, x)`",
        "Cell::gate: `(x, p[0], x)` -> `(x, x, p[0])`",
        "Cell::gate: `0` -> `1`",
        "Cell::gate: `i.store(p);` -> `;`",
    }


@pytest.mark.parametrize("language", ["python", "cpp"])
def test_each_is_the_source_with_one_change(language: str) -> None:
    if language == "python":
        source, original = PYTHON, ast.unparse(ast.parse(PYTHON)) + "\n"
        found = list(python_mutants.mutants("m.py", source))
    else:
        source = original = CPP
        found = list(cpp_generator()("m.h", source))
    assert len({mutant.source for mutant in found}) == len({mutant.key for mutant in found}) == len(found)
    for mutant in found:
        assert mutant.source != original
        pairs = zip(original.splitlines(), mutant.source.splitlines(), strict=True)
        assert sum(a != b for a, b in pairs) == 1, mutant
        assert source.splitlines()[mutant.line - 1].strip()


def test_equal_changes_have_numbers() -> None:
    keys = [mutant.key for mutant in python_mutants.mutants("m.py", "def f(a):\n    return f(a + a) + f(a + a)\n")]
    assert len(set(keys)) == len(keys)
    assert "f: `a + a` -> `a - a` (2)" in keys


# -- what is written about them ----------------------------------------------------------------------------------------


def test_the_page_is_made_of_the_results() -> None:
    text = page.PAGE.read_text()
    assert page.render(text, results.read(), results.reasons()) == text, "run `python -m tools.mutation page`"


def test_every_survivor_has_one_reason() -> None:
    assert results.reasons().keys() == results.read().keys()
    for part, summary in results.read().items():
        explained = [mutant for why, mutants in results.reasons()[part].items() if why for mutant in mutants]
        assert len(set(explained)) == len(explained) == results.totals(summary)[SURVIVED]


def test_a_survivor_keeps_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(results, "SURVIVORS", tmp_path / "survivors.json")
    results.SURVIVORS.write_text(json.dumps({"cpp": {"Equivalent": ["a: 1", "a: 2"]}}))
    assert results.read() == {}
    results.RESULTS.write_text("part,file,made,raised\nother,b,2,\n")
    found: results.Summary = {"made": {"a": 3}, "outcomes": {"a": {"killed": 1, SURVIVED: 2}}}
    results.keep("cpp", found, ["a: 2", "a: 3"])
    assert results.read() == {"other": {"made": {"b": 2}, "outcomes": {"b": {}}}, "cpp": found}
    assert results.reasons() == {"cpp": {"Equivalent": ["a: 2"], "": ["a: 3"]}}
    text = page.render("<!-- mutation cpp -->\n<!-- /mutation -->", {"cpp": results.read()["cpp"]}, results.reasons())
    assert "* Equivalent (1)\n* **Not explained** (1)\n  * a: 3\n" in text


def test_every_function_has_its_turn() -> None:
    made = [jobs.Job("a.py", "", f"{name}{number}", str, name) for name in "fgh" for number in range(3)]
    known, todo = [made[0], made[1], made[3]], [job for job in made if job not in (made[0], made[1], made[3])]
    assert [job.function for job in jobs.in_turns(todo, known)] == ["h", "g", "h", "f", "g", "h"]


# -- a sample ----------------------------------------------------------------------------------------------------------


def outcomes(part: str, name: str) -> dict[str, str]:
    """What becomes of the mutants whose name has this, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tools.mutation", part, "--only", name]
    found = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, check=True).stdout
    pairs = (line.split(" | ", 1) for line in found.splitlines())
    return {key: outcome.split(":")[0] for outcome, key in pairs}


@pytest.mark.slow
def test_mutants_of_the_reference() -> None:
    name = "_layer_norm: `rows.shape[-2:] if spec.joint_norm else rows.shape[-1:]`"
    assert outcomes("reference", "_layer_norm: `rows") == {
        f"{name} -> `rows.shape[-2:] if not spec.joint_norm else rows.shape[-1:]`": "raised",
        "_layer_norm: `rows.to(wide)` -> `rows`": SURVIVED,
    }
    name = "_gate: `(input_gate, forget_gate)` -> `(forget_gate, input_gate)`"
    assert outcomes("reference", name) == {name: "killed"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None or find_spec("tree_sitter_cpp") is None, reason="no compiler or parser")
def test_mutants_of_the_cpp_kernels() -> None:
    assert outcomes("cpp", "gate_row: `i * squashed`") == {
        "gate_row: `i * squashed` -> `i / squashed`": "killed",
        "gate_row: `i * squashed` -> `i`": "killed",
        "gate_row: `i * squashed` -> `squashed`": "killed",
    }


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
def test_mutants_of_the_triton_kernels() -> None:
    name = "leave_gates: `1.0 - new * new` -> `1.0`"
    assert outcomes("triton_backward", name) == {name: "killed"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="no compiler")
def test_barriers() -> None:
    from tools.mutation.barriers import kernels

    kernel = next(kernels("textbook", "float16"))
    kinds = {kernel.judge(barrier).split(":")[0] for barrier in range(12)}
    assert kinds == {"race", "spare", "doubled"}
