"""The drop-in classes compute what their modules and methods compute, also where these are not the stock ones.

The truth of an edit is the stand-in of the original (tests/originals.py) with the same weights and the same edit.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune

from rmc_kernels.compat import l0sg, port, r2gen, textgan
from tests import golden, originals

PORTS: dict[str, tuple[Any, Any]] = {
    "l0sg": (l0sg.RelationalMemory, originals.L0SG),
    "textgan": (textgan.RelationalMemory, originals.TextGAN),
    "r2gen": (r2gen.RelationalMemory, originals.R2Gen),
}
SIZES = {"l0sg": (3, 4, 5, 2), "textgan": (3, 4, 5, 2), "r2gen": (3, 8, 2)}
EVERY = pytest.mark.parametrize("name", ["l0sg", "textgan", "r2gen"])
Edit = Callable[[Any], object]


def _pair(name: str, **options: Any) -> tuple[Any, Any]:
    """A drop-in and the stand-in of its original, with the same weights, in float64 and without dropout."""
    torch.manual_seed(0)
    ours, theirs = (kind(*SIZES[name], **options).double().eval() for kind in PORTS[name])
    if name != "r2gen":
        ours.return_all_outputs = theirs.return_all_outputs = True
    for value in ours.parameters():
        nn.init.normal_(value, std=0.5)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _arguments(model: Any, batch: int = 2, steps: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    spec = model.spec
    x = torch.randn(batch, steps, spec.input_size, generator=generator, dtype=torch.float64)
    memory = torch.randn(batch, spec.mem_slots, spec.mem_size, generator=generator, dtype=torch.float64)
    return x.to(dtype), memory.to(torch.promote_types(dtype, torch.float32))


def _results(model: nn.Module, x: Tensor, memory: Tensor) -> dict[str, Tensor | None]:
    """Outputs, final memory and gradients of a call, by name."""
    model.zero_grad()
    x, memory = x.clone().requires_grad_(), memory.clone().requires_grad_()
    found = model(x, memory)
    results = dict(enumerate(found if isinstance(found, tuple) else (found,)))
    sum(
        (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum()
        for value in results.values()
    ).backward()  # type: ignore[union-attr]
    gradients = {key: None if value.grad is None else value.grad.clone() for key, value in model.named_parameters()}
    return {
        **{f"result {key}": value.detach() for key, value in results.items()},
        **gradients,
        "x": x.grad,
        "memory": memory.grad,
    }


def _agree(ours: Any, theirs: Any, like: Any = None) -> dict[str, Tensor | None]:
    x, memory = _arguments(like or ours)
    found, expected = _results(ours, x, memory), _results(theirs, x, memory)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert found[key] is None, key
        else:
            torch.testing.assert_close(
                found[key], value, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
            )
    return found


@contextmanager
def _told(*texts: str) -> Iterator[None]:
    """Exactly one RuntimeWarning, which says that the drop-in runs step by step, why, and the price."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(each.message) for each in caught if each.category is RuntimeWarning]
    assert len(messages) == 1, messages
    assert "runs step by step" in messages[0]
    assert "times" in messages[0]
    for text in texts:
        assert text in messages[0], messages[0]


@contextmanager
def _fused(monkeypatch: pytest.MonkeyPatch, calls: int) -> Iterator[None]:
    """No warning, and as many calls of the fused sequence."""
    made: list[object] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return original(*args, **kwargs)

    original = port.relational_memory
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(port, "relational_memory", counted)
        warnings.simplefilter("error", RuntimeWarning)
        yield
    assert len(made) == calls


# -- The port's own step ------------------------------------------------------------------------------------------


def _stepping(model: nn.Module) -> Any:
    """The model, with a hook that changes nothing on one of its modules."""
    next(part for part in model.modules() if isinstance(part, nn.Linear)).register_forward_hook(lambda *_: None)
    return model


