"""From the originals to the drop-in classes: whole models, living modules, checkpoints; and what is refused there."""

from __future__ import annotations

import copy
import io
import json
import pickle
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from rmc_kernels import CellSpec, RelationalMemory
from rmc_kernels.backends import BACKENDS
from rmc_kernels.backends.cpu import CpuBackend
from rmc_kernels.compat import l0sg, r2gen, sonnet, textgan
from tests import golden, originals

# The originals' gate projections have no rows where there are no gates.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

MODULES: dict[str, tuple[ModuleType, type[nn.Module]]] = {
    "l0sg": (l0sg, originals.L0SG),
    "textgan": (textgan, originals.TextGAN),
    "r2gen": (r2gen, originals.R2Gen),
}
SIZES: dict[str, Any] = {"l0sg": (3, 4, 5, 2), "textgan": (3, 4, 5, 2), "r2gen": (3, 8, 2)}
EVERY = pytest.mark.parametrize("name", MODULES)


def _original(name: str, *sizes: int, **options: Any) -> Any:
    torch.manual_seed(0)
    made = MODULES[name][1](*(sizes or SIZES[name]), **options)
    for value in made.parameters():
        nn.init.normal_(value, std=0.5)
    return made


def _arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8 if name == "r2gen" else 5, generator=generator)
    return x.to(dtype), torch.randn(2, 3, 8, generator=generator).to(torch.promote_types(dtype, torch.float32))


def _same(ours: Any, theirs: Any, name: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(*_arguments(name)), theirs(*_arguments(name)))


# -- The stand-ins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*golden.files("p"), *golden.files("r")], ids=lambda path: path.stem)
def test_the_stand_ins_compute_what_the_originals_did(path: Path) -> None:
    vector = golden.load(path)
    config = json.loads(str(vector.raw["config"]))
    checkpoint = {name[4:]: torch.tensor(value) for name, value in vector.raw.items() if name.startswith("var/")}
    if "constructor" in config:
        kinds = [originals.L0SG(**config["constructor"], return_all_outputs=True)]
        kinds += [originals.TextGAN(**config["constructor"], return_all_outputs=True)]
    else:
        kinds = [originals.R2Gen(config["num_slots"], config["d_model"], config["num_heads"])]  # type: ignore[list-item]
    for model in kinds:
        model.double().eval().load_state_dict(checkpoint)
        found = model(vector.inputs, vector.memory)
        outputs, final = found if isinstance(found, tuple) else (found, None)
        if type(model) is originals.L0SG:
            outputs = outputs.unflatten(0, vector.inputs.shape[1::-1]).transpose(0, 1)
        assert (outputs - vector.outputs).abs().max() <= 1e-10
        if final is not None:
            assert (final - vector.final).abs().max() <= 1e-10


# -- Whole models -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A user's model around a core."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(24, 2)


def _saved_as(monkeypatch: pytest.MonkeyPatch, module: str, **classes: type) -> None:
    """From now on a module of the user's holds these classes, under these names."""
    made = ModuleType(module)
    for name, kind in classes.items():
        kind.__module__, kind.__qualname__, kind.__name__ = module, name, name
        setattr(made, name, kind)
    _is_imported(monkeypatch, module, made)


def _is_imported(monkeypatch: pytest.MonkeyPatch, name: str, module: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, name.partition(".")[0], module)  # the package, where it is in one
    monkeypatch.setitem(sys.modules, name, module)


def _written(model: nn.Module) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return stream


