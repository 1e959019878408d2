"""The drop-in classes compute what their modules and methods compute, also where these are not the stock ones."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune

from rmc_kernels.compat import l0sg, r2gen, textgan
from tests import golden, originals
from tests.compat_cases import (
    EVERY,
    SIZES,
    agree,
    arguments,
    equal,
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

# -- The port's own step ------------------------------------------------------------------------------------------


@pytest.mark.feature("compat: modules called one by one, original vectors", backend="reference", variant="l0sg")
@pytest.mark.parametrize("kind", [l0sg.RelationalMemory, textgan.RelationalMemory])
@pytest.mark.parametrize("path", golden.files("p"), ids=lambda path: path.stem)
def test_l0sg_vectors(path: Path, kind: type[l0sg.RelationalMemory]) -> None:
    vector = golden.load(path)
    config = json.loads(str(vector.raw["config"]))
    model = step_by_step(kind(**config["constructor"], return_all_outputs=True).double())
    model.load_state_dict(
        {name[4:]: torch.tensor(value) for name, value in vector.raw.items() if name.startswith("var/")}
    )
    x, memory = vector.inputs.clone().requires_grad_(), vector.memory.clone().requires_grad_()
    with told("has a hook"):
        outputs, final = model(x, memory)
    if kind is l0sg.RelationalMemory:
        outputs = outputs.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
    assert vector.outputs is not None
    assert vector.cot_final is not None
    assert (outputs - vector.outputs).abs().max() <= 1e-10
    assert (final - vector.final).abs().max() <= 1e-10
    ((outputs * vector.cot_outputs).sum() + (final * vector.cot_final).sum()).backward()
    _vector_gradients(model, vector, x)
    assert (memory.grad is None) == (kind is l0sg.RelationalMemory)


@pytest.mark.feature("compat: modules called one by one, original vectors", backend="reference", variant="r2gen")
@pytest.mark.parametrize("path", golden.files("r"), ids=lambda path: path.stem)
def test_r2gen_vectors(path: Path) -> None:
    vector = golden.load(path)
    config = json.loads(str(vector.raw["config"]))
    model = step_by_step(
        r2gen.RelationalMemory(config["num_slots"], config["d_model"], config["num_heads"]).double().eval()
    )
    model.load_state_dict(
        {name[4:]: torch.tensor(value) for name, value in vector.raw.items() if name.startswith("var/")}
    )
    x = vector.inputs.clone().requires_grad_()
    with told("has a hook"):
        outputs = model(x, vector.memory)
    assert (outputs - vector.outputs).abs().max() <= 1e-10
    assert torch.equal(model(x, vector.memory.flatten(1)), outputs)
    (outputs * vector.cot_outputs).sum().backward()
    _vector_gradients(model, vector, x)


def _vector_gradients(model: nn.Module, vector: golden.Vector, x: Tensor) -> None:
    assert x.grad is not None
    assert (x.grad - torch.tensor(vector.raw["grad_inputs"])).abs().max() <= 1e-8
    assert vector.gradients
    for name, gradient in vector.gradients.items():
        ours = model.get_parameter(name).grad
        assert ours is not None
        assert (ours - gradient).abs().max() <= 1e-8, name


@EVERY
@pytest.mark.parametrize("batch, steps", [(0, 3), (1, 1), (5, 2)])
def test_steps_are_the_sequence(name: str, batch: int, steps: int) -> None:
    """The sequence, its steps, and the fused sequence; strided inputs too."""
    fused, _ = pair(name)
    stepping = step_by_step(copy.deepcopy(fused))
    x, memory = arguments(fused, batch, steps)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad(), told():
        found, expected = stepping(x, memory), fused(x, memory)
        carried = memory
        for t in range(steps):
            if name == "r2gen":
                carried = stepping.forward_step(x[:, t], carried)
            else:
                _, carried = stepping.forward_step(x[:, t], carried)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(carried.flatten(1), found[:, -1] if name == "r2gen" else found[1].flatten(1))


def test_r2gen_without_steps() -> None:
    model = r2gen.RelationalMemory(3, 8, 2)
    empty = model(torch.zeros(2, 0, 8), model.init_memory(2))
    with told():
        assert step_by_step(model)(torch.zeros(2, 0, 8), model.init_memory(2)).shape == empty.shape == (2, 0, 24)


# -- Modules ------------------------------------------------------------------------------------------------------


Edit = Callable[[Any], object]


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Named(nn.Linear):
    """A subclass that computes the same."""


def _put(path: str, kind: Callable[[nn.Linear], nn.Module]) -> Edit:
    """Another module, which makes its weights of those that were there."""

    def edit(model: nn.Module) -> None:
        torch.manual_seed(3)
        set_module(model, path, kind(model.get_submodule(path)).double())  # type: ignore[arg-type]

    return edit


def _like(kind: type[nn.Linear]) -> Callable[[nn.Linear], nn.Module]:
    def made(old: nn.Linear) -> nn.Module:
        new = kind(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        return new

    return made


def _on(path: str, change: Callable[[Any], object]) -> Edit:
    return lambda model: change(model.get_submodule(path))


def _scaled_input(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _module, args: (0.5 * args[0], *args[1:]))


def _scaled_gradient(module: nn.Module) -> None:
    def scaled(_module: nn.Module, gradients: Any, _: Any) -> Any:
        return tuple(None if each is None else 3 * each for each in gradients)

    module.register_full_backward_hook(scaled)


def _scaled_output_gradient(module: nn.Module) -> None:
    def scaled(_module: nn.Module, gradients: Any) -> Any:
        return tuple(3 * each for each in gradients)

    module.register_full_backward_pre_hook(scaled)


def _own_forward(module: Any) -> None:
    original = module.forward
    module.forward = lambda *args: 1.25 * original(*args)


class Halves(nn.Module):
    """A parametrization."""

    def forward(self, value: Tensor) -> Tensor:
        return value / 2


def _parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Halves())


def _extended(layers: nn.ModuleList) -> None:
    layers.append(layers[0])


def _sequential(model: Any) -> None:
    model.attention_mlp = nn.Sequential(*model.attention_mlp)


L0SG_EDITS: dict[str, tuple[Edit, str]] = {
    **{
        f"subclass of Linear: {path}": (_put(path, _like(Doubled)), f"{path} is a {__name__}.Doubled")
        for path in ("qkv_projector", "input_projector", "input_gate_projector", "memory_gate_projector")
    },
    "subclass that changes nothing": (_put("qkv_projector", _like(Named)), "not a torch.nn.Linear"),
    "Sequential": (_put("input_projector", lambda old: nn.Sequential(old, nn.Tanh())), "input_projector is a torch."),
    "another input size": (
        _put("input_projector", lambda old: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 8))),
        "input_projector is a torch.nn.",
    ),
    "RMSNorm": (_put("qkv_layernorm", lambda old: nn.RMSNorm([4, 24])), "qkv_layernorm is a torch.nn.RMSNorm"),
    "RMSNorm of rows": (_put("qkv_layernorm", lambda old: nn.RMSNorm(24)), "qkv_layernorm is a torch.nn.RMSNorm"),
    "Identity": (_put("attended_memory_layernorm2", lambda old: nn.Identity()), "attended_memory_layernorm2 is a"),
    "eps": (_on("qkv_layernorm", lambda norm: setattr(norm, "eps", 1e-2)), "qkv_layernorm has eps=0.01, not 1e-05"),
    "LayerNorm without affine": (
        _put("qkv_layernorm", lambda old: nn.LayerNorm([4, 24], elementwise_affine=False)),
        "qkv_layernorm has no weight",
    ),
    "LayerNorm without bias": (
        _put("qkv_layernorm", lambda old: nn.LayerNorm([4, 24], bias=False)), "qkv_layernorm has no bias"
    ),
    "Linear without bias": (_put("input_projector", lambda _: nn.Linear(5, 8, bias=False)), "projector has no bias"),
    "untied MLP": (_put("attention_mlp.1", lambda old: nn.Linear(8, 8)), "attention_mlp.1 is not attention_mlp.0"),
    "another MLP layer": (_on("attention_mlp", _extended), "attention_mlp holds 3 modules, not 2"),
    "fewer MLP layers": (_on("attention_mlp", lambda layers: layers.pop(1)), "attention_mlp holds 1 modules, not 2"),
    "no MLP layers": (_on("attention_mlp", lambda layers: [layers.pop(0), layers.pop(0)]), "attention_mlp.0 is not a"),
    "Sequential of MLP layers": (_on("", _sequential), "attention_mlp is a torch.nn.Sequential"),
    **{
        f"forward hook: {path}": (_on(path, scaled_output), f"{path} has a hook")
        for path in (
            "qkv_projector", "qkv_layernorm", "attention_mlp.0", "attended_memory_layernorm",
            "attended_memory_layernorm2", "input_projector", "input_gate_projector", "memory_gate_projector",
        )
    },
    "forward pre-hook": (_on("attention_mlp.1", _scaled_input), "attention_mlp.0 has a hook"),
    "backward hook": (_on("qkv_projector", _scaled_gradient), "qkv_projector has a hook"),
    "backward pre-hook": (_on("qkv_layernorm", _scaled_output_gradient), "qkv_layernorm has a hook"),
    "forward of its own": (_on("qkv_projector", _own_forward), "qkv_projector has a forward of its own"),
    "compiled module": (
        _on("input_projector", lambda module: module.compile(backend="eager")),
        "input_projector has a forward of its own",
    ),
    "parametrization": (_on("qkv_projector", _parametrized), "qkv_projector has a hook or a parametrization"),
    "parametrized scalar": (
        lambda model: parametrize.register_parametrization(model, "forget_bias", Halves()),
        "forget_bias is not a parameter",
    ),
    "more blocks": (lambda model: setattr(model, "num_blocks", 2), "(2, 2, 'unit', 4, 4), not (2, 1, 'unit', 4, 4)"),
    "no gates any more": (lambda model: setattr(model, "gate_style", None), "gate_style"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["l0sg", "textgan"])
@pytest.mark.parametrize("edit", L0SG_EDITS)
def test_l0sg_edits(edit: str, name: str) -> None:
    ours, theirs = pair(name)
    before = results(ours, *arguments(ours))
    change, text = L0SG_EDITS[edit]
    for model in (ours, theirs):
        change(model)
    with told("RelationalMemory runs step by step", text):
        after = agree(ours, theirs)
    if edit not in ("subclass that changes nothing", "compiled module"):
        assert any(key not in before or not equal(before[key], value) for key, value in after.items()), (
            "the edit must change something"
        )


class Wide(nn.Module):
    """Another attention, with a method of its own and nothing of the original's."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mix(query, key, value, need_weights=False)[0]  # type: ignore[no-any-return]


