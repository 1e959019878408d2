"""The code in docs/migrating-*.md runs, before and after agree, and docs/compatibility.md has every row."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmc_kernels.compat import l0sg, r2gen
from tests import golden, originals
from tests.compatibility import Results

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n# ([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page: str) -> dict[str, str]:
    text = (ROOT / "docs" / f"migrating-from-{page}.md").read_text()
    found = dict(BLOCK.findall(text))
    assert len(found) == text.count("```python") >= 2
    assert all(code.count("\n") <= 12 for code in found.values())
    return found


def _run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """The names after `code`, run with one seed."""
    names = dict(names)
    torch.manual_seed(0)
    exec(compile(code, "<docs>", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _module(**contents: Any) -> ModuleType:
    made = ModuleType("of the original")
    vars(made).update(contents)
    return made


def _gradients(model: nn.Module) -> list[Tensor]:
    return [value.grad for value in model.parameters() if value.grad is not None]


def test_from_l0sg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block before has the drop-in for its original: what it does with it must be possible."""
    blocks = _blocks("l0sg")
    monkeypatch.setitem(sys.modules, "relational_rnn_general", l0sg)
    torch.save(l0sg.RelationalMemory(4, 8, 12, 2).state_dict(), "core.pt")
    names = {"batches": [torch.randn(3, 5, 12), torch.randn(3, 5, 12)]}
    before, after = _run(blocks["before"], names), _run(blocks["after"], names)
    assert torch.equal(before["outputs"], after["outputs"])
    assert after["outputs"].shape == (15, 64)
    assert all(map(torch.equal, _gradients(before["core"]), _gradients(after["core"])))
    layer = _run(blocks["the layer"], after)
    first, _ = after["core"](names["batches"][0], after["core"].initial_state(3))
    assert torch.equal(layer["outputs"].transpose(0, 1).flatten(0, 1), first)
    monkeypatch.setitem(sys.modules, "relational_rnn_general", _module(RelationalMemory=originals.L0SG))
    converted = _run(blocks["convert"], after)
    after["core"].return_all_outputs = False
    arguments = (names["batches"][0], after["core"].initial_state(3))
    torch.testing.assert_close(converted["converted"](*arguments), after["core"](*arguments))
    with pytest.warns(RuntimeWarning, match="Sharper runs step by step in PyTorch"):
        sharper = _run(blocks["an override"], after)
    sharper["sharper"].load_state_dict(after["core"].state_dict())
    assert not torch.allclose(sharper["sharper"](*arguments)[0], after["core"](*arguments)[0])