@pytest.mark.feature("compat: modules called one by one, original vectors", backend="reference", variant="l0sg")
@pytest.mark.parametrize("kind", [l0sg.RelationalMemory, textgan.RelationalMemory])
@pytest.mark.parametrize("path", golden.files("p"), ids=lambda path: path.stem)
def test_l0sg_vectors(path: Path, kind: type[l0sg.RelationalMemory]) -> None:
    vector = golden.load(path)
    config = json.loads(str(vector.raw["config"]))
    model = _stepping(kind(**config["constructor"], return_all_outputs=True).double())
    model.load_state_dict(
        {name[4:]: torch.tensor(value) for name, value in vector.raw.items() if name.startswith("var/")}
    )
    x, memory = vector.inputs.clone().requires_grad_(), vector.memory.clone().requires_grad_()
    with _told("has a hook"):
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
    model = _stepping(
        r2gen.RelationalMemory(config["num_slots"], config["d_model"], config["num_heads"]).double().eval()
    )
    model.load_state_dict(
        {name[4:]: torch.tensor(value) for name, value in vector.raw.items() if name.startswith("var/")}
    )
    x = vector.inputs.clone().requires_grad_()
    with _told("has a hook"):
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
    fused, _ = _pair(name)
    stepping = _stepping(copy.deepcopy(fused))
    x, memory = _arguments(fused, batch, steps)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad(), _told():
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
    with _told():
        assert _stepping(model)(torch.zeros(2, 0, 8), model.init_memory(2)).shape == empty.shape == (2, 0, 24)


# -- Modules ------------------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Named(nn.Linear):
    """A subclass that computes the same."""


def _set(model: nn.Module, path: str, made: Any) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, made)


def _put(path: str, kind: Callable[[nn.Linear], nn.Module]) -> Edit:
    """Another module, which makes its weights of those that were there."""

    def edit(model: nn.Module) -> None:
        torch.manual_seed(3)
        _set(model, path, kind(model.get_submodule(path)).double())  # type: ignore[arg-type]

    return edit


