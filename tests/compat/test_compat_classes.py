"""The drop-in classes: the originals' vectors, checkpoints, shapes and traps, on the fused backends."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmc_kernels import CellSpec, RelationalMemory
from rmc_kernels.backends import BACKENDS
from rmc_kernels.backends.cpu import CpuBackend
from rmc_kernels.compat import l0sg, r2gen, textgan
from tests import golden

EVERY_BACKEND = pytest.mark.parametrize("backend", ["cpu", "reference"])
SIZES: dict[str, Any] = {"mem_slots": 3, "head_size": 4, "input_size": 5, "num_heads": 2}


@pytest.fixture
def double_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ kernels as instantiated for float64, in which the vectors are."""
    monkeypatch.setitem(BACKENDS, "cpu", CpuBackend(test_double=True))


def _checkpoint(raw: dict[str, Any]) -> dict[str, Tensor]:
    return {name[4:]: torch.tensor(value) for name, value in raw.items() if name.startswith("var/")}


def _compare(model: nn.Module, raw: dict[str, Any], x: Tensor, memory: Tensor, loss: Tensor) -> None:
    loss.backward()
    assert x.grad is not None
    assert (x.grad - torch.tensor(raw["grad_inputs"])).abs().max() <= 1e-8
    if memory.grad is not None:
        assert (memory.grad - torch.tensor(raw["grad_initial_memory"])).abs().max() <= 1e-8
    gradients = {name: value.grad for name, value in model.named_parameters()}
    for name, theirs in raw.items():
        if name.startswith("grad/"):
            ours = gradients.pop(name[5:])
            assert ours is not None
            assert (ours - torch.tensor(theirs)).abs().max() <= 1e-8, name
    assert all(value is None for value in gradients.values()), "gradients that the original does not have"


@pytest.mark.feature("compat: L0SG class, original vectors", variant="l0sg")
@EVERY_BACKEND
@pytest.mark.parametrize("path", golden.files("p"), ids=lambda path: path.stem)
def test_l0sg_vectors(path: Path, backend: str, double_on_cpu: None) -> None:
    vector = golden.load(path)
    config = json.loads(str(vector.raw["config"]))
    model = l0sg.RelationalMemory(**config["constructor"], return_all_outputs=True, backend=backend).double()
    assert list(model.state_dict()) == config["state_dict_keys"]
    model.load_state_dict(_checkpoint(vector.raw), strict=True)
    x, memory = vector.inputs.clone().requires_grad_(), vector.memory.clone().requires_grad_()
    outputs, final = model(x, memory)
    assert vector.outputs is not None
    assert vector.cot_final is not None
    assert (outputs - vector.outputs.transpose(0, 1).flatten(0, 1)).abs().max() <= 1e-10  # [T * B, N * D]
    assert (final - vector.final).abs().max() <= 1e-10
    cotangents = vector.cot_outputs.transpose(0, 1).flatten(0, 1)
    _compare(model, vector.raw, x, memory, (outputs * cotangents).sum() + (final * vector.cot_final).sum())
    assert memory.grad is None  # the trap: forward detaches it


@pytest.mark.feature("compat: TextGAN class, original vectors", variant="l0sg")
@EVERY_BACKEND
@pytest.mark.parametrize("path", golden.files("p"), ids=lambda path: path.stem)
def test_textgan_vectors(path: Path, backend: str, double_on_cpu: None) -> None:
    vector = golden.load(path)
    config = json.loads(str(vector.raw["config"]))
    model = textgan.RelationalMemory(**config["constructor"], return_all_outputs=True, backend=backend).double()
    model.load_state_dict(_checkpoint(vector.raw), strict=True)
    x, memory = vector.inputs.clone().requires_grad_(), vector.memory.clone().requires_grad_()
    outputs, final = model(x, memory)
    assert vector.cot_final is not None
    assert (outputs - vector.outputs).abs().max() <= 1e-10
    _compare(model, vector.raw, x, memory, (outputs * vector.cot_outputs).sum() + (final * vector.cot_final).sum())
    assert memory.grad is not None
    model.return_all_outputs = False
    assert torch.equal(model(x, memory)[0], outputs[:, -1:])