R2GEN_EDITS: dict[str, tuple[Edit, str]] = {
    **{
        f"subclass of Linear: {path}": (_put(path, _like(Doubled)), f"{path} is a {__name__}.Doubled")
        for path in ("W", "U", "mlp.0", "mlp.2", *(f"attn.linears.{which}" for which in range(4)))
    },
    "GELU": (_put("mlp.1", lambda old: nn.GELU()), "mlp.1 is a torch.nn.GELU"),
    "LeakyReLU": (_put("mlp.3", lambda old: nn.LeakyReLU()), "mlp.3 is a torch.nn.LeakyReLU"),
    "no dropout": (_put("attn.dropout", lambda old: nn.Identity()), "attn.dropout is a torch.nn.Identity"),
    "another attention": (_put("attn", lambda old: Wide()), f"attn is a {__name__}.Wide"),
    "another MLP": (_put("mlp", lambda old: nn.Linear(8, 8)), "mlp is a torch.nn.Linear"),
    "longer MLP": (_on("mlp", lambda mlp: mlp.append(nn.Tanh())), "mlp holds 5 modules, not 4"),
    "shorter MLP": (_on("mlp", lambda mlp: mlp.pop(3)), "mlp.3 is not a module"),
    "another output projection": (
        _on("attn.linears", lambda linears: linears.append(copy.deepcopy(linears[0]))),
        "attn.linears holds 5 modules, not 4",
    ),
    "other heads": (
        _on("attn", lambda attention: vars(attention).update(h=4, d_k=2)),
        "attn has 4 heads of 2, not 2 of 4",
    ),
    **{
        f"forward hook: {path}": (_on(path, scaled_output), f"{path} has a hook")
        for path in (
            "attn", "attn.linears.0", "attn.linears.3", "attn.dropout", "mlp", "mlp.0", "mlp.1", "mlp.3", "W", "U"
        )
    },
    "forward pre-hook": (_on("attn", _scaled_input), "attn has a hook"),
    "backward hook": (_on("mlp", _scaled_gradient), "mlp has a hook"),
    "forward of its own": (_on("attn", _own_forward), "attn has a forward of its own"),
    "Linear without bias": (_put("U", lambda old: nn.Linear(8, 16, bias=False)), "U has no bias"),
    "parametrization": (_on("attn.linears.1", _parametrized), "attn.linears.1 has a hook or a parametrization"),
}  # fmt: skip