def _like(kind: type[nn.Linear]) -> Callable[[nn.Linear], nn.Module]:
    def made(old: nn.Linear) -> nn.Module:
        new = kind(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        return new

    return made


def _on(path: str, change: Callable[[Any], object]) -> Edit:
    return lambda model: change(model.get_submodule(path))


def _scaled_output(module: nn.Module) -> None:
    module.register_forward_hook(lambda _module, _args, output: 1.5 * output)


def _scaled_input(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _module, args: (0.5 * args[0], *args[1:]))


def _scaled_gradient(module: nn.Module) -> None:
    module.register_full_backward_hook(
        lambda _module, gradients, _: tuple(None if g is None else 3 * g for g in gradients)
    )


def _scaled_output_gradient(module: nn.Module) -> None:
    module.register_full_backward_pre_hook(lambda _module, gradients: tuple(3 * g for g in gradients))


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


L0SG_EDITS: dict[str, tuple[Edit, str]] = {
    **{
        f"subclass of Linear: {path}": (_put(path, _like(Doubled)), f"{path} is a tests.test_compat_modules.Doubled")
        for path in ("qkv_projector", "input_projector", "input_gate_projector", "memory_gate_projector")
    },
    "subclass that changes nothing": (_put("qkv_projector", _like(Named)), "not a torch.nn.Linear"),
    "Sequential": (_put("input_projector", lambda old: nn.Sequential(old, nn.Tanh())), "input_projector is a torch.nn."),
    "another input size": (
        _put("input_projector", lambda old: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 8))),
        "input_projector is a torch.nn.",
    ),
    "RMSNorm": (_put("qkv_layernorm", lambda old: nn.RMSNorm([4, 24])), "qkv_layernorm is a torch.nn.RMSNorm"),
    "RMSNorm of rows": (_put("qkv_layernorm", lambda old: nn.RMSNorm(24)), "qkv_layernorm is a torch.nn.RMSNorm"),
    "Identity": (_put("attended_memory_layernorm2", lambda old: nn.Identity()), "attended_memory_layernorm2 is a"),
    "eps": (_on("attended_memory_layernorm", lambda norm: setattr(norm, "eps", 1e-2)), "attended_memory_layernorm has eps"),
    "LayerNorm without affine": (
        _put("qkv_layernorm", lambda old: nn.LayerNorm([4, 24], elementwise_affine=False)),
        "qkv_layernorm has no weight",
    ),
    "LayerNorm without bias": (
        _put("qkv_layernorm", lambda old: nn.LayerNorm([4, 24], bias=False)), "qkv_layernorm has no bias"
    ),
    "Linear without bias": (_put("qkv_projector", lambda old: nn.Linear(8, 24, bias=False)), "qkv_projector has no bias"),
    "untied MLP": (_put("attention_mlp.1", lambda old: nn.Linear(8, 8)), "attention_mlp.1 is not attention_mlp.0"),
    "another MLP layer": (_on("attention_mlp", _extended), "attention_mlp holds 3 modules, not 2"),
    "fewer MLP layers": (_on("attention_mlp", lambda layers: layers.pop(1)), "attention_mlp holds 1 modules, not 2"),
    "no MLP layers": (_on("attention_mlp", lambda layers: [layers.pop(0), layers.pop(0)]), "attention_mlp"),
    "tuple of MLP layers": (_put("attention_mlp", lambda old: nn.Sequential(*old)), "attention_mlp is a torch.nn."),
    **{
        f"forward hook: {path}": (_on(path, _scaled_output), f"{path} has a hook")
        for path in (
            "qkv_projector", "qkv_layernorm", "attention_mlp.0", "attended_memory_layernorm",
            "attended_memory_layernorm2", "input_projector", "input_gate_projector", "memory_gate_projector",
        )
    },
    "forward pre-hook": (_on("attention_mlp.1", _scaled_input), "attention_mlp.0 has a hook"),
    "backward hook": (_on("qkv_projector", _scaled_gradient), "qkv_projector has a hook"),
    "backward pre-hook": (_on("qkv_layernorm", _scaled_output_gradient), "qkv_layernorm has a hook"),
    "forward of its own": (_on("memory_gate_projector", _own_forward), "memory_gate_projector has a forward of its own"),
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
    ours, theirs = _pair(name)
    before = _results(ours, *_arguments(ours))
    change, text = L0SG_EDITS[edit]
    for model in (ours, theirs):
        change(model)
    with _told("RelationalMemory runs step by step", text):
        after = _agree(ours, theirs)
    if edit not in ("subclass that changes nothing", "compiled module"):
        assert any(key not in before or not _equal(before[key], value) for key, value in after.items()), (
            "the edit must change something"
        )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