@pytest.mark.feature("compat: R2Gen class, original vectors", variant="r2gen")
@EVERY_BACKEND
@pytest.mark.parametrize("path", golden.files("r"), ids=lambda path: path.stem)
def test_r2gen_vectors(path: Path, backend: str, double_on_cpu: None) -> None:
    vector = golden.load(path)
    config = json.loads(str(vector.raw["config"]))
    sizes = (config["num_slots"], config["d_model"], config["num_heads"])
    model = r2gen.RelationalMemory(*sizes, backend=backend).double().eval()
    checkpoint = _checkpoint(vector.raw)
    assert list(model.state_dict()) == list(checkpoint)
    model.load_state_dict(checkpoint, strict=True)
    x, memory = vector.inputs.clone().requires_grad_(), vector.memory.clone().requires_grad_()
    outputs = model(x, memory)
    assert (outputs - vector.outputs).abs().max() <= 1e-10
    assert torch.equal(model(x, memory.flatten(1)), outputs)
    _compare(model, vector.raw, x, memory, (outputs * vector.cot_outputs).sum())


@EVERY_BACKEND
def test_l0sg_steps_and_shapes(backend: str) -> None:
    torch.manual_seed(0)
    model = l0sg.RelationalMemory(**SIZES, backend=backend)
    x, memory = torch.randn(2, 4, 5), model.initial_state(2, trainable=True)
    assert torch.equal(memory, torch.eye(3, 8).expand(2, -1, -1))
    assert model.state_size == [3, 8]
    last, final = model(x, memory)
    assert last.shape == (2, model.output_size) == (2, 24)
    assert torch.equal(last, final.flatten(1))
    model.return_all_outputs = True
    everything, _ = model(x, memory)
    for t in range(4):
        output, memory = model.forward_step(x[:, t], memory)
        assert torch.equal(output, everything[2 * t : 2 * t + 2])
    assert torch.equal(memory, final)
    rows = model.forward_step(x[:, :1], final, treat_input_as_matrix=True)[0]
    assert torch.equal(rows, model.forward_step(x[:, 0], final)[0])
    images, wide = torch.randn(2, 4, 5), l0sg.RelationalMemory(3, 4, 20, backend=backend)
    assert torch.equal(  # what follows the time axis is flattened
        wide(images[:, None], wide.initial_state(2))[0], wide.forward_step(images, wide.initial_state(2))[0]
    )


def test_l0sg_cuts_gradients_where_the_original_does() -> None:
    model = l0sg.RelationalMemory(**SIZES)
    x, memory = torch.randn(2, 4, 5), torch.randn(2, 3, 8, requires_grad=True)
    assert model(x, memory)[0].requires_grad
    model.forward_step(x[:, 0], memory)[0].sum().backward()
    assert memory.grad is not None
    memory.grad = None
    _, carried = model(x, memory)
    model(x, carried)[0].sum().backward()
    assert memory.grad is None
    first, second = model.repackage_hidden((carried, carried))
    assert not first.requires_grad
    assert torch.equal(second, carried)


def test_l0sg_reuses_one_mlp_layer() -> None:
    model = l0sg.RelationalMemory(**SIZES, attention_mlp_layers=3)
    assert model.attention_mlp[0] is model.attention_mlp[2]
    assert len(model.state_dict()) == len(list(model.parameters())) + 4
    with torch.no_grad():
        model.get_parameter("attention_mlp.0.weight").zero_()
    assert model.state_dict()["attention_mlp.2.weight"].abs().sum() == 0


def test_l0sg_without_gates_keeps_the_originals_idle_parameters() -> None:
    model = l0sg.RelationalMemory(**SIZES, gate_style=None, forget_bias=2.0)
    assert model.state_dict()["input_gate_projector.weight"].shape == (0, 8)
    assert model.forget_bias.item() == 2
    layer = RelationalMemory.from_spec(model.spec)
    l0sg.load_variables(layer, model.state_dict())
    x, memory = torch.randn(2, 4, 5), torch.randn(2, 3, 8)
    assert torch.equal(model(x, memory)[0], layer(x, memory)[0][:, -1])