def test_from_r2gen(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = _blocks("r2gen")
    monkeypatch.setitem(sys.modules, "modules.encoder_decoder", r2gen)
    torch.save(r2gen.RelationalMemory(3, 16, 4).state_dict(), "rm.pt")
    names = {"embedded": torch.randn(2, 5, 16)}
    before, after = _run(blocks["before"], names), _run(blocks["after"], names)
    assert torch.equal(before["memory"], after["memory"])
    steps = _run(blocks["step by step"], after)
    assert torch.equal(steps["memory"], after["memory"])
    monkeypatch.setitem(sys.modules, "modules.encoder_decoder", _module(RelationalMemory=originals.R2Gen))
    converted = _run(blocks["convert"], after)["converted"].eval()
    torch.testing.assert_close(converted(names["embedded"], converted.init_memory(2)), after["memory"])
    with pytest.warns(RuntimeWarning, match="Noisy runs step by step in PyTorch"):
        assert _run(blocks["an override"], after)["memory"].shape == after["memory"].shape
    layer = _run(blocks["the layer"], after)
    torch.testing.assert_close(layer["memory"], after["memory"])
    assert layer["attention"].shape == (2, 5, 1, 4, 3, 4)


def test_from_sonnet() -> None:
    """On the original's own variables, inputs and outputs."""
    blocks = _blocks("sonnet")
    ast.parse(blocks["before"])
    vector = golden.load(next(path for path in golden.files("g02")))
    assert vector.outputs is not None
    np.savez("core.npz", **{name[4:]: value for name, value in vector.raw.items() if name.startswith("var/")})
    after = _run(blocks["after"], {"inputs": vector.inputs.transpose(0, 1).float()})
    expected = vector.outputs.transpose(0, 1).float()
    torch.testing.assert_close(after["outputs"], expected, rtol=1e-5, atol=1e-5)
    back = _run(blocks["and back"], after)
    for name, value in back["variables"].items():
        assert (value == vector.raw[f"var/{name}"].astype("float32")).all(), name
    assert Path("back.safetensors").stat().st_size > 0


def test_from_lstm() -> None:
    blocks = _blocks("lstm")
    names = {"x": torch.randn(4, 7, 12), "lengths": torch.tensor([3, 7, 1, 5])}
    before, after = _run(blocks["before"], names), _run(blocks["after"], names)
    assert before["output"].shape == after["output"].shape == (4, 7, 64)
    core = after["core"]
    unpacked, memory = core(names["x"], lengths=names["lengths"])
    torch.testing.assert_close(unpacked, after["output"])
    torch.testing.assert_close(memory, after["state"])
    assert torch.equal(before["output"] == 0, after["output"] == 0)  # the padding
    _run(blocks["truncated backpropagation through time"], after)
    assert len(_gradients(core)) == len(list(core.parameters()))
    whole = _run(blocks["the whole gradient, keeping only the memories between chunks"], after)
    assert torch.equal(whole["output"], core(names["x"])[0])


def test_a_cell_says_what_passed_failed_and_did_not_run() -> None:
    results = Results()
    for variant in ("sonnet", "textbook", "l0sg", "r2gen"):
        results.add("good", "cpu", variant, "passed")
    for variant, outcome in (("sonnet", "passed"), ("l0sg", "passed"), ("l0sg", "failed"), ("r2gen", "skipped")):
        results.add("mixed", "reference", variant, outcome)
    assert results.page().splitlines()[-2:] == [
        "| good | all | - |",
        "| mixed | - | sonnet; failed: l0sg; skipped: r2gen |",
    ]


def test_every_feature_has_its_row() -> None:
    """docs/compatibility.md is what `make compatibility` wrote since the last feature was added."""
    marks = re.compile(r"pytest\.mark\.feature\(\s*\"([^\"]+)\"")
    sources = [path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    features = {name for source in sources for name in marks.findall(source)}
    rows = re.findall(r"^\| ([^`|-][^|]*) \|", (ROOT / "docs" / "compatibility.md").read_text(), re.MULTILINE)
    assert len(features) > 10
    assert set(rows) == features


# -- docs/design.md ----------------------------------------------------------------------------------------------------


def test_the_design_page_names_files_that_are_there() -> None:
    """A path from the root; or a file's name alone where the room is named beside it."""
    text = (ROOT / "docs" / "design.md").read_text()
    names = {name for name in re.findall(r"`([\w./*]+)`", text) if name.endswith(("/", ".py", ".h", ".cpp", ".txt"))}
    assert len(names) > 40
    for name in names:
        rooms = (ROOT, ROOT / "rmc_kernels", ROOT / "csrc")
        found = any(list(room.glob(name.rstrip("/"))) for room in rooms) or list((ROOT / "rmc_kernels").rglob(name))
        assert found or list((ROOT / "csrc").rglob(name)), name


def test_names_to_look_for_are_in_the_files_that_the_design_page_names() -> None:
    """`path` (`name`, `name`): each name stands in one of the files named in that row before the bracket."""
    text = (ROOT / "docs" / "design.md").read_text()
    checked = 0
    for row in re.findall(r"^\| .*", text, re.MULTILINE):
        read = ""
        for path, names in re.findall(r"`((?:\w+/)+[\w.]*)`|\(((?:`\w+`(?:, )?)+)\)", row):
            if path and not path.endswith("/") and (ROOT / path).is_file():
                read += (ROOT / path).read_text()
            elif path.endswith("/"):
                read += "".join(file.read_text() for file in (ROOT / path).glob("*.[hp]*") if file.is_file())
            for name in re.findall(r"\w+", names):
                assert re.search(rf"\b{name}\b", read), (row, name)
                checked += 1
    assert checked > 12