class Wide(nn.Module):
    """Another attention, with a method of its own and nothing of the original's."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mix(query, key, value, need_weights=False)[0]  # type: ignore[no-any-return]


R2GEN_EDITS: dict[str, tuple[Edit, str]] = {
    **{
        f"subclass of Linear: {path}": (_put(path, _like(Doubled)), f"{path} is a tests.test_compat_modules.Doubled")
        for path in ("W", "U", "mlp.0", "mlp.2", *(f"attn.linears.{which}" for which in range(4)))
    },
    "GELU": (_put("mlp.1", lambda old: nn.GELU()), "mlp.1 is a torch.nn.GELU"),
    "LeakyReLU": (_put("mlp.3", lambda old: nn.LeakyReLU()), "mlp.3 is a torch.nn.LeakyReLU"),
    "no dropout": (_put("attn.dropout", lambda old: nn.Identity()), "attn.dropout is a torch.nn.Identity"),
    "another attention": (_put("attn", lambda old: Wide()), "attn is a tests.test_compat_modules.Wide"),
    "another MLP": (_put("mlp", lambda old: nn.Linear(8, 8)), "mlp is a torch.nn.Linear"),
    "longer MLP": (_on("mlp", lambda mlp: mlp.append(nn.Tanh())), "mlp holds 5 modules, not 4"),
    "shorter MLP": (_on("mlp", lambda mlp: mlp.pop(3)), "mlp.3 is a"),
    "another output projection": (
        _on("attn.linears", lambda linears: linears.append(copy.deepcopy(linears[0]))),
        "attn.linears holds 5 modules, not 4",
    ),
    "other heads": (
        _on("attn", lambda attention: [setattr(attention, "h", 4), setattr(attention, "d_k", 2)]),
        "attn has 4 heads of 2, not 2 of 4",
    ),
    **{
        f"forward hook: {path}": (_on(path, _scaled_output), f"{path} has a hook")
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
    ours, theirs = _pair("r2gen")
    before = _results(ours, *_arguments(ours))
    change, text = R2GEN_EDITS[edit]
    for model in (ours, theirs):
        change(model)
    with _told("RelationalMemory runs step by step", text):
        after = _agree(ours, theirs)
    if edit != "no dropout":
        assert any(key not in before or not _equal(before[key], value) for key, value in after.items())


@EVERY
def test_hooks_on_all_modules_fire(name: str) -> None:
    for register in (
        lambda: global_hooks.register_module_forward_hook(
            lambda _module, _args, output: output if isinstance(output, tuple) else 1.1 * output
        ),
        lambda: global_hooks.register_module_forward_pre_hook(lambda _module, _args: None),
        lambda: global_hooks.register_module_full_backward_hook(lambda *_: None),
        lambda: global_hooks.register_module_full_backward_pre_hook(lambda *_: None),
    ):
        ours, theirs = _pair(name)
        if name != "r2gen":  # a hook sees one result of the whole, a pair
            ours.return_all_outputs = theirs.return_all_outputs = True
        handle = register()  # type: ignore[no-untyped-call]
        try:
            with _told("a hook on all modules is registered"):
                _agree(ours, theirs)
        finally:
            handle.remove()


@EVERY
def test_a_patched_class_of_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = _pair(name)
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: 0.5 * original(self, input))
    with _told("torch.nn.Linear.forward was replaced"):
        _agree(ours, theirs)


class Scaled(nn.Parameter):
    """A tensor class that changes what operations compute."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return 3 * result if function is nn.functional.linear else result


def test_a_tensor_class_counts() -> None:
    ours, theirs = _pair("r2gen")
    for model in (ours, theirs):
        model.W.weight = Scaled(model.W.weight.detach())
    with torch.no_grad(), _told("W has a tests.test_compat_modules.Scaled for its weight"):
        torch.testing.assert_close(ours(*_arguments(ours)), theirs(*_arguments(ours)))


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


def _residual_step(self: Any, inputs: Tensor, memory: Tensor, treat_input_as_matrix: bool = False) -> Any:
    output, following = type(self).__mro__[1].forward_step(self, inputs, memory)  # type: ignore[attr-defined]
    return output + memory.flatten(1), following + 0.1 * memory


def _own_step(self: Any, inputs: Tensor, memory: Tensor, treat_input_as_matrix: bool = False) -> Any:
    rows = self.attend_over_memory(torch.cat([memory, self.input_projector(inputs)[:, None]], 1))
    return rows[:, 0], rows[:, :-1]


def _r2gen_step(self: Any, input: Tensor, memory: Tensor) -> Tensor:
    following = type(self).__mro__[1].forward_step(self, input.tanh(), memory)  # type: ignore[attr-defined]
    return following + memory.reshape_as(following)  # type: ignore[no-any-return]


