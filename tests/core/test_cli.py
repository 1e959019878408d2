"""The command line: what it prints, what it exits with, and what it does without its optional packages."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rmc_kernels import CellSpec, __version__
from rmc_kernels.backends import BACKENDS
from rmc_kernels.cli import COMMANDS, main
from rmc_kernels.verify import Case
from tests.verify.test_verify import WRONG

CASE = Case(CellSpec.sonnet(5, 3, 4, 2), batch_size=8, steps=2, resets=True).as_json()
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def rmc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `rmc` with arguments; gives its exit code and output."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rmc", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_:
            main()
        code = exit_.value.code
        output = "".join(capsys.readouterr())
        return (code, output) if isinstance(code, int) else (1, f"{output}{code or ''}")

    return call


def test_help_names_every_command(rmc: Run) -> None:
    code, output = rmc("--help")
    assert code == 0
    assert all(name in output and command.help in output for name, command in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_it_is_said_to_be(name: str, rmc: Run) -> None:
    command = COMMANDS[name]
    assert hasattr(importlib.import_module(command.module), command.name)
    code, output = rmc(name, "--help")
    assert code == 0
    assert "--help" in output


def test_an_unknown_command_is_refused(rmc: Run) -> None:
    code, output = rmc("verfy")
    assert code == 2
    assert "verfy" in output


def test_info_as_json(rmc: Run) -> None:
    code, output = rmc("info", "--json")
    found = json.loads(output)
    assert code == 0
    assert found["versions"]["rmc_kernels"] == __version__
    assert found["machine"]["cores"] >= 1
    for row in found["backends"]:
        assert {row["runs"], *row["not_used"]} >= {"cpu", "reference", "triton"}
        assert all(row["not_used"].values())


def test_info_as_a_table(rmc: Run) -> None:
    code, output = rmc("info")
    assert code == 0
    assert __version__ in output
    assert "triton: " in output


def test_verify_that_is_right_exits_with_0(rmc: Run, tmp_path: Path) -> None:
    target = tmp_path / "verify.json"
    code, output = rmc("verify", "--backend", "reference", "--case", CASE, "--json", str(target))
    assert code == 0
    assert "right" in output
    written: dict[str, Any] = json.loads(target.read_text())
    assert written["ok"] is True
    assert written["results"][0]["case"] == CASE
    assert written["machine"]["versions"]["rmc_kernels"] == __version__


def test_verify_that_missed_exits_with_1_and_a_reproducer(rmc: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", WRONG["gradient of one bias zero"])
    code, output = rmc("verify", "--backend", "cpu", "--case", CASE, "--seed", "4")
    assert code == 1
    assert f"rmc verify --backend cpu --device cpu --case '{CASE}' --seed 4" in output
    assert "gradient of mlp.1.bias" in output


def test_verify_says_what_was_not_served(rmc: Run) -> None:
    code, output = rmc("verify", "--backend", "triton", "--case", CASE)
    assert code == 1
    assert "not served: triton on cpu, float32, 1 cases: Triton has no device" in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--backend", "abacus"), "must be one of"),
        (("--case", "{"), "takes JSON"),
        (("--dtype", "int8"), "must be one of"),
    ],
)
def test_verify_refuses_wrong_arguments(rmc: Run, arguments: tuple[str, str], message: str) -> None:
    code, output = rmc("verify", *arguments)
    assert code == 2
    assert message in output


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_it_says_what_to_install(package: str, rmc: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "rmc_kernels.verify.command", raising=False)
    for name in [name for name in sys.modules if name.startswith("rich.")]:
        monkeypatch.setitem(sys.modules, name, None)
    code, output = rmc("verify", "--quick")
    assert code == 1
    assert "pip install 'rmc-kernels[cli]'" in output
    assert package in output


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "rmc_kernels", "--help"], capture_output=True, text=True, check=True)
    assert "verify" in done.stdout