def test_r2gen_dropout_is_attention_dropout_in_training() -> None:
    torch.manual_seed(0)
    model = r2gen.RelationalMemory(3, 8, 2)
    start = model.state_dict()
    assert torch.equal(start["attn.linears.0.weight"], start["attn.linears.3.weight"])  # as the original's
    x, memory = torch.randn(4, 6, 8), model.init_memory(4)
    assert not torch.equal(model(x, memory), model(x, memory))
    model.attn.dropout.p = 1.0
    shut = model(x, memory)
    for linear in model.attn.linears[:3]:  # without attention only its last bias is left
        nn.init.normal_(linear.get_parameter("weight"))
    assert torch.equal(model(x, memory), shut)
    model.attn.dropout.p = 0.0
    plain = model(x, memory)
    assert torch.equal(plain, model.eval()(x, memory))
    layer = RelationalMemory.from_spec(CellSpec.r2gen(3, 8, 2)).eval()
    r2gen.load_variables(layer, model.state_dict())
    torch.testing.assert_close(layer(x, memory)[0], plain)
    step = model.forward_step(x[:, 0], memory)
    assert torch.equal(step, plain[:, 0])
    assert torch.equal(model.forward_step(x[:, 1], step), plain[:, 1])


def test_parameter_order_is_the_originals() -> None:
    """An optimizer's checkpoint goes by position."""
    names = [name for name, _ in l0sg.RelationalMemory(**SIZES).named_parameters()]
    assert names[:4] == ["forget_bias", "input_bias", "qkv_projector.weight", "qkv_projector.bias"]
    assert names[6] == "attention_mlp.0.weight"
    assert names[-1] == "memory_gate_projector.bias"
    names = [name for name, _ in r2gen.RelationalMemory(2, 4).named_parameters()]
    assert names[0] == "attn.linears.0.weight"
    assert names[-4:] == ["W.weight", "W.bias", "U.weight", "U.bias"]


def test_one_seed_draws_the_originals_weights() -> None:
    """The originals construct their Linears in this order, L0SG the MLP's once, R2Gen one for all four projections."""
    torch.manual_seed(0)
    ours = l0sg.RelationalMemory(**SIZES).state_dict()
    torch.manual_seed(0)
    for name, out, width in (
        ("qkv_projector", 24, 8), ("attention_mlp.1", 8, 8), ("input_projector", 8, 5), ("input_gate_projector", 16, 8),
        ("memory_gate_projector", 16, 8),
    ):  # fmt: skip
        assert torch.equal(ours[f"{name}.weight"], nn.Linear(width, out).weight), name
    torch.manual_seed(0)
    ours = r2gen.RelationalMemory(3, 8, 2).state_dict()
    torch.manual_seed(0)
    for name, out in (("attn.linears.2", 8), ("mlp.0", 8), ("mlp.2", 8), ("W", 16), ("U", 16)):
        assert torch.equal(ours[f"{name}.weight"], nn.Linear(8, out).weight), name


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [2, 32])  # 6 rows of memory and 96: the cpu backend has kernels for each
def test_in_the_types_users_run(batch: int, dtype: torch.dtype, backend: str) -> None:
    """The vectors are in float64; in these types a drop-in is the layer with its weights, which `rmc verify` holds."""
    torch.manual_seed(0)
    x, memory = torch.randn(batch, 4, 8, dtype=dtype), torch.randn(batch, 3, 8)
    port, rows = l0sg.RelationalMemory(3, 4, 8, 2, return_all_outputs=True, backend=backend).to(dtype), 4 * batch
    same = RelationalMemory.from_spec(port.spec, backend=backend, dtype=dtype)
    l0sg.load_variables(same, port.state_dict())
    expected, final = same(x, memory)
    output, carried = port(x, memory)
    assert torch.equal(output, expected.transpose(0, 1).reshape(rows, 24))
    assert torch.equal(carried, final)
    reports = r2gen.RelationalMemory(3, 8, 2, backend=backend).to(dtype).eval()
    same = RelationalMemory.from_spec(reports.spec, backend=backend, dtype=dtype).eval()
    r2gen.load_variables(same, reports.state_dict())
    assert torch.equal(reports(x, memory), same(x, memory)[0])
    with torch.inference_mode():
        assert torch.equal(port(x, memory)[0], output)