OVERRIDES = {
    "multihead_attention": ("l0sg", "multihead_attention", _sharper_attention),
    "create_gates": ("l0sg", "create_gates", _open_gates),
    "attend_over_memory": ("textgan", "attend_over_memory", _one_relu_fewer),
    "forward_step over the original's": ("textgan", "forward_step", _residual_step),
    "forward_step of its own": ("l0sg", "forward_step", _own_step),
    "forward_step of r2gen": ("r2gen", "forward_step", _r2gen_step),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_subclass_that_overrides_a_method(case: str) -> None:
    name, method, function = OVERRIDES[case]
    ours, theirs = _pair(name)
    before = _results(ours, *_arguments(ours))
    for model in (ours, theirs):
        model.__class__ = type("Descendant", (type(model),), {method: function})
    with _told("Descendant runs step by step", f"the method {method} is overridden"):
        after = _agree(ours, theirs)
    assert not _equal(before["result 0"], after["result 0"])


def test_a_method_on_the_instance() -> None:
    ours, theirs = _pair("l0sg")
    for model in (ours, theirs):
        original = model.create_gates
        model.create_gates = MethodType(
            lambda self, inputs, memory, of=original: [g**2 for g in of(inputs, memory)], model
        )
    with _told("the method create_gates is overridden"):
        _agree(ours, theirs)
    ours, theirs = _pair("r2gen")
    for model in (ours, theirs):
        model.forward_step = lambda input, memory, of=model.forward_step: of(input, memory) / 2
    with _told("the method forward_step is overridden"):
        _agree(ours, theirs)


def test_a_step_that_calls_the_ports_own_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = _pair("textgan")
    ours.__class__ = type("Descendant", (type(ours),), {"forward_step": _residual_step})
    with _told():
        ours(*_arguments(ours))
    with torch.no_grad(), _fused(monkeypatch, calls=4):
        ours(*_arguments(ours))


def test_a_subclass_with_methods_and_modules_of_its_own_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader(l0sg.RelationalMemory):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.head = nn.Linear(24, 2)

        def forward(self, inputs: Tensor, memory: Tensor) -> Any:
            output, memory = super().forward(inputs, memory)
            return self.head(output), memory

        def read(self) -> None: ...

    model = Reader(*SIZES["l0sg"]).double()
    with _fused(monkeypatch, calls=1):
        assert model(*_arguments(model))[0].shape == (2, 2)
    model.head.register_forward_hook(lambda *_: None)
    with _fused(monkeypatch, calls=1):
        model(*_arguments(model))


def test_a_step_may_carry_another_memory() -> None:
    """As L0SG's forward, which hands on whatever forward_step returns; of any input, too."""

    class Counting(l0sg.RelationalMemory):
        def forward_step(self, inputs: Tensor, memory: Any, treat_input_as_matrix: bool = False) -> Any:
            output, following = super().forward_step(self.embedding(inputs), memory[0])
            return output[:, :2], (following, memory[1] + 1)

    model = Counting(*SIZES["l0sg"])
    model.embedding = nn.Embedding(9, 5)
    state = (model.initial_state(2), torch.zeros(1))
    with _told("the method forward_step is overridden"):
        output, (memory, steps) = model(torch.arange(8).reshape(2, 4), state)
    assert output.shape == (2, 2)
    assert memory.shape == (2, 3, 8)
    assert steps == 4


def test_the_intermediate_methods_are_there() -> None:
    ours, theirs = _pair("l0sg")
    x, memory = _arguments(ours)
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
    ours, theirs = _pair("r2gen")
    assert {name for name in vars(theirs) if not name.startswith("_")} <= set(vars(ours))
    assert {name for name in vars(theirs.attn) if not name.startswith("_")} <= set(vars(ours.attn))


def test_attention_of_r2gen_by_itself() -> None:
    """A mask of zeros and ones, for each query or for all; the weights that it keeps."""
    ours, theirs = _pair("r2gen")
    query, key = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    for mask in (None, torch.rand(2, 3, 5) > 0.5, torch.tensor([[[1, 1, 0, 1, 0]]] * 2)):
        torch.testing.assert_close(ours.attn(query, key, key, mask), theirs.attn(query, key, key, mask))
        torch.testing.assert_close(ours.attn.attn, theirs.attn.attn)
    half = copy.deepcopy(ours.attn).half()
    assert half(query.half(), key.half(), key.half(), mask).isfinite().all()
    assert half.attn[..., 2].abs().max() == 0
    assert torch.load is not None


def test_attention_weights_are_never_those_of_an_earlier_call() -> None:
    ours, _ = _pair("r2gen")
    handle = ours.W.register_forward_hook(lambda *_: None)
    with _told():
        ours(*_arguments(ours))
    assert ours.attn.attn.shape == (2, 2, 3, 4)
    copied = copy.deepcopy(ours)  # the weights have a history
    assert copied.attn.attn is None
    handle.remove()
    ours(*_arguments(ours))
    assert ours.attn.attn is None


# -- What stays fused ---------------------------------------------------------------------------------------------


FUSED: dict[str, Edit] = {
    "stock": lambda model: None,
    "frozen": lambda model: model.requires_grad_(False),
    "pruned": lambda model: [
        prune.random_unstructured(part, leaf, 0.5) for part in _linears(model) for leaf in ("weight", "bias")
    ],
    "weight_norm": lambda model: [parametrizations.weight_norm(part) for part in _linears(model)],
    "weight_norm, the older": lambda model: [nn.utils.weight_norm(part) for part in _linears(model)],
    "orthogonal": lambda model: [parametrizations.orthogonal(part) for part in _linears(model)],
    "spectral_norm": lambda model: [parametrizations.spectral_norm(part).eval() for part in _linears(model)],
    "spectral_norm, the older": lambda model: [nn.utils.spectral_norm(part).eval() for part in _linears(model)],
    "optimizer": lambda model: torch.optim.Adam(model.parameters()),
    "parameter hooks": lambda model: [
        value.register_hook(lambda gradient: 2 * gradient) for value in model.parameters()
    ],
}


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [part for part in model.modules() if isinstance(part, nn.Linear)]


@EVERY
@pytest.mark.parametrize("case", FUSED)
def test_what_stays_fused(case: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = _pair(name)
    for model in (ours, theirs):
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the older norms
            FUSED[case](model)
    with _fused(monkeypatch, calls=1):
        if case == "frozen":
            torch.testing.assert_close(ours(*_arguments(ours)), theirs(*_arguments(ours)), rtol=1e-9, atol=1e-10)
        else:
            _agree(ours, theirs)


@EVERY
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_refines_its_estimate_at_each_step_of_training(name: str, norm: Any) -> None:
    ours, theirs = _pair(name)
    for model in (ours, theirs):
        model.train()
        for part in _linears(model):
            torch.manual_seed(2)
            norm(part)
    if name == "r2gen":
        ours.attn.dropout.p = theirs.attn.dropout.p = 0
    with _told("has a hook or a parametrization whose result may change from call to call"):
        _agree(ours, theirs)
    _agree(ours.eval(), theirs.eval())


@EVERY
def test_removed_hooks_bring_the_kernels_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = _pair(name)
    handle = _linears(ours)[0].register_forward_hook(lambda *_: None)
    with _told():
        ours(*_arguments(ours))
    handle.remove()
    with _fused(monkeypatch, calls=1):
        ours(*_arguments(ours))


def test_it_warns_once_an_instance() -> None:
    model = _stepping(_pair("l0sg")[0])
    x, memory = _arguments(model)
    with _told():
        model(x, memory)
        model.eval()(x, memory)
        model.forward_step(x[:, 0], memory)
        model.qkv_projector.register_forward_hook(lambda *_: None)
        model(x, memory)
    with _told():
        copy.deepcopy(model)(x, memory)
    with _told():
        _stepping(_pair("l0sg")[0]).forward_step(x[:, 0], memory)


@EVERY
def test_replicas_of_data_parallel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.DataParallel copies modules without their parameters, which become plain attributes."""
    model, _ = _pair(name)

    def replicate(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
        if id(module) not in made:
            replica = made[id(module)] = module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
            for key, value in module._parameters.items():
                setattr(replica, key, value.view_as(value) if value is not None else None)
            for key, child in module._modules.items():
                assert child is not None
                replica._modules[key] = replicate(child, made)
        return made[id(module)]

    x, memory = _arguments(model)
    with _fused(monkeypatch, calls=2):
        torch.testing.assert_close(replicate(model, {})(x, memory), model(x, memory))
    _stepping(model)
    with _told():
        for _ in range(2):
            torch.testing.assert_close(replicate(model, {})(x, memory), model(x, memory))


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


@pytest.mark.feature("compat: LoRA by peft, as on the original", backend="reference", variant="l0sg")
@EVERY
def test_lora(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    nets = []
    for core in _pair(name):
        torch.manual_seed(5)
        net = Net(core, name)
        config = LoraConfig(r=2, target_modules=TARGETS[name], init_lora_weights=False)
        nets.append(get_peft_model(net, config).double())
    nets[1].load_state_dict(nets[0].state_dict())
    x, memory = _arguments(nets[0].base_model.model.core)
    with _told("qkv_projector is a peft." if name != "r2gen" else "attn.linears.0 is a peft."):
        found, expected = _results(nets[0], x, memory), _results(nets[1], x, memory)
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
    with _fused(monkeypatch, calls=1):
        found = merged(x, memory)
    if name != "l0sg":  # the layer of its MLP is one, so that the adapter of its first use is merged into each
        torch.testing.assert_close(found, adapted)
    torch.testing.assert_close(found, merged_original(x, memory))


def test_lora_on_half_types_keeps_adapters_in_float32() -> None:
    from peft import LoraConfig, get_peft_model

    core = _pair("r2gen")[0].bfloat16()
    exact = copy.deepcopy(core).double()
    x, memory = _arguments(core, dtype=torch.bfloat16)
    net = get_peft_model(core, LoraConfig(r=2, target_modules=["W"]))
    assert net.base_model.model.W.lora_A["default"].weight.dtype == torch.float32
    with _told("W is a peft."):
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
        for core in _pair("l0sg")
    ]
    with torch.no_grad():
        nets[0].base_model.model.core.qkv_layernorm.modules_to_save["default"].weight.mul_(2)
    nets[1].load_state_dict(nets[0].state_dict())
    x, memory = _arguments(nets[0].base_model.model.core)
    with _told("qkv_layernorm is a peft."):
        torch.testing.assert_close(nets[0](x, memory), nets[1](x, memory))


# -- Types, training, compilers -----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("way", ["hook", "override"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_in_the_types_users_run(name: str, dtype: torch.dtype, way: str) -> None:
    """As near to float64 as the fused sequence, within a factor; dtypes are the fused sequence's."""
    exact = _pair(name)[0]
    fused = copy.deepcopy(exact).to(dtype)
    stepping = copy.deepcopy(fused)
    if way == "hook":
        _stepping(stepping)
    elif name == "r2gen":
        stepping.__class__ = type("Descendant", (type(stepping),), {"forward_step": _plain_step})
    else:
        stepping.__class__ = type(
            "Descendant", (type(stepping),), {"forward_step": _plain_step, "create_gates": _plain_gates}
        )
    x, memory = _arguments(exact, 4, 6, dtype)
    memory = memory.to(dtype).to(memory.dtype)
    expected = exact(x.double(), memory.double())
    with _told():
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
    exact = _pair(name)[0]
    fused = copy.deepcopy(exact).float()
    stepping = _stepping(copy.deepcopy(fused))
    x, memory = _arguments(exact, 4, 6, torch.float32)
    expected = exact(x.double(), memory.double())
    with torch.autocast("cpu", dtype), _told():
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
    ours, theirs = _pair("r2gen")
    for model in (ours, theirs):
        _stepping(model.train())
    x, memory = _arguments(ours)
    with _told():
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
    model: Any = _pair(name)[0].float()
    core = model
    if kind == "hook":
        _scaled_output(_linears(model)[1])
    elif kind == "override":
        step = _r2gen_step if name == "r2gen" else _residual_step
        model.__class__ = type("Descendant", (type(model),), {"forward_step": step})
    else:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS[name], init_lora_weights=False))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, memory = _arguments(core, dtype=torch.float32)
    with _told():
        found, expected = _results(compiled, x, memory), _results(model, x, memory)
    for key, value in found.items():
        other = expected[key.removeprefix("_orig_mod.")]
        assert (value is None) == (other is None)
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


