"""Without the C++ extension, or with one that cannot be used: what is said, and what still works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

import rmc_kernels
from rmc_kernels.backends import extension

ROOT = Path(__file__).resolve().parents[2]
CURE = r"; to build it, install a C\+\+17 compiler and run `pip install --no-cache-dir --force-reinstall --no-deps \.`"
NOT_BUILT = f"the C++ extension was not built; to build it, install a C++17 compiler and run `{extension.REBUILD}`"

#: A user's program; what it meets is printed as JSON.
PROGRAM = """
import json, sys, warnings
sys.meta_path = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    del caught[:]
    import rmc_kernels  # line 8
    from rmc_kernels import RelationalMemory, explain
    layer = RelationalMemory(3, 2, 4)
    output, memory = layer(torch.ones(1, 2, 3))
    output.sum().backward()
warned = [(str(each.message), each.category.__name__, each.filename, each.lineno) for each in caught]
errors = []
fused = RelationalMemory(3, 2, 4, backend="cpu")
for make in (lambda: fused(torch.ones(1, 2, 3)), lambda: explain(layer.spec, output)):
    try:
        errors.append(str(make()))
    except ValueError as error:
        errors.append(str(error))
from rmc_kernels.info import facts, info
facts = facts()
info()
print(json.dumps([warned, errors, facts, output.shape, rmc_kernels.__file__]))
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the program prints with a copy of the package that has no extension; the table of `rmc info` is first."""
    folder = tmp_path_factory.mktemp("without")
    ignored = shutil.ignore_patterns("_C.*.so", "__pycache__")
    shutil.copytree(ROOT / "rmc_kernels", folder / "rmc_kernels", ignore=ignored)
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py"]
    environment = {**os.environ, "COLUMNS": "400"}
    printed = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    *table, last = printed.stdout.splitlines()
    found: list[Any] = json.loads(last)
    assert found.pop() == str(folder / "rmc_kernels" / "__init__.py")
    return ["\n".join(table), printed.stderr, *found]


def test_the_first_import_says_that_it_was_not_built_and_how_to_build_it(without: list[Any]) -> None:
    """Once, at the line of the import; the reference serves meanwhile."""
    _, stderr, warned, _, _, shape = without
    ((message, category, filename, line),) = warned
    assert message.startswith(f"rmc_kernels runs without its compiled CPU backend: {NOT_BUILT}")
    assert (category, Path(filename).name, line) == ("RuntimeWarning", "program.py", 8)
    assert shape == [1, 2, 8]
    assert stderr == ""


def test_every_message_says_so(without: list[Any]) -> None:
    table, _, warned, (refused, explained), facts, _ = without
    assert refused.startswith(f'backend "cpu" cannot serve this call: {NOT_BUILT}')
    assert f"cpu: not used: {NOT_BUILT}" in explained
    assert explained.startswith("reference: runs")
    assert facts["extension"]["built"] is False
    assert facts["extension"]["reason"].startswith(NOT_BUILT)
    assert all(row["not_used"]["cpu"].startswith(NOT_BUILT) for row in facts["backends"])
    assert len(re.findall(re.escape(NOT_BUILT), table)) == 1 + len(facts["backends"])
    assert "circular" not in table + refused + explained + warned[0][0]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder from which `extension.load` takes the extension; an editable install would look elsewhere."""
    finders = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.setattr(rmc_kernels, "__path__", [str(tmp_path)])
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "backends" / "extension.py"))
    monkeypatch.delitem(sys.modules, "rmc_kernels._C", raising=False)
    monkeypatch.delattr(rmc_kernels, "_C", raising=False)
    return tmp_path


def _reason() -> str:
    found, reason = extension.load()
    assert found is None
    assert reason is not None
    assert re.search(CURE, reason)
    return reason.partition("; to build it")[0]


def test_no_file(package: Path) -> None:
    assert _reason() == "the C++ extension was not built"


def test_a_file_for_another_python(package: Path) -> None:
    for name in ("_C.cpython-35m-x86_64-linux-gnu.so", "_C.cp35-win_amd64.pyd", "_C.txt", "_CC.so"):
        (package / name).touch()
    reason = _reason()
    assert reason.startswith("the C++ extension was not built for this Python (")
    assert str(sysconfig.get_config_var("SOABI")) in reason
    assert str(package / "_C.cpython-35m-x86_64-linux-gnu.so") in reason
    assert str(package / "_C.cp35-win_amd64.pyd") in reason
    assert "_C.txt" not in reason


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"no library " * 100])
def test_a_file_that_cannot_be_loaded(package: Path, content: bytes) -> None:
    path = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    path.write_bytes(content)
    reason = _reason()
    assert reason.startswith(f"the C++ extension {path} cannot be loaded (")
    assert len(reason) > len(f"the C++ extension {path} cannot be loaded ()")


def test_a_file_that_needs_what_is_not_there(package: Path) -> None:
    """What fails is not the extension itself but an import of its own."""
    (package / "_C.py").write_text("import rmc_kernels_of_yore")
    assert _reason() == ("the C++ extension rmc_kernels._C cannot be loaded (No module named 'rmc_kernels_of_yore')")


def test_a_file_of_another_version(package: Path) -> None:
    (package / "_C.py").write_text("def isas(): return ['generic']\nclass Cell: pass")
    assert _reason() == (
        f"the C++ extension {package / '_C.py'} is of another version: it lacks TensorCell, Tensors, cpu_features, "
        "frozen_step"
    )


def test_a_build_without_a_compiler_says_how_to_build_again(tmp_path: Path) -> None:
    """And leaves no extension of older sources."""
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "rmc_kernels").mkdir()
    shutil.copy(ROOT / "rmc_kernels" / "_version.py", tmp_path / "rmc_kernels")
    stale = tmp_path / "rmc_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.touch()
    environment = {key: value for key, value in os.environ.items() if key != "RMC_EXTENSION"} | {"CXX": "/bin/false"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert done.stderr.count("the C++ extension was NOT built") == 1
    assert f"    {extension.REBUILD}\n" in done.stderr
    assert "install a C++17 compiler and run" in done.stderr
    assert not stale.exists()
    required = subprocess.run(
        command, cwd=tmp_path, env=environment | {"RMC_EXTENSION": "required"}, capture_output=True
    )
    assert required.returncode != 0


def test_the_readme_has_the_command() -> None:
    assert extension.REBUILD in (ROOT / "README.md").read_text()