@pytest.mark.parametrize("name", ["qkv_projector", "attention_mlp.0"])
def test_spectral_norm_on_a_linear_counts(name: str) -> None:
    """The older one, which GAN code puts on every Linear: it refines its estimate at each call of the module."""
    model = textgan.RelationalMemory(**SIZES)
    x, memory = torch.randn(2, 4, 5), model.initial_state(2)
    nn.utils.spectral_norm(model.get_submodule(name))
    with torch.no_grad():
        model.get_parameter(f"{name}.weight_orig").mul_(3)
    with pytest.warns(RuntimeWarning, match=f"{name} has a hook"):
        model(x, memory)[0].sum().backward()
    assert torch.linalg.matrix_norm(model.get_submodule(name).weight, 2) < 1.5
    gradient = model.get_parameter(f"{name}.weight_orig").grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_narrower_memory_is_widened(dtype: torch.dtype) -> None:
    for model in (l0sg.RelationalMemory(**SIZES), textgan.RelationalMemory(**SIZES)):
        memory = model.initial_state(2)
        output, final = model.to(dtype)(torch.randn(2, 4, 5, dtype=dtype), memory)
        assert output.dtype == dtype
        assert final.dtype == model.initial_state(2).dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(copied: Any) -> None:
    model = textgan.RelationalMemory(**SIZES)
    x, memory = torch.randn(2, 4, 5), model.initial_state(2)
    other = copied(model)
    assert torch.equal(other(x, memory)[0], model(x, memory)[0])
    assert other.attention_mlp[0] is other.attention_mlp[1]  # still one layer
    with torch.no_grad():
        other.forget_bias.add_(1)
    assert not torch.equal(other(x, memory)[0], model(x, memory)[0])
    assert "backend='auto'" in repr(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(2, 4, 6), m.initial_state(2)), r"inputs must be \[B, T, 5\], got \(2, 4, 6\)"),
        (lambda m: m(torch.zeros(2, 4, 5).long(), m.initial_state(2)), "inputs must be a floating-point tensor"),
        (lambda m: m(torch.zeros(2, 0, 5), m.initial_state(2)), "inputs must have at least one step"),
        (
            lambda m: m(torch.zeros(2, 4, 5), torch.zeros(2, 3, 7)),
            r"memory must be \[B, 3, 8\] with B = 2, got \(2, 3, 7\)",
        ),
        (lambda m: m(torch.zeros(2, 4, 5), None), "memory .* a tensor, got None"),
        (lambda m: m.forward_step(torch.zeros(2, 5), None), r"memory .* a tensor \[B, 3, 8\], got None"),
        (lambda m: m.forward_step(torch.zeros(2, 6), m.initial_state(2)), r"inputs must be \[B, 5\], got \(2, 6\)"),
        (
            lambda m: m(torch.zeros(2, 4, 5).double(), m.initial_state(2)),
            "inputs must have the parameters' torch.float32 on cpu, got torch.float64 on cpu",
        ),
        (
            lambda m: r2gen.RelationalMemory(3, 8).forward_step(torch.zeros(2, 7), torch.zeros(2, 24)),
            r"input must be \[B, 8\], got \(2, 7\)",
        ),
        (lambda m: m.forward_step(torch.zeros(2, 2, 5), m.initial_state(2), True), "inputs must be one row a step"),
        (lambda m: m.initial_state(-1), "batch_size .* an int of at least 0, got -1"),
        (lambda m: type(m)(3, 4, 5, backend="gpu"), "backend .* one of"),
        (lambda m: r2gen.RelationalMemory(3, 8, 3), "d_model .* a multiple of num_heads"),
    ],
)
def test_errors_name_the_argument(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(l0sg.RelationalMemory(**SIZES))