@pytest.mark.parametrize("edit", R2GEN_EDITS)
def test_r2gen_edits(edit: str) -> None:
    ours, theirs = pair("r2gen")
    before = results(ours, *arguments(ours))
    change, text = R2GEN_EDITS[edit]
    for model in (ours, theirs):
        change(model)
    with told("RelationalMemory runs step by step", text):
        after = agree(ours, theirs)
    if edit != "no dropout":
        assert any(key not in before or not equal(before[key], value) for key, value in after.items())


@EVERY
def test_hooks_on_all_modules_fire(name: str) -> None:
    def larger(_module: Any, _arguments: Any, output: Any) -> Any:
        return output if isinstance(output, tuple) else 1.1 * output

    for register in (
        lambda: global_hooks.register_module_forward_hook(larger),
        lambda: global_hooks.register_module_forward_pre_hook(lambda _module, _args: None),
        lambda: global_hooks.register_module_full_backward_hook(lambda *_: None),
        lambda: global_hooks.register_module_full_backward_pre_hook(lambda *_: None),
    ):
        ours, theirs = pair(name)
        if name != "r2gen":  # a hook sees one result of the whole, a pair
            ours.return_all_outputs = theirs.return_all_outputs = True
        handle = register()  # type: ignore[no-untyped-call]
        try:
            with told("a hook on all modules is registered"):
                agree(ours, theirs)
        finally:
            handle.remove()