@EVERY
def test_exported_steps(name: str) -> None:
    model = _pair(name)[0].float()
    _scaled_output(_linears(model)[1])
    x, memory = _arguments(model, dtype=torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        batch = {0: torch.export.Dim("B", min=2)}
        program = torch.export.export(model, (x, memory), dynamic_shapes=(batch, batch)).module()
        more = _arguments(model, 5, dtype=torch.float32)
        torch.testing.assert_close(program(*more), model(*more))


# -- What is refused ----------------------------------------------------------------------------------------------

QUANTIZED = r"quantised modules are not supported: {} is a torch\.ao\.nn\.quantized\..*Linear; .*quantize_dynamic"


@EVERY
@pytest.mark.parametrize("kinds", [{nn.Linear}, None], ids=["Linear", "default"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation(name: str, kinds: Any, inside: bool) -> None:
    from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

    core = _pair(name)[0].float()
    model = Net(core, name).float() if inside else core
    x, memory = _arguments(core, dtype=torch.float32)
    expected = model(x, memory)
    quantised = quantize_dynamic(model, kinds)
    first = "attn.linears.0" if name == "r2gen" else "input_projector"
    with pytest.raises(ValueError, match=QUANTIZED.format(first)):
        quantised(x, memory)
    inner = quantised.core if inside else quantised
    row = _arguments(core, dtype=torch.float32)[0][:, 0]
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

    ours = _pair("r2gen")[0].float()
    ours.W.qconfig = QConfig(activation=default_observer, weight=default_weight_observer)
    x, memory = _arguments(ours, dtype=torch.float32)
    expected = ours(x, memory)
    observed = prepare(ours)
    torch.testing.assert_close(observed(x, memory), expected)  # observers are hooks, and fire
    assert observed.W.activation_post_process.max_val.isfinite()
    with pytest.raises(ValueError, match="quantised modules are not supported: W is a"):
        convert(observed)(x, memory)
    ours = _pair("l0sg")[0].float()
    ours.attention_mlp[1] = quantize_dynamic(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"quantised modules are not supported: attention_mlp\.1\.0 is a"):
        ours(*_arguments(ours, dtype=torch.float32))


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
    ("name", "path", "made", "message"),
    [
        ("l0sg", "qkv_projector", nn.Linear(8, 25), r"qkv_projector.weight must be of shape \(24, 8\), .* got \(25, 8\)"),
        ("l0sg", "qkv_layernorm", nn.LayerNorm(24), r"qkv_layernorm.weight must be of shape \(4, 24\), .* got \(24,\)"),
        ("l0sg", "forget_bias", nn.Parameter(torch.ones(8)), r"forget_bias must be of shape \(\), got \(8,\)"),
        ("textgan", "input_projector", nn.Linear(6, 8), r"input_projector.weight must be of shape \(8, 5\), .* got \(8, 6\)"),
        ("r2gen", "attn.linears.1", nn.Linear(8, 4), r"attn.linears.1.weight must be of shape \(8, 8\), .* got \(4, 8\)"),
        ("r2gen", "attn.linears.2", nn.Linear(8, 6), r"attn.linears.2.weight must be of shape \(8, 8\), .* got \(6, 8\)"),
        ("r2gen", "attn.linears.0", nn.Linear(9, 8), r"attn.linears.0.weight must be of shape \(8, 8\), .* got \(8, 9\)"),
        ("r2gen", "mlp.2", nn.Linear(8, 9), r"mlp.2.weight must be of shape \(8, 8\), .* got \(9, 8\)"),
        ("r2gen", "U", nn.Linear(8, 8), r"U.weight must be of shape \(16, 8\), .* got \(8, 8\)"),
    ],
)  # fmt: skip
def test_other_shapes(name: str, path: str, made: Any, message: str, stepping: bool) -> None:
    ours = _pair(name)[0].float()
    x, memory = _arguments(ours, dtype=torch.float32)
    _set(ours, path, made)
    if stepping:
        ours.__class__ = type("Descendant", (type(ours),), {"forward_step": _plain_step})
    with pytest.raises(ValueError, match=message):
        ours(x, memory)
    with pytest.raises(ValueError, match=message):
        type(ours).__mro__[int(stepping)].forward_step(ours, x[:, 0], memory)  # type: ignore[attr-defined]


@pytest.mark.parametrize("edit", [None, "hook", "lora"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_misuse_is_told_alike_step_by_step(edit: str | None) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = _pair("l0sg")[0].float()
    if edit == "hook":
        _stepping(model)
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
