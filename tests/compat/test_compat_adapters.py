"""Drop-in classes that run step by step: LoRA, types, compilers; and the modules that they refuse."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmc_kernels.backends import BACKENDS
from rmc_kernels.backends.cpu import CpuBackend
from tests.compat_cases import (
    EVERY,
    arguments,
    fused,
    linears,
    pair,
    r2gen_step,
    residual_step,
    results,
    scaled_output,
    set_module,
    step_by_step,
    told,
)

# -- Adapters -----------------------------------------------------------------------------------------------------

TARGETS = {
    "l0sg": ["qkv_projector", "attention_mlp.0", "input_projector", "input_gate_projector", "memory_gate_projector"],
    "textgan": ["qkv_projector"],
    "r2gen": ["linears.0", "linears.3", "mlp.0", "W", "U"],
}


class Net(nn.Module):
    def __init__(self, core: Any, name: str) -> None:
        super().__init__()
        self.core, self.name = core, name
        self.head = nn.Linear(24, 3).double()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        found = self.core(x, memory)
        return self.head(found if self.name == "r2gen" else found[0])  # type: ignore[no-any-return]


LORA = [
    pytest.param(name, marks=pytest.mark.feature("compat: LoRA (peft), as on the original", variant=variant))
    for name, variant in (("l0sg", "l0sg"), ("textgan", "l0sg"), ("r2gen", "r2gen"))
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", LORA)
def test_lora(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    nets = []
    monkeypatch.setitem(BACKENDS, "cpu", CpuBackend(test_double=True))
    for core in pair(name):
        core.backend = backend
        torch.manual_seed(5)
        net = Net(core, name)
        config = LoraConfig(r=2, target_modules=TARGETS[name], init_lora_weights=False)
        nets.append(get_peft_model(net, config).double())
    nets[1].load_state_dict(nets[0].state_dict())
    x, memory = arguments(nets[0].base_model.model.core)
    with told("qkv_projector is a peft." if name != "r2gen" else "attn.linears.0 is a peft."):
        found, expected = results(nets[0], x, memory), results(nets[1], x, memory)
    adapters = [key for key in found if "lora_" in key]
    assert len(adapters) == 2 * len(TARGETS[name])
    for key, value in expected.items():
        assert (value is None) == (key not in (*adapters, "result 0", "x", *(["memory"] if name != "l0sg" else []))), (
            key
        )
        if value is not None:
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-10)
            assert value.abs().max() > 0
    trained = nets[0]
    optimizer = torch.optim.SGD([value for value in trained.parameters() if value.requires_grad], 0.1)
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = trained(x, memory).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    changed = {key for key, value in trained.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(adapters)
    adapted = trained(x, memory)
    nets[1].load_state_dict(trained.state_dict())
    merged, merged_original = (net.merge_and_unload() for net in nets)
    with fused(monkeypatch, calls=1):
        found = merged(x, memory)
    if name != "l0sg":  # the layer of its MLP is one, so that the adapter of its first use is merged into each
        torch.testing.assert_close(found, adapted)
    torch.testing.assert_close(found, merged_original(x, memory))


def test_lora_on_half_types_keeps_adapters_in_float32() -> None:
    from peft import LoraConfig, get_peft_model

    core = pair("r2gen")[0].bfloat16()
    exact = copy.deepcopy(core).double()
    x, memory = arguments(core, dtype=torch.bfloat16)
    net = get_peft_model(core, LoraConfig(r=2, target_modules=["W"]))
    assert net.base_model.model.W.lora_A["default"].weight.dtype == torch.float32
    with told("W is a peft."):
        found = net(x, memory)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact(x.double(), memory.double()), rtol=0.05, atol=0.05)


def test_modules_to_save() -> None:
    """peft keeps a trained copy beside the frozen module: here of a LayerNorm."""
    from peft import LoraConfig, get_peft_model

    nets = [
        get_peft_model(
            Net(core, "l0sg"),
            LoraConfig(
                r=2, target_modules=["input_projector"], modules_to_save=["qkv_layernorm"], init_lora_weights=False
            ),
        ).double()
        for core in pair("l0sg")
    ]
    with torch.no_grad():
        nets[0].base_model.model.core.qkv_layernorm.modules_to_save["default"].weight.mul_(2)
    nets[1].load_state_dict(nets[0].state_dict())
    x, memory = arguments(nets[0].base_model.model.core)
    with told("qkv_layernorm is a peft."):
        torch.testing.assert_close(nets[0](x, memory), nets[1](x, memory))


# -- Types, training, compilers -----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("way", ["hook", "override"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_in_the_types_users_run(name: str, dtype: torch.dtype, way: str) -> None:
    """As near to float64 as the fused sequence, within a factor; dtypes are the fused sequence's."""
    exact = pair(name)[0]
    fused = copy.deepcopy(exact).to(dtype)
    stepping = copy.deepcopy(fused)
    if way == "hook":
        step_by_step(stepping)
    elif name == "r2gen":
        stepping.__class__ = type("Descendant", (type(stepping),), {"forward_step": _plain_step})
    else:
        stepping.__class__ = type(
            "Descendant", (type(stepping),), {"forward_step": _plain_step, "create_gates": _plain_gates}
        )
    x, memory = arguments(exact, 4, 6, dtype)
    memory = memory.to(dtype).to(memory.dtype)
    expected = exact(x.double(), memory.double())
    with told():
        found = stepping(x, memory)
    for ours, like, right in zip(
        *(each if isinstance(each, tuple) else (each,) for each in (found, fused(x, memory), expected)), strict=True
    ):
        assert ours.dtype == like.dtype
        error, usual = (ours.double() - right).abs().max(), (like.double() - right).abs().max()
        assert error <= 4 * usual + 4 * torch.finfo(dtype).eps, (error, usual)