@EVERY
def test_a_patched_class_of_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(name)
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: 0.5 * original(self, input))
    with told("torch.nn.Linear.forward was replaced"):
        agree(ours, theirs)
    if name == "r2gen":
        monkeypatch.undo()
        ours = copy.deepcopy(ours)
        attend = r2gen.MultiHeadedAttention.forward
        monkeypatch.setattr(r2gen.MultiHeadedAttention, "forward", lambda *args: 2 * attend(*args))
        theirs.attn.register_forward_hook(lambda _module, _args, output: 2 * output)
        with told("rmc_kernels.compat.r2gen.MultiHeadedAttention.forward was replaced"):
            agree(ours, theirs)


@pytest.mark.parametrize(
    ("name", "path"), [("l0sg", "input_projector"), ("l0sg", "attention_mlp"), ("r2gen", "attn"), ("r2gen", "mlp")]
)
def test_what_is_no_module_counts(name: str, path: str) -> None:
    """A function in the place of a module."""
    ours, theirs = pair(name)
    for model in (ours, theirs):
        module = getattr(model, path)
        delattr(model, path)
        if path == "attention_mlp":
            vars(model)[path] = [lambda rows, of=module[0]: of(rows).tanh()]
        else:
            vars(model)[path] = lambda *args, of=module: of(*args).tanh()
    with told(f"{path} is not a module"):
        agree(ours, theirs)