def _read(stream: io.BytesIO) -> Any:
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("whole", [False, True], ids=["core", "in a model"])
@pytest.mark.parametrize("name, options", [
    ("l0sg", {}), ("l0sg", {"gate_style": None, "num_blocks": 2}), ("l0sg", {"gate_style": "memory", "key_size": 3}),
    ("l0sg", {"attention_mlp_layers": 3, "return_all_outputs": True, "forget_bias": 2.0}),
    ("textgan", {"return_all_outputs": True}), ("r2gen", {}),
])  # fmt: skip
def test_whole_models_load(name: str, options: Any, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kind = MODULES[name]
    path = {"r2gen": "modules.encoder_decoder"}.get(name, "relational_rnn_general")
    copied = type("RelationalMemory", (kind,), {})
    attention = type("MultiHeadedAttention", (originals.MultiHeadedAttention,), {})
    with monkeypatch.context() as patch:
        _saved_as(patch, path, RelationalMemory=copied, MultiHeadedAttention=attention)
        original = _original(name, **options).eval()
        original.__class__ = copied
        if name == "r2gen":
            original.attn.__class__ = attention
            original.attn.dropout.p = 0.3
        stream = _written(Net(original) if whole else original)
    _is_imported(monkeypatch, path, module)  # what changing the import does
    loaded = _read(stream)
    core = loaded.core if whole else loaded
    assert type(core) is module.RelationalMemory
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        _same(core, original, name)
    assert not core.training
    assert core.spec.num_heads == 2
    assert core.backend == "auto"
    for attribute, value in vars(original).items():
        if not attribute.startswith("_"):
            assert getattr(core, attribute) == value, attribute
    if name == "r2gen":
        assert core.attn.dropout.p == core.spec.dropout == 0.3
        assert (core.attn.h, core.attn.d_k) == (2, 4)
    else:
        assert core.attention_mlp[0] is core.attention_mlp[1]
        assert core.return_all_outputs == options.get("return_all_outputs", False)
    core.train()(*_arguments(name))[0].sum().backward()
    again = _read(_written(loaded))  # and as ours
    _same((again.core if whole else again).eval(), original, name)


def test_a_whole_r2gen_that_keeps_its_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one class of the file was replaced: the attention is the user's, and is called."""
    copied = type("RelationalMemory", (originals.R2Gen,), {})
    attention = type("MultiHeadedAttention", (originals.MultiHeadedAttention,), {})
    _saved_as(monkeypatch, "modules.encoder_decoder", RelationalMemory=copied, MultiHeadedAttention=attention)
    original = _original("r2gen")
    original.__class__, original.attn.__class__ = copied, attention
    original(*_arguments("r2gen"))
    original.attn.attn = None
    stream = _written(original.eval())
    sys.modules["modules.encoder_decoder"].RelationalMemory = r2gen.RelationalMemory  # type: ignore[attr-defined]
    loaded = _read(stream)
    with pytest.warns(
        RuntimeWarning, match=r"attn is a modules\.encoder_decoder\.MultiHeadedAttention, not a rmc_kernels"
    ):
        _same(loaded, original, "r2gen")
    fused = r2gen.from_module(loaded)
    assert type(fused.attn) is r2gen.MultiHeadedAttention
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _same(fused, original, "r2gen")


def _as_ours(original: nn.Module, kind: type[nn.Module], **changes: Any) -> Any:
    """What unpickling an original makes where its class is a drop-in: its state, with changes."""
    made: Any = object.__new__(kind)
    state = {**copy.deepcopy(vars(original)), **changes}
    made.__setstate__({key: value for key, value in state.items() if value is not ...})
    return made


@pytest.mark.parametrize(
    "missing",
    [
        "mem_slots",
        "head_size",
        "key_size",
        "input_size",
        "attention_mlp_layers",
        "mem_size",
        "return_all_outputs",
        "mem_slots_plus_input",
        "num_gates",
    ],
)
def test_what_an_older_original_lacks_comes_from_its_weights(missing: str) -> None:
    original = _original("l0sg", key_size=3, attention_mlp_layers=3)
    loaded = _as_ours(original, l0sg.RelationalMemory, **{missing: ...})
    assert getattr(loaded, missing) == getattr(original, missing)
    _same(loaded, original, "l0sg")


def test_r2gen_from_its_weights() -> None:
    original = _original("r2gen").eval()
    loaded = _as_ours(original, r2gen.RelationalMemory, d_model=..., num_heads=...)
    assert (loaded.d_model, loaded.num_heads) == (8, 2)
    with pytest.warns(RuntimeWarning, match="attn is a tests"):
        _same(loaded, original, "r2gen")


def test_what_cannot_be_rebuilt_says_why() -> None:
    cure = "make a new module of the same sizes, and load the state_dict of this one"
    for name in ("num_heads", "num_blocks", "gate_style"):
        with pytest.raises(ValueError, match=f"must have the original's attribute '{name}'.*{cure}"):
            _as_ours(_original("l0sg"), l0sg.RelationalMemory, **{name: ...})
    with pytest.raises(ValueError, match=f"must have the original's attribute 'num_slots'.*{cure}"):
        _as_ours(_original("r2gen"), r2gen.RelationalMemory, num_slots=...)
    model = originals.LanguageModel(3, 4, 5, 9)
    unknown = (
        r"missing: \[\], unknown: \['dropout', 'embed_to_logit_decoder', 'output_to_embed_decoder', 'token_to_input_enc"
    )
    with pytest.raises(ValueError, match=unknown):
        _as_ours(model, l0sg.RelationalMemory)
    fork = _original("r2gen")
    fork.norm = nn.LayerNorm(8)
    with pytest.raises(ValueError, match=r"unknown: \['norm'\]. Another class was saved.*compat.r2gen.from_module"):
        _as_ours(fork, r2gen.RelationalMemory)
    fork = _original("l0sg")
    del fork.attended_memory_layernorm2, fork.input_bias
    with pytest.raises(ValueError, match=r"missing: \['attended_memory_layernorm2', 'input_bias'\], unknown: \[\]"):
        _as_ours(fork, l0sg.RelationalMemory)


def test_a_fork_of_other_shapes_is_refused_when_called() -> None:
    fork = _original("l0sg")
    fork.qkv_layernorm = nn.LayerNorm(24)
    loaded = _as_ours(fork, l0sg.RelationalMemory)
    with pytest.raises(ValueError, match=r"qkv_layernorm.weight must be of shape \(4, 24\)"):
        loaded(*_arguments("l0sg"))


def test_a_subclass_takes_what_it_adds() -> None:
    """The language model, made a subclass of the drop-in: its own methods are honoured."""

    class Model(l0sg.RelationalMemory):
        token_to_input_encoder: nn.Embedding
        output_to_embed_decoder: nn.Linear
        embed_to_logit_decoder: nn.Linear

        def forward_step(self, inputs: Tensor, memory: Tensor, treat_input_as_matrix: bool = False) -> Any:
            output, memory = super().forward_step(self.token_to_input_encoder(inputs), memory)
            return self.embed_to_logit_decoder(self.output_to_embed_decoder(output)), memory

    original = originals.LanguageModel(3, 4, 5, 9).eval()
    loaded = _as_ours(original, Model)
    tokens = torch.randint(9, (2, 4))
    with pytest.warns(RuntimeWarning, match="the method forward_step is overridden"):
        logits, _ = loaded(tokens, loaded.initial_state(2))
    core = l0sg.RelationalMemory(3, 4, 5)
    core.load_state_dict({key: value for key, value in original.state_dict().items() if key in core.state_dict()})
    last, _ = core(original.token_to_input_encoder(tokens), core.initial_state(2))
    torch.testing.assert_close(logits, original.embed_to_logit_decoder(original.output_to_embed_decoder(last)))


@EVERY
def test_pickles_of_older_versions(name: str) -> None:
    """They had a spec, and fewer attributes; R2Gen's attention had neither sizes nor weights, and another name."""
    model = MODULES[name][0].RelationalMemory(*SIZES[name], backend="reference").eval()
    later = ("_told", "mem_slots_plus_input", "value_size", "qkv_size", "total_qkv_size", "num_gates")
    state = {key: value for key, value in vars(copy.deepcopy(model)).items() if key not in later}
    if name == "r2gen":
        for key in ("h", "d_k", "attn"):
            del vars(state["_modules"]["attn"])[key]
    old: Any = object.__new__(type(model))
    old.__setstate__(state)
    assert old.backend == "reference"
    _same(old, model, name)
    assert vars(old).keys() == vars(model).keys()
    assert r2gen._Attention is r2gen.MultiHeadedAttention


# -- Living modules -----------------------------------------------------------------------------------------------


LIVING = [
    pytest.param(
        name, options, marks=pytest.mark.feature("compat: from_module, compared with the original", variant=variant)
    )
    for name, variant, options in (
        ("l0sg", "l0sg", {}), ("l0sg", "l0sg", {"gate_style": None, "num_blocks": 2}),
        ("l0sg", "l0sg", {"gate_style": "memory", "key_size": 3}),
        ("l0sg", "l0sg", {"attention_mlp_layers": 3, "return_all_outputs": True}),
        ("textgan", "l0sg", {"return_all_outputs": True}), ("textgan", "l0sg", {}), ("r2gen", "r2gen", {}),
    )
]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name, options", LIVING)
def test_from_module(
    name: str, options: Any, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", CpuBackend(test_double=True))
    original = _original(name, **options).to(dtype)
    original.requires_grad_(False)
    next(original.parameters()).requires_grad_()
    inner = original.attn.dropout if name == "r2gen" else original.qkv_layernorm
    inner.train(False)
    if name == "r2gen":
        inner.p = 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        made = MODULES[name][0].from_module(original, backend=backend)
    assert type(made) is MODULES[name][0].RelationalMemory
    assert made.backend == backend
    theirs, ours = dict(original.named_parameters()), dict(made.named_parameters())
    assert [*ours] == [*theirs]
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
        assert (ours[key].dtype, ours[key].requires_grad) == (value.dtype, value.requires_grad), key
        assert not value.numel() or ours[key].data_ptr() != value.data_ptr(), key
    assert {path: part.training for path, part in made.named_modules()} == {
        path: part.training for path, part in original.named_modules()
    }
    if name == "r2gen":
        assert made.attn.dropout.p == made.spec.dropout == 0.25
    x, memory = _arguments(name, dtype)
    original.eval()
    found, expected = made.eval()(x, memory), original(x, memory.to(dtype))
    for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, expected)), strict=True):
        assert one.shape == other.shape
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@EVERY
def test_from_module_leaves_the_original_alone(name: str) -> None:
    original = _original(name).train()
    fired: list[object] = []
    found = original(*_arguments(name))  # R2Gen keeps attention weights, with a history
    (found if name == "r2gen" else found[0]).sum().backward()
    for part in original.modules():
        part.register_forward_hook(lambda *_: fired.append(0))
        part.register_forward_pre_hook(lambda *_: fired.append(0))
    original.register_buffer("steps", torch.zeros(1))
    before = {key: value.clone() for key, value in original.state_dict().items()}
    gradients = [None if value.grad is None else value.grad.clone() for value in original.parameters()]
    states = {path: (part.training, dict(vars(part))) for path, part in original.named_modules()}
    random = torch.get_rng_state()
    with pytest.warns(RuntimeWarning, match="leaves behind steps, .*the hooks of the module itself") as caught:
        made = MODULES[name][0].from_module(original)
    assert len(caught) == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert not fired
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
    for value, gradient in zip(original.parameters(), gradients, strict=True):
        assert (value.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(value.grad, gradient)
    for path, part in original.named_modules():
        assert part.training == states[path][0]
        assert vars(part).keys() == states[path][1].keys()
        assert all(value is states[path][1][key] for key, value in vars(part).items())
    assert all(value.grad is None for value in made.parameters())
    assert not made._forward_hooks
    with torch.no_grad():
        for value in made.parameters():
            value.zero_()
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


class FewerReLUs(originals.L0SG):
    def attend_over_memory(self, memory: Tensor) -> Tensor:
        memory = self.attended_memory_layernorm(memory + self.multihead_attention(memory))
        rows = self.attention_mlp[1](self.attention_mlp[0](memory).relu())
        return self.attended_memory_layernorm2(memory + rows)  # type: ignore[no-any-return]


class MlpTwice(originals.R2Gen):
    def forward_step(self, input: Tensor, memory: Tensor) -> Tensor:
        mlp = self.mlp
        self._modules["mlp"] = nn.Sequential(mlp, mlp)
        try:
            return super().forward_step(input, memory)
        finally:
            self._modules["mlp"] = mlp


class OtherScale(originals.TextGAN):
    def multihead_attention(self, memory: Tensor) -> Tensor:
        size = self.key_size
        rows = self.qkv_layernorm(self.qkv_projector(memory)).unflatten(-1, (self.num_heads, self.qkv_size))
        q, k, v = rows.transpose(1, 2).split([size, size, self.value_size], -1)
        attended: Tensor = (q @ k.mT / self.qkv_size**0.5).softmax(-1) @ v
        return attended.transpose(1, 2).flatten(2)


class ZeroMemory(originals.R2Gen):
    def init_memory(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, self.num_slots, self.d_model)


class LastOnly(originals.R2Gen):
    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        return super().forward(inputs, memory)[:, -1]


class SwappedGates(originals.L0SG):
    def create_gates(self, inputs: Tensor, memory: Tensor) -> Any:
        return super().create_gates(inputs, memory)[::-1]


class Unstable(originals.L0SG):
    def forward_step(self, inputs: Tensor, memory: Tensor, treat_input_as_matrix: bool = False) -> Any:
        output, memory = super().forward_step(inputs, memory)
        return output / 0, memory


@pytest.mark.parametrize("kind", [FewerReLUs, MlpTwice, OtherScale, ZeroMemory, SwappedGates, Unstable])
def test_from_module_refuses_what_computes_something_else(kind: type[nn.Module]) -> None:
    name = next(name for name, (_, base) in reversed(MODULES.items()) if issubclass(kind, base))
    original = kind(*SIZES[name])
    method = "init_memory" if kind is ZeroMemory else "forward"
    what = rf"what rmc_kernels\.compat\.{name}\.RelationalMemory computes, but {method}.* differs by (\d|inf)"
    with pytest.raises(ValueError, match=f"original must compute {what}"):
        MODULES[name][0].from_module(original)


@pytest.mark.parametrize("eps", [1e-6, 1.1e-5])
@pytest.mark.parametrize("norm", ["qkv_layernorm", "attended_memory_layernorm", "attended_memory_layernorm2"])
def test_from_module_sees_another_eps(norm: str, eps: float) -> None:
    original = _original("l0sg")
    original.get_submodule(norm).eps = eps
    with pytest.raises(ValueError, match=r"differs by \d\.?\d*e-0[5-8] \(in float64"):
        l0sg.from_module(original)


def test_from_module_refuses_other_contents() -> None:
    untied = _original("l0sg")
    untied.attention_mlp[1] = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"'attention_mlp\.0\.weight' and 'attention_mlp\.1\.weight'"):
        l0sg.from_module(untied)
    biasless = _original("r2gen")
    biasless.W = nn.Linear(8, 16, bias=False)
    with pytest.raises(ValueError, match=r"original\.W\.bias must be a tensor of shape \(16,\), got None"):
        r2gen.from_module(biasless)
    rows = _original("l0sg")
    rows.qkv_layernorm = nn.LayerNorm(24)
    with pytest.raises(ValueError, match=r"original\.qkv_layernorm\.weight must be a tensor of shape \(4, 24\), got"):
        l0sg.from_module(rows)
    activated = _original("r2gen")
    activated.mlp[1] = nn.GELU()
    with pytest.raises(ValueError, match="differs by"):
        r2gen.from_module(activated)
    longer = _original("l0sg")
    longer.attention_mlp.append(longer.attention_mlp[0])
    with pytest.warns(RuntimeWarning, match=r"attention_mlp\.2"), pytest.raises(ValueError, match="differs by"):
        l0sg.from_module(longer)
    with pytest.raises(ValueError, match=r"forward must return tensors of shapes \[\(2, 24\), .*got \[\(2, 1, 24\)"):
        l0sg.from_module(_original("textgan"))
    with pytest.raises(
        ValueError, match=r"forward must return tensors of shapes \[\(2, 3, 24\)\], .*got \[\(2, 24\)\]"
    ):
        r2gen.from_module(LastOnly(3, 8, 2))
    raised = pytest.raises(ValueError, match=r"original\.forward must run as in the original's class, it raised")
    with pytest.warns(RuntimeWarning, match="leaves behind dropout"), raised:
        l0sg.from_module(originals.LanguageModel(3, 4, 5, 9))
    with pytest.raises(ValueError, match="Linear must have the original's attribute 'num_heads'"):
        l0sg.from_module(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must have the original's attribute 'attn'"):
        r2gen.from_module(_original("l0sg"))
    with pytest.raises(TypeError, match="original must be a module"):
        r2gen.from_module(r2gen.RelationalMemory)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend"):
        r2gen.from_module(_original("r2gen"), backend="gpu")
    with pytest.raises(ValueError, match=r"original\..*must be a tensor of shape .* on meta"):
        l0sg.from_module(_original("l0sg").to("meta"))


@pytest.mark.filterwarnings("ignore")
def test_from_module_refuses_quantised_modules() -> None:
    from torch.ao.quantization import quantize_dynamic

    with pytest.raises(ValueError, match=r"quantised modules are not supported: original\.attn\.linears\.0 is a torch"):
        r2gen.from_module(quantize_dynamic(_original("r2gen")))


class Derived(originals.R2Gen):
    """As its base, written otherwise; with dropout on its input in training."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.noise = nn.Dropout(0.5)

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        return super().forward(self.noise(inputs), memory)


def test_from_module_of_a_derived_class() -> None:
    original = Derived(3, 8, 2)
    with pytest.warns(RuntimeWarning) as caught:
        made = r2gen.from_module(original)
    messages = [str(each.message) for each in caught]
    assert messages[0] == "from_module leaves behind noise (a torch.nn.Dropout)"
    assert "in training forward differs by" in messages[1]
    _same(made.eval(), original.eval(), "r2gen")


@EVERY
def test_from_module_takes_weights_as_they_are_computed(name: str) -> None:
    original = _original(name).eval()
    path = "W" if name == "r2gen" else "qkv_projector"
    prune.random_unstructured(original.get_submodule(path), "weight", 0.5)
    parametrizations.weight_norm(original.get_submodule("mlp.0" if name == "r2gen" else "input_projector"))
    with pytest.warns(RuntimeWarning, match=f"leaves behind .*{path}.weight_mask, {path}.weight_orig"):
        made = MODULES[name][0].from_module(original)
    _same(made, original, name)
    assert [*made.state_dict()] == [*MODULES[name][0].RelationalMemory(*SIZES[name]).state_dict()]


@EVERY
def test_from_module_of_a_drop_in(name: str) -> None:
    """Adapters that change something are seen; merged ones are weights."""
    model = MODULES[name][0].RelationalMemory(*SIZES[name])
    _same(MODULES[name][0].from_module(model).eval(), model.eval(), name)
    path = "W" if name == "r2gen" else "qkv_projector"
    model.get_submodule(path).register_forward_hook(lambda _module, _args, output: 2 * output)
    with pytest.warns(RuntimeWarning, match=f"leaves behind the hooks of {path}"):
        MODULES[name][0].from_module(model)


# -- Checkpoints --------------------------------------------------------------------------------------------------


def _untied() -> dict[str, Tensor]:
    found: dict[str, Tensor] = _original("l0sg").state_dict()
    found["attention_mlp.1.weight"] = found["attention_mlp.1.weight"] + 1
    return found


def test_untied_aliases_are_refused() -> None:
    layer = RelationalMemory.from_spec(CellSpec.l0sg(3, 4, 5, 2))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    good = _original("l0sg").state_dict()
    l0sg.load_variables(layer, good)
    l0sg.load_variables(layer, {key: value for key, value in good.items() if "mlp.1" not in key})
    after = {key: value.clone() for key, value in layer.state_dict().items()}
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    both = r"'attention_mlp\.0\.weight' and 'attention_mlp\.1\.weight'"
    for wrong in (_untied(), {**good, "attention_mlp.1.weight": np.zeros((4, 8))}):
        with pytest.raises(ValueError, match=f"variables must hold the same values under {both}"):
            l0sg.load_variables(layer, wrong)
    with pytest.raises(ValueError, match=r"'core\.attention_mlp\.0\.bias' and 'core\.attention_mlp\.1\.bias'"):
        l0sg.load_variables(
            layer,
            {f"core.{key}": value + (key == "attention_mlp.1.bias") for key, value in good.items()},
            prefix="core.",
        )
    assert all(torch.equal(value, after[key]) for key, value in layer.state_dict().items())
    infinite = {key: torch.full_like(value, torch.nan) for key, value in good.items()}
    l0sg.load_variables(layer, infinite)


@pytest.mark.parametrize("kind", [l0sg.RelationalMemory, textgan.RelationalMemory])
@pytest.mark.parametrize("strict", [True, False])
def test_untied_aliases_are_refused_by_load_state_dict(kind: type[nn.Module], strict: bool) -> None:
    model = kind(*SIZES["l0sg"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    both = r"'attention_mlp\.0\.weight' and 'attention_mlp\.1\.weight'"
    with pytest.raises(ValueError, match=f"state_dict must hold the same values under {both}"):
        model.load_state_dict(_untied(), strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    whole = nn.Sequential(nn.Linear(2, 2), model)
    checkpoint = {**whole[0].state_dict(prefix="0."), **{f"1.{key}": value for key, value in _untied().items()}}
    with pytest.raises(ValueError, match=r"'1\.attention_mlp\.0\.weight' and '1\.attention_mlp\.1\.weight'"):
        whole.load_state_dict(checkpoint, strict=strict)
    with pytest.raises(ValueError, match=both):
        model.load_state_dict(_untied(), strict=strict, assign=True)
    good = _original("l0sg").state_dict()
    assert model.load_state_dict(good).missing_keys == []
    model.load_state_dict({key: torch.full_like(value, torch.nan) for key, value in good.items()})
    with torch.device("meta"):
        empty = kind(*SIZES["l0sg"])
    empty.load_state_dict(good, assign=True)
    assert torch.equal(empty.get_parameter("attention_mlp.1.weight"), good["attention_mlp.0.weight"])


def test_an_untied_drop_in_loads_untied_weights() -> None:
    model = l0sg.RelationalMemory(*SIZES["l0sg"])
    model.attention_mlp = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    model.load_state_dict(_untied())
    fork = _original("l0sg")
    fork.attention_mlp = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    fork.load_state_dict(_untied())
    with pytest.warns(RuntimeWarning, match=r"attention_mlp\.1 is not attention_mlp\.0"):
        _same(model, fork, "l0sg")


PREFIXES = {
    "l0sg": (l0sg, CellSpec.l0sg(3, 4, 5, 2), "encoder.core."),
    "r2gen": (r2gen, CellSpec.r2gen(*SIZES["r2gen"]), "encoder_decoder.model.rm."),
    "sonnet": (sonnet, CellSpec.sonnet(5, 3, 4, 2), "agent/"),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_prefixes(name: str) -> None:
    module, spec, prefix = PREFIXES[name]
    source, layer = RelationalMemory.from_spec(spec), RelationalMemory.from_spec(spec)
    own = module.export_variables(source)
    other = module.export_variables(RelationalMemory.from_spec(spec))
    larger: dict[Any, Any] = {f"{prefix}{key}": value for key, value in own.items()}
    larger |= {f"other.{prefix}{key}": value for key, value in other.items()}
    larger |= {"head.weight": np.zeros((2, 2)), 7: np.zeros(1), prefix[:-1]: np.zeros(1)}
    module.load_variables(layer, larger, prefix=prefix)
    for key, value in source.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value)
    for wrong in ("", "nothing.", prefix[:-1]):
        tops = [f"{top}{prefix}" + "relational_memory/" * (name == "sonnet") for top in ("", "other.")]
        candidates = f"they are under {tops[0]!r} and {tops[1]!r}: pass that as prefix"
        with pytest.raises(ValueError, match=f"got prefix={wrong!r}, but {candidates}"):
            module.load_variables(layer, larger, prefix=wrong)
    partly = {key: value for key, value in larger.items() if "other" not in str(key)} | {f"{prefix}extra": np.zeros(1)}
    with pytest.raises(ValueError, match=r"missing: \[.*\], unknown: \['extra'\] \(under prefix '"):
        module.load_variables(layer, partly, prefix=prefix)
    with pytest.raises(TypeError, match="prefix must be a str, got None"):
        module.load_variables(layer, larger, prefix=None)
    name = next(iter(own))
    with pytest.raises(ValueError, match=rf"variables\['{prefix}.*'\] must be of shape"):
        module.load_variables(layer, {**larger, prefix + name: np.zeros((1, 1))}, prefix=prefix)
    for key, value in source.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value)


def test_a_sonnet_module_of_another_name() -> None:
    """Its full name takes the place of `relational_memory/`, as `scope` does when a file is read."""
    spec = PREFIXES["sonnet"][1]
    source, layer = RelationalMemory.from_spec(spec), RelationalMemory.from_spec(spec)
    found = {
        key.replace("relational_memory/", "agent/rmc/"): value for key, value in sonnet.export_variables(source).items()
    }
    sonnet.load_variables(layer, found, prefix="agent/rmc/")
    for key, value in source.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value)
    with pytest.raises(ValueError, match="they are under 'agent/rmc/'"):
        sonnet.load_variables(layer, found)


def test_pickles_of_attention_keep_no_weights() -> None:
    attention = r2gen.MultiHeadedAttention(2, 8)
    rows = torch.randn(2, 3, 8)
    attention(rows, rows, rows)
    assert attention.attn is not None
    assert pickle.loads(pickle.dumps(attention)).attn is None
