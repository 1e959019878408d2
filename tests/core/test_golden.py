"""The reference against vectors of the original implementations (Sonnet under TensorFlow, the two PyTorch ports)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rmc_kernels.reference
from rmc_kernels.compat import sonnet
from tests import golden

FILES = golden.files()


def _error(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def _run(vector: golden.Vector) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, memory = vector.inputs.clone().requires_grad_(), vector.memory.clone().requires_grad_()
    output, final = vector.layer(x, memory)
    loss = (output * vector.cot_outputs).sum()
    if vector.cot_final is not None:
        loss = loss + (final * vector.cot_final).sum()
    vector.layer.zero_grad()
    loss.backward()
    assert x.grad is not None
    assert memory.grad is not None
    return output.detach(), final.detach(), x.grad, memory.grad


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_outputs_and_gradients(path: Path) -> None:
    vector = golden.load(path)
    memory_tolerance, gradient_tolerance = golden.tolerances(vector)
    output, final, grad_x, grad_memory = _run(vector)
    if vector.outputs is not None:
        assert _error(output, vector.outputs) <= memory_tolerance
    if vector.final is not None:
        assert _error(final, vector.final) <= memory_tolerance
    time_major = vector.compat is sonnet
    theirs = torch.tensor(vector.raw["grad_inputs"])
    assert _error(grad_x, theirs.transpose(0, 1) if time_major else theirs) <= gradient_tolerance
    assert _error(grad_memory, torch.tensor(vector.raw["grad_initial_memory"])) <= gradient_tolerance
    ours = vector.compat.export_variables(vector.layer, gradients=True)
    for name, gradient in vector.gradients.items():
        assert _error(torch.tensor(ours[name]), gradient) <= gradient_tolerance, name


def test_every_kind_of_vector_is_there() -> None:
    assert {path.stem[0] for path in FILES} >= {"g", "p", "r"}
    assert len(FILES) >= 10


@pytest.mark.parametrize("path", golden.files("s"), ids=lambda path: path.stem)
def test_seeded_gradients(path: Path) -> None:
    vector = golden.load(path)
    _run(vector)
    name = json.loads(str(vector.raw["config"]))["name"]
    for tf_name, gradient in sonnet.export_variables(vector.layer, gradients=True).items():
        theirs = torch.tensor(vector.raw[f"gradprobe/{tf_name}"])
        probes = golden.probe(name, tf_name, gradient.shape)
        ours = (probes * torch.tensor(gradient)).reshape(4, -1).sum(1)
        assert _error(ours, theirs) <= 1e-8 * max(1.0, theirs.abs().max().item()), tf_name


@pytest.mark.parametrize("name", ["g05_unit_keysize_large_bias", "p03_memory_gate_blocks2_mlp3"])
def test_epsilon_of_layer_norm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors see the epsilon at 1e-7: 1e-5 passes, half of it does not."""
    vector = golden.load(next(path for path in FILES if path.stem == name))
    assert vector.outputs is not None
    assert _error(_run(vector)[0], vector.outputs) <= 1e-7
    monkeypatch.setattr(rmc_kernels.reference, "LAYER_NORM_EPS", 0.5e-5)
    assert _error(_run(vector)[0], vector.outputs) > 1e-7


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_variables_come_back(path: Path) -> None:
    vector = golden.load(path)
    exported = vector.compat.export_variables(vector.layer)
    for name, value in vector.raw.items():
        if name.startswith("var/") and name[4:] in exported:
            assert (exported[name[4:]] == value).all(), name
    assert exported


def test_module_initial_state() -> None:
    """Sonnet's own initial memory is our identity."""
    for path in golden.files("g"):
        raw = golden.load(path).raw
        ours = golden.load(path).layer.initial_memory(raw["module_initial_state"].shape[0])
        assert torch.equal(ours.float(), torch.tensor(raw["module_initial_state"]))