class Scaled(nn.Parameter):
    """A tensor class that changes what operations compute."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return 3 * result if function is nn.functional.linear else result


def test_a_tensor_class_counts() -> None:
    ours, theirs = pair("r2gen")
    for model in (ours, theirs):
        model.W.weight = Scaled(model.W.weight.detach())
    with torch.no_grad(), told(f"W has a {__name__}.Scaled for its weight"):
        torch.testing.assert_close(ours(*arguments(ours)), theirs(*arguments(ours)))


# -- Methods ------------------------------------------------------------------------------------------------------


def _sharper_attention(self: Any, memory: Tensor) -> Tensor:
    return 2 * type(self).__mro__[1].multihead_attention(self, memory)  # type: ignore[attr-defined, no-any-return]


def _open_gates(self: Any, inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    input_gate, forget_gate = type(self).__mro__[1].create_gates(self, inputs, memory)  # type: ignore[attr-defined]
    return 1 - input_gate, forget_gate.sqrt()


def _one_relu_fewer(self: Any, memory: Tensor) -> Tensor:
    for _ in range(self.num_blocks):
        memory = self.attended_memory_layernorm(memory + self.multihead_attention(memory))
        rows = self.attention_mlp[1](self.attention_mlp[0](memory).relu())
        memory = self.attended_memory_layernorm2(memory + rows)
    return memory


def _own_step(self: Any, inputs: Tensor, memory: Tensor, treat_input_as_matrix: bool = False) -> Any:
    rows = self.attend_over_memory(torch.cat([memory, self.input_projector(inputs)[:, None]], 1))
    return rows[:, 0], rows[:, :-1]


OVERRIDES = {
    "multihead_attention": ("l0sg", "multihead_attention", _sharper_attention),
    "create_gates": ("l0sg", "create_gates", _open_gates),
    "attend_over_memory": ("textgan", "attend_over_memory", _one_relu_fewer),
    "forward_step over the original's": ("textgan", "forward_step", residual_step),
    "forward_step of its own": ("l0sg", "forward_step", _own_step),
    "forward_step of r2gen": ("r2gen", "forward_step", r2gen_step),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_subclass_that_overrides_a_method(case: str) -> None:
    name, method, function = OVERRIDES[case]
    ours, theirs = pair(name)
    before = results(ours, *arguments(ours))
    for model in (ours, theirs):
        model.__class__ = type("Descendant", (type(model),), {method: function})
    with told("Descendant runs step by step", f"the method {method} is overridden"):
        after = agree(ours, theirs)
    assert not equal(before["result 0"], after["result 0"])


def test_a_method_on_the_instance() -> None:
    ours, theirs = pair("l0sg")
    for model in (ours, theirs):
        original = model.create_gates
        model.create_gates = MethodType(
            lambda self, inputs, memory, of=original: [g**2 for g in of(inputs, memory)], model
        )
    with told("the method create_gates is overridden"):
        agree(ours, theirs)
    ours, theirs = pair("r2gen")
    for model in (ours, theirs):
        model.forward_step = lambda input, memory, of=model.forward_step: of(input, memory) / 2
    with told("the method forward_step is overridden"):
        agree(ours, theirs)


def test_a_step_that_calls_the_ports_own_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair("textgan")
    ours.__class__ = type("Descendant", (type(ours),), {"forward_step": residual_step})
    with told():
        ours(*arguments(ours))
    with torch.no_grad(), fused(monkeypatch, calls=4):
        ours(*arguments(ours))


def test_a_subclass_with_methods_and_modules_of_its_own_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader(l0sg.RelationalMemory):
        def __init__(self, *sizes: Any) -> None:
            super().__init__(*sizes)
            self.head = nn.Linear(24, 2)

        def forward(self, inputs: Tensor, memory: Tensor) -> Any:
            output, memory = super().forward(inputs, memory)
            return self.head(output), memory

        def read(self) -> None: ...

    model = Reader(*SIZES["l0sg"]).double()
    with fused(monkeypatch, calls=1):
        assert model(*arguments(model))[0].shape == (2, 2)
    model.head.register_forward_hook(lambda *_: None)
    with fused(monkeypatch, calls=1):
        model(*arguments(model))


def test_a_step_may_carry_another_memory() -> None:
    """As L0SG's forward, which hands on whatever forward_step returns; of any input, too."""

    class Counting(l0sg.RelationalMemory):
        embedding: nn.Embedding

        def forward_step(self, inputs: Tensor, memory: Any, treat_input_as_matrix: bool = False) -> Any:
            output, following = super().forward_step(self.embedding(inputs), memory[0])
            return output[:, :2], (following, memory[1] + 1)

    model = Counting(*SIZES["l0sg"])
    model.embedding = nn.Embedding(9, 5)
    state = (model.initial_state(2), torch.zeros(1))
    with told("the method forward_step is overridden"):
        output, (memory, steps) = model(torch.arange(8).reshape(2, 4), state)
    assert output.shape == (2, 2)
    assert memory.shape == (2, 3, 8)
    assert steps == 4