def _plain_step(self: Any, inputs: Tensor, memory: Tensor) -> Any:
    """What a user's step can rely on: memory and inputs have the dtype of the modules."""
    assert memory.dtype == inputs.dtype
    found = type(self).__mro__[1].forward_step(self, inputs, memory)  # type: ignore[attr-defined]
    assert (found if isinstance(found, Tensor) else found[1]).dtype == inputs.dtype
    return found


def _plain_gates(self: Any, inputs: Tensor, memory: Tensor) -> Any:
    assert memory.dtype == inputs.dtype
    gates = self.memory_gate_projector(memory.tanh()) + self.input_gate_projector(inputs)
    input_gate, forget_gate = gates.chunk(2, -1)
    return (input_gate + self.input_bias).sigmoid(), (forget_gate + self.forget_bias).sigmoid()


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_under_autocast(name: str, dtype: torch.dtype) -> None:
    exact = pair(name)[0]
    fused = copy.deepcopy(exact).float()
    stepping = step_by_step(copy.deepcopy(fused))
    x, memory = arguments(exact, 4, 6, torch.float32)
    expected = exact(x.double(), memory.double())
    with torch.autocast("cpu", dtype), told():
        found, like = stepping(x, memory), fused(x, memory)
    first = found if isinstance(found, Tensor) else found[0]
    first.float().sum().backward()
    assert all(value.grad is None or value.grad.dtype == torch.float32 for value in stepping.parameters())
    for ours, theirs, right in zip(
        *(each if isinstance(each, tuple) else (each,) for each in (found, like, expected)), strict=True
    ):
        assert ours.dtype == theirs.dtype
        error, usual = (ours.double() - right).abs().max(), (theirs.double() - right).abs().max()
        assert error <= 4 * usual + 4 * torch.finfo(dtype).eps, (error, usual)


def test_dropout_of_r2gen_step_by_step() -> None:
    ours, theirs = pair("r2gen")
    for model in (ours, theirs):
        step_by_step(model.train())
    x, memory = arguments(ours)
    with told():
        assert not torch.equal(ours(x, memory), ours(x, memory))
    ours.attn.dropout.p = theirs.attn.dropout.p = 1.0
    torch.testing.assert_close(ours(x, memory), theirs(x, memory))
    ours.attn.dropout.p = theirs.attn.dropout.p = 0.5
    results = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        results.append(model(x, memory))
    torch.testing.assert_close(*results)
    ours.attn.dropout.p = 0.0
    torch.testing.assert_close(ours(x, memory), ours.eval()(x, memory))


