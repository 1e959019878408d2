"""Sonnet's variables in files: .npz, .safetensors, TensorFlow checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmc_kernels import CellSpec, RelationalMemory
from rmc_kernels.backends import BACKENDS
from rmc_kernels.backends.cpu import CpuBackend
from rmc_kernels.compat import checkpoints, convert, sonnet
from tests import golden

VECTOR = next(path for path in golden.files("g") if path.stem.startswith("g10"))  # two blocks, three MLP layers


def _variables() -> dict[str, Any]:
    raw = golden.load(VECTOR).raw
    return {name[4:]: value for name, value in raw.items() if name.startswith("var/")}


def _checks_out(layer: RelationalMemory) -> None:
    """The layer computes what Sonnet computed with these variables."""
    vector = golden.load(VECTOR)
    assert vector.outputs is not None
    assert (layer(vector.inputs, vector.memory)[0] - vector.outputs).abs().max() <= 1e-10


def _fresh(seed: int = 0) -> RelationalMemory:
    torch.manual_seed(seed)
    return RelationalMemory.from_spec(golden.load(VECTOR).layer.spec, dtype=torch.float64)


@pytest.mark.feature("compat: Sonnet's variables from and to files, original vectors", variant="sonnet")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_go_out_and_come_back(suffix: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", CpuBackend(test_double=True))  # the vectors are in float64
    path = tmp_path / f"core{suffix}"
    checkpoints.write(_variables(), path)
    layer = _fresh()
    layer.backend = backend
    sonnet.load(layer, path)
    _checks_out(layer)
    sonnet.save(layer, path)
    for name, value in checkpoints.read(path).items():
        assert value.dtype == np.float64
        assert (value == _variables()[name]).all(), name
    other = _fresh(1)
    sonnet.load(other, path)
    _checks_out(other)


def _crowded() -> dict[str, Any]:
    """A training run's file: the core under another name, optimizer slots, another core, a step counter."""
    inside = {name.removeprefix("relational_memory/"): value for name, value in _variables().items()}
    found = {f"agent/rmc/{name}": value for name, value in inside.items()}
    found |= {f"agent/rmc/{name}/Adam": np.zeros_like(value) for name, value in inside.items()}
    small = RelationalMemory.from_spec(CellSpec.sonnet(3, 2, 4, num_blocks=1), dtype=torch.float64)
    found |= {f"small/{name}": value for name, value in sonnet.export_variables(small).items()}
    return found | {"global_step": np.array(7)}


def test_the_module_is_found_in_a_training_runs_file(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    checkpoints.write(_crowded(), path)
    for scope in (None, "agent/rmc"):
        layer = _fresh()
        sonnet.load(layer, path, scope)
        _checks_out(layer)
    checkpoints.write({**_crowded(), **_variables()}, path)
    with pytest.raises(ValueError, match=r"got None; complete in the file: \['agent/rmc', 'relational_memory'\]"):
        sonnet.load(_fresh(), path)
    with pytest.raises(ValueError, match=r"scope must be .* got 'small/relational_memory'; complete in the file: \[\]"):
        sonnet.load(_fresh(), path, "small/relational_memory")


def test_errors_of_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must be a file that ends in \.npz or \.safetensors, got '.*core\.pt'"):
        sonnet.save(_fresh(), tmp_path / "core.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint is at"):
        sonnet.load(_fresh(), tmp_path / "model.ckpt-3")
    with pytest.raises(FileNotFoundError):
        sonnet.load(_fresh(), tmp_path / "absent.npz")


def test_a_missing_tensorflow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorflow.train", None)
    with pytest.raises(ImportError, match="needs tensorflow; where it is installed, `python -m rmc_kernels"):
        sonnet.load(_fresh(), tmp_path)


@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "directory"])
def test_tensorflow_checkpoints(prefix: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tf = pytest.importorskip("tensorflow", reason="needs tensorflow to write a checkpoint")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in _crowded().items():
            tf.compat.v1.get_variable(name, initializer=value)
        session.run(tf.compat.v1.global_variables_initializer())
        saved = tf.compat.v1.train.Saver().save(session, str(tmp_path / "model.ckpt"), global_step=7)
    checkpoint = saved if prefix else tmp_path
    layer = _fresh()
    sonnet.load(layer, checkpoint)
    _checks_out(layer)
    convert.main([str(checkpoint), str(tmp_path / "core.safetensors"), "--scope", "agent/rmc"])
    assert "agent/rmc/linear/w" in capsys.readouterr().out
    other = _fresh(1)
    sonnet.load(other, tmp_path / "core.safetensors")
    _checks_out(other)
    with pytest.raises(SystemExit):
        convert.main([str(checkpoint), str(tmp_path / "core.npz"), "--scope", "nothing"])