def test_the_intermediate_methods_are_there() -> None:
    ours, theirs = pair("l0sg")
    x, memory = arguments(ours)
    rows = torch.cat([memory, ours.input_projector(x[:, :1])], 1)
    for model in (ours, theirs):
        assert model.calculate_gate_size() == 8
        assert model.num_gates == 16
        assert (model.total_qkv_size, model.qkv_size, model.value_size, model.mem_slots_plus_input) == (24, 12, 4, 4)
    for method in ("attend_over_memory", "multihead_attention"):
        torch.testing.assert_close(getattr(ours, method)(rows), getattr(theirs, method)(rows))
    for one, other in zip(
        ours.create_gates(rows[:, 3:], memory), theirs.create_gates(rows[:, 3:], memory), strict=True
    ):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match=r"inputs must be one projected row, \[B, 1, 8\]; got \(2, 2, 8\)"):
        ours.create_gates(rows[:, :2], memory)
    with pytest.raises(ValueError, match="inputs must be one projected row"):
        ours.create_gates(rows[:, 0], memory)
    names = {name for name in vars(originals.L0SG) if not name.startswith("__")}
    assert names <= set(dir(l0sg.RelationalMemory))
    assert {name for name in vars(theirs) if not name.startswith("_")} <= set(vars(ours))
    ours, theirs = pair("r2gen")
    assert {name for name in vars(theirs) if not name.startswith("_")} <= set(vars(ours))
    assert {name for name in vars(theirs.attn) if not name.startswith("_")} <= set(vars(ours.attn))


def test_attention_of_r2gen_by_itself() -> None:
    """A mask of zeros and ones, for each query or for all; the weights that it keeps."""
    ours, theirs = pair("r2gen")
    query, key = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    for mask in (None, torch.rand(2, 3, 5) > 0.5, torch.tensor([[[1, 1, 0, 1, 0]]] * 2)):
        torch.testing.assert_close(ours.attn(query, key, key, mask), theirs.attn(query, key, key, mask))
        torch.testing.assert_close(ours.attn.attn, theirs.attn.attn)
    half = copy.deepcopy(ours.attn).half()
    assert half(query.half(), key.half(), key.half(), mask).isfinite().all()
    assert half.attn[..., 2].abs().max() == 0
    assert torch.load is not None


def test_attention_weights_are_never_those_of_an_earlier_call() -> None:
    ours, _ = pair("r2gen")
    handle = ours.W.register_forward_hook(lambda *_: None)
    with told():
        ours(*arguments(ours))
    assert ours.attn.attn.shape == (2, 2, 3, 4)
    copied = copy.deepcopy(ours)  # the weights have a history
    assert copied.attn.attn is None
    handle.remove()
    ours(*arguments(ours))
    assert ours.attn.attn is None


# -- What stays fused ---------------------------------------------------------------------------------------------


def _as_buffer(module: nn.Module) -> None:
    value = module._parameters.pop("weight")
    module.register_buffer("weight", value)