@EVERY
@pytest.mark.parametrize("kind", ["hook", "override", "lora"])
def test_compiled_steps(name: str, kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch._dynamo.reset()
    model: Any = pair(name)[0].float()
    core = model
    if kind == "hook":
        scaled_output(linears(model)[1])
    elif kind == "override":
        step = r2gen_step if name == "r2gen" else residual_step
        model.__class__ = type("Descendant", (type(model),), {"forward_step": step})
    else:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS[name], init_lora_weights=False))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, memory = arguments(core, steps=2, dtype=torch.float32)
    with told():
        found, expected = results(compiled, x, memory), results(model, x, memory)
    for key, value in found.items():
        other = expected[key.removeprefix("_orig_mod.")]
        assert (value is None) == (other is None)
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


@EVERY
def test_exported_steps(name: str) -> None:
    model = pair(name)[0].float()
    scaled_output(linears(model)[1])
    x, memory = arguments(model, dtype=torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        batch = {0: torch.export.Dim("B", min=2)}
        program = torch.export.export(model, (x, memory), dynamic_shapes=(batch, batch)).module()
        more = arguments(model, 5, dtype=torch.float32)
        torch.testing.assert_close(program(*more), model(*more))


# -- What is refused ----------------------------------------------------------------------------------------------

QUANTIZED = r"quantised modules are not supported: {} is a torch\.ao\.nn\.quantized\..*Linear; .*quantize_dynamic"


@EVERY
@pytest.mark.parametrize("kinds", [{nn.Linear}, None], ids=["Linear", "default"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation(name: str, kinds: Any, inside: bool) -> None:
    from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

    core = pair(name)[0].float()
    model = Net(core, name).float() if inside else core
    x, memory = arguments(core, dtype=torch.float32)
    expected = model(x, memory)
    quantised = quantize_dynamic(model, kinds)
    first = "attn.linears.0" if name == "r2gen" else "input_projector"
    with pytest.raises(ValueError, match=QUANTIZED.format(first)):
        quantised(x, memory)
    inner = quantised.core if inside else quantised
    row = arguments(core, dtype=torch.float32)[0][:, 0]
    with pytest.raises(ValueError, match="quantised modules are not supported"):
        inner.forward_step(row, memory)
    if name == "r2gen":  # nothing is left to tell a dtype
        with pytest.raises(ValueError, match="quantised modules are not supported"):
            inner.init_memory(2)
    torch.testing.assert_close(model(x, memory), expected)  # the model itself is as it was
    if inside:
        partly = quantize_dynamic(model, {"head": default_dynamic_qconfig})
        assert "quantized" in type(partly.head).__module__
        assert torch.equal(partly.core(x, memory)[0], model.core(x, memory)[0])


@pytest.mark.filterwarnings("ignore")
def test_static_and_nested_quantisation() -> None:
    from torch.ao.quantization import (
        QConfig,
        convert,
        default_observer,
        default_weight_observer,
        prepare,
        quantize_dynamic,
    )

    ours = pair("r2gen")[0].float()
    ours.W.qconfig = QConfig(activation=default_observer, weight=default_weight_observer)
    x, memory = arguments(ours, dtype=torch.float32)
    expected = ours(x, memory)
    observed = prepare(ours)
    torch.testing.assert_close(observed(x, memory), expected)  # observers are hooks, and fire
    assert observed.W.activation_post_process.max_val.isfinite()
    with pytest.raises(ValueError, match="quantised modules are not supported: W is a"):
        convert(observed)(x, memory)
    ours = pair("l0sg")[0].float()
    ours.attention_mlp[1] = quantize_dynamic(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"quantised modules are not supported: attention_mlp\.1\.0 is a"):
        ours(*arguments(ours, dtype=torch.float32))


@pytest.mark.filterwarnings("ignore")
def test_the_librarys_own_layers_are_left_by_quantisation() -> None:
    from torch.ao.quantization import quantize_dynamic

    from rmc_kernels import RelationalMemory, RelationalMemoryCell

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.cell = (
                RelationalMemory(5, 3, 4, 2),
                RelationalMemoryCell(5, 3, 4, 2, read_head="attention"),
            )
            self.head = nn.Linear(24, 2)

    model = Model()
    x = torch.randn(2, 4, 5)
    for kinds in ({nn.Linear}, None):
        quantised = quantize_dynamic(model, kinds)
        assert "quantized" in type(quantised.head).__module__
        assert torch.equal(quantised.layer(x)[0], model.layer(x)[0])
        assert torch.equal(quantised.cell(x[:, 0])[0], model.cell(x[:, 0])[0])


@pytest.mark.parametrize("stepping", [False, True])
@pytest.mark.parametrize(
    ("name", "path", "made", "leaf", "needed", "got"),
    [
        ("l0sg", "qkv_projector", nn.Linear(8, 25), ".weight", "(24, 8)", "(25, 8)"),
        ("l0sg", "qkv_layernorm", nn.LayerNorm(24), ".weight", "(4, 24)", "(24,)"),
        ("l0sg", "forget_bias", nn.Parameter(torch.ones(8)), "", "()", "(8,)"),
        ("textgan", "input_projector", nn.Linear(6, 8), ".weight", "(8, 5)", "(8, 6)"),
        ("r2gen", "attn.linears.1", nn.Linear(8, 4), ".weight", "(8, 8)", "(4, 8)"),
        ("r2gen", "attn.linears.2", nn.Linear(8, 6), ".weight", "(8, 8)", "(6, 8)"),
        ("r2gen", "attn.linears.0", nn.Linear(9, 8), ".weight", "(8, 8)", "(8, 9)"),
        ("r2gen", "mlp.2", nn.Linear(8, 9), ".weight", "(8, 8)", "(9, 8)"),
        ("r2gen", "U", nn.Linear(8, 8), ".weight", "(16, 8)", "(8, 8)"),
    ],
)
def test_other_shapes(name: str, path: str, made: Any, leaf: str, needed: str, got: str, stepping: bool) -> None:
    message = rf"{path}{leaf} must be of shape {re.escape(needed)},.* got {re.escape(got)}"
    ours = pair(name)[0].float()
    x, memory = arguments(ours, dtype=torch.float32)
    set_module(ours, path, made)
    if stepping:
        ours.__class__ = type("Descendant", (type(ours),), {"forward_step": _plain_step})
    with pytest.raises(ValueError, match=message):
        ours(x, memory)
    with pytest.raises(ValueError, match=message):
        type(ours).__mro__[int(stepping)].forward_step(ours, x[:, 0], memory)  # type: ignore[attr-defined]


@EVERY
def test_other_sizes(name: str) -> None:
    ours = pair(name)[0]
    setattr(ours, "num_slots" if name == "r2gen" else "mem_slots", 4)
    with pytest.raises(ValueError, match=r"must stay \(3, 8\), as when the class was made, got \(4, 8\): make a new"):
        ours(*arguments(ours))


@pytest.mark.parametrize("edit", [None, "hook", "lora"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_misuse_is_told_alike_step_by_step(edit: str | None) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = pair("l0sg")[0].float()
    if edit == "hook":
        step_by_step(model)
    if edit == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS["l0sg"])).base_model.model
    good, memory = torch.zeros(2, 4, 5), model.initial_state(2)
    for x, state, message in (
        (torch.zeros(4, 5), memory, r"inputs must be \[B, T, 5\], got \(4, 5\)"),
        (torch.zeros(2, 4, 6), memory, r"inputs must be \[B, T, 5\], got \(2, 4, 6\)"),
        (good.long(), memory, "inputs must be a floating-point tensor"),
        (good.double(), memory, "inputs must have the parameters' torch.float32 on cpu, got torch.float64 on cpu"),
        (torch.zeros(2, 0, 5), memory, "inputs must have at least one step"),
        (good, memory[:1], r"memory must be \[B, 3, 8\] with B = 2, got \(1, 3, 8\)"),
        (good, memory.double(), "memory must be torch.float32 on cpu, got torch.float64 on cpu"),
        (good, None, "memory must be a tensor, got None|memory takes a tensor, got None"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            model(x, state)
    with pytest.raises(ValueError, match=r"inputs must be one row a step, \[B, 1, 5\]; got \(2, 4, 5\)"):
        model.forward_step(good, memory, True)
    rows = model.forward_step(good[:, :1], memory, treat_input_as_matrix=True)
    torch.testing.assert_close(rows, model.forward_step(good[:, 0], memory))