FUSED: dict[str, Edit] = {
    "stock": lambda model: None,
    "frozen": lambda model: model.requires_grad_(False),
    "buffers": lambda model: [*map(_as_buffer, linears(model))],
    "pruned": lambda model: [
        prune.random_unstructured(part, leaf, 0.5) for part in linears(model) for leaf in ("weight", "bias")
    ],
    "weight_norm": lambda model: [parametrizations.weight_norm(part) for part in linears(model)],
    "weight_norm, the older": lambda model: [nn.utils.weight_norm(part) for part in linears(model)],
    "orthogonal": lambda model: [parametrizations.orthogonal(part) for part in linears(model)],
    "spectral_norm": lambda model: [parametrizations.spectral_norm(part).eval() for part in linears(model)],
    "spectral_norm, the older": lambda model: [nn.utils.spectral_norm(part).eval() for part in linears(model)],
    "optimizer": lambda model: torch.optim.Adam(model.parameters()),
    "parameter hooks": lambda model: [
        value.register_hook(lambda gradient: 2 * gradient) for value in model.parameters()
    ],
}


@EVERY
@pytest.mark.parametrize("case", FUSED)
def test_what_stays_fused(case: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(name)
    for model in (ours, theirs):
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the older norms
            FUSED[case](model)
    with fused(monkeypatch, calls=1):
        if case in ("frozen", "buffers"):
            torch.testing.assert_close(ours(*arguments(ours)), theirs(*arguments(ours)), rtol=1e-9, atol=1e-10)
        else:
            agree(ours, theirs)


@EVERY
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_refines_its_estimate_at_each_step_of_training(name: str, norm: Any) -> None:
    ours, theirs = pair(name)
    for model in (ours, theirs):
        model.train()
        for part in linears(model):
            torch.manual_seed(2)
            norm(part)
    if name == "r2gen":
        ours.attn.dropout.p = theirs.attn.dropout.p = 0
    with told("has a hook or a parametrization whose result may change from call to call"):
        agree(ours, theirs)
    agree(ours.eval(), theirs.eval())


@EVERY
@pytest.mark.parametrize("strict", [False, True])
def test_exported_drop_ins_are_fused(name: str, strict: bool) -> None:
    """torch.export puts proxies of other classes in the place of modules; no step is unrolled, since T may be any."""
    model = pair(name)[0].float()
    x, memory = arguments(model, dtype=torch.float32)
    sizes = {0: torch.export.Dim("B", min=2), 1: torch.export.Dim("T", min=2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        program = torch.export.export(model, (x, memory), dynamic_shapes=(sizes, {0: sizes[0]}), strict=strict)
    more = arguments(model, 5, 7, dtype=torch.float32)
    torch.testing.assert_close(program.module()(*more), model(*more))


@EVERY
def test_removed_hooks_bring_the_kernels_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(name)
    handle = linears(ours)[0].register_forward_hook(lambda *_: None)
    with told():
        ours(*arguments(ours))
    handle.remove()
    with fused(monkeypatch, calls=1):
        ours(*arguments(ours))


def test_it_warns_once_an_instance() -> None:
    model = step_by_step(pair("l0sg")[0])
    x, memory = arguments(model)
    with told():
        model(x, memory)
        model.eval()(x, memory)
        model.forward_step(x[:, 0], memory)
        model.qkv_projector.register_forward_hook(lambda *_: None)
        model(x, memory)
    with told():
        copy.deepcopy(model)(x, memory)
    with told():
        step_by_step(pair("l0sg")[0]).forward_step(x[:, 0], memory)


@EVERY
def test_replicas_of_data_parallel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.DataParallel copies modules without their parameters, which become plain attributes."""
    model, _ = pair(name)

    def replicate(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
        if id(module) not in made:
            replica = made[id(module)] = module._replicate_for_data_parallel()
            for key, value in module._parameters.items():
                setattr(replica, key, value.view_as(value) if value is not None else None)
            for key, child in module._modules.items():
                assert child is not None
                replica._modules[key] = replicate(child, made)
        return made[id(module)]

    x, memory = arguments(model)
    with fused(monkeypatch, calls=2):
        torch.testing.assert_close(replicate(model, {})(x, memory), model(x, memory))
    step_by_step(model)
    with told():
        for _ in range(2):
            torch.testing.assert_close(replicate(model, {})(x, memory), model(x, memory))
