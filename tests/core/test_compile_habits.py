"""Models around the layer under torch.compile, torch.export and ONNX."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from rmc_kernels import RelationalMemory, RelationalMemoryCell
from rmc_kernels.compat import l0sg, r2gen, textgan
from tests.habits import (
    BATCH,
    EVERY_VARIANT,
    EVERY_VARIANT_DEAR,
    SPECS,
    close,
    close_gradients,
    gradients,
    inputs,
    layer,
)


@pytest.fixture
def compiled_once() -> Iterator[None]:
    """A second compilation raises, and with fullgraph=True so does a second graph."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


class Model(nn.Module):
    """What users build: an embedding, the core, a readout."""

    def __init__(self, core: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.core = core
        self.readout = nn.Linear(width, 11)

    def forward(self, tokens: Tensor, lengths: Tensor, resets: Tensor) -> tuple[Tensor, Tensor]:
        output, memory = self.core(self.embedding(tokens), lengths=lengths, resets=resets)
        return self.readout(output), memory


def _batch(batch: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * steps)
    tokens = torch.randint(0, 11, (batch, steps), generator=generator)
    lengths = torch.randint(0, steps + 1, (batch,), generator=generator)
    return tokens, lengths, torch.rand(batch, steps, generator=generator) < 0.3


@pytest.mark.feature("torch.compile(fullgraph=True) of a model, other B and T without recompiling", backend="cpu")
@EVERY_VARIANT_DEAR
def test_compiled_models(variant: str, compiled_once: None) -> None:
    """Values and gradients of every size are the eager ones."""
    core = layer(variant, "cpu")
    model = Model(core, core.output_size)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in ((4, 6), (2, 6), (4, 9), (7, 3), (32, 3)):  # the last runs on AMX tiles where there are any
        results = []
        for run in (compiled, model):
            logits, memory = run(*_batch(batch, steps))
            (logits.square().sum() + memory.sum()).backward()
            results.append((logits, memory, gradients(model)))
        close(results[0][0], results[1][0])
        close(results[0][1], results[1][1])
        close_gradients(results[0][2], results[1][2])


@pytest.mark.parametrize("name", ["l0sg", "textgan", "r2gen"])
def test_compiled_drop_ins(name: str, compiled_once: None) -> None:
    """With the original's habit of asking for the initial memory inside the model."""

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core: Any = {
                "l0sg": l0sg.RelationalMemory(3, 4, 8, 2, return_all_outputs=True),
                "textgan": textgan.RelationalMemory(3, 4, 8, 2, return_all_outputs=True),
                "r2gen": r2gen.RelationalMemory(3, 8, 2).eval(),
            }[name]

        def forward(self, x: Tensor) -> Any:
            if name == "r2gen":
                return self.core(x, self.core.init_memory(x.size(0)))
            return self.core(x, self.core.initial_state(x.size(0)))[0]

    model = Caller()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in ((4, 6), (3, 5), (2, 9)):
        x = inputs(batch, steps, 8)
        close(compiled(x), model(x))


@pytest.mark.slow
def test_compiled_by_inductor(compiled_once: None) -> None:
    """The default compiler generates code around the operators."""
    core = layer("sonnet", "cpu")
    model = Model(core, core.output_size)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch, steps in ((4, 6), (2, 9)):
        results = []
        for run in (compiled, model):
            logits, _ = run(*_batch(batch, steps))
            logits.square().sum().backward()
            results.append((logits, gradients(model)))
        close(results[0][0], results[1][0])
        close_gradients(results[0][1], results[1][1])


@pytest.mark.feature("torch.export of a sequence, any B and T, saved and loaded", backend="cpu")
@EVERY_VARIANT_DEAR
def test_exported_sequences(variant: str) -> None:
    made = layer(variant, "cpu").eval()
    sizes = {0: torch.export.Dim("B", min=2), 1: torch.export.Dim("T", min=2)}
    program = torch.export.export(made, (inputs(), inputs(BATCH, 3, 8)), dynamic_shapes=(sizes, {0: sizes[0]}))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    for batch, steps in ((4, 6), (3, 2), (7, 11)):
        x, memory = inputs(batch, steps, 8), inputs(batch, 3, 8, seed=2)
        for ours, theirs in zip(loaded(x, memory), made(x, memory), strict=True):
            close(ours, theirs)


@pytest.mark.feature("torch.export of a step, any B", backend="cpu")
@EVERY_VARIANT
def test_exported_steps(variant: str) -> None:
    cell = RelationalMemoryCell.from_spec(SPECS[variant], backend="cpu").eval()
    batch = {0: torch.export.Dim("B", min=2)}
    program = torch.export.export(cell, (inputs(4, 8), inputs(4, 3, 8)), dynamic_shapes=(batch, batch)).module()
    for size in (4, 9):
        x, memory = inputs(size, 8), inputs(size, 3, 8, seed=2)
        for ours, theirs in zip(program(x, memory), cell(x, memory), strict=True):
            close(ours, theirs)


@pytest.mark.feature("ONNX export of a step, in onnxruntime", backend="reference")
@EVERY_VARIANT_DEAR
def test_onnx_steps(variant: str, tmp_path: Path) -> None:
    """Five steps by onnxruntime, memory carried, against one call of the layer."""
    pytest.importorskip("onnxscript", reason="needs onnxscript to export")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime to run what was exported")
    made = layer(variant, "auto")
    cell = RelationalMemoryCell.from_spec(SPECS[variant], backend="reference").eval()
    cell.load_state_dict(made.state_dict())
    path = tmp_path / "step.onnx"
    batch = {0: torch.export.Dim("B", min=2)}
    arguments = (inputs(4, 8), inputs(4, 3, 8))
    torch.onnx.export(
        cell, arguments, path, input_names=["x", "memory"], output_names=["output", "next"], verbose=False,
        dynamo=True, dynamic_shapes=(batch, batch),
    )  # fmt: skip
    session = runtime.InferenceSession(path)
    x, carried = inputs(3, 5, 8), inputs(3, 3, 8, seed=2)
    output, final = made(x, carried)
    memory = carried.numpy()
    for t in range(5):
        step, memory = session.run(None, {"x": x[:, t].numpy(), "memory": memory})
        close(torch.from_numpy(step), output[:, t].detach())
    close(torch.from_numpy(memory), final.detach())


class Steps(nn.Module):
    """A layer and a cell inside a model, called as users call them."""

    def __init__(self, variant: str, backend: str) -> None:
        super().__init__()
        self.part = nn.ModuleDict({"core": layer(variant, backend)})
        self.cell = RelationalMemoryCell.from_spec(SPECS[variant], backend=backend)
        self.readout = nn.Linear(24, 2)

    def forward(self, x: Tensor, lengths: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        output, _ = self.part["core"](x, lengths=lengths, memory=memory)
        _, memory = self.part["core"](2 * x, memory)
        step, memory = self.cell(x[:, 0] - x[:, 1], memory)
        return self.readout(output.relu()) + self.readout(step)[:, None], memory


@pytest.fixture
def steps_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return inputs(), torch.tensor([6, 0, 3, 4]), inputs(BATCH, 3, 8, seed=2)


@pytest.mark.parametrize("kind", ["model", "layer", "cell"])
@pytest.mark.parametrize("dynamo", [False, True], ids=["older", "dynamo"])
@pytest.mark.parametrize("backend", ["cpu", "auto"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_export_of_a_fused_backend_names_the_reference(
    kind: str, dynamo: bool, backend: str, steps_inputs: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    """An exported kernel is an operator that ONNX does not know."""
    if dynamo:
        pytest.importorskip("onnxscript", reason="needs onnxscript to export")
    model = Steps("sonnet", backend).eval()
    module, arguments = {
        "model": (model, steps_inputs),
        "layer": (model.part["core"], steps_inputs[:1]),
        "cell": (model.cell, (inputs(4, 8), steps_inputs[2])),
    }[kind]
    with pytest.raises(Exception, match='backend="reference"'):
        torch.onnx.export(module, arguments, tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    module(*arguments)  # nothing of it stays


@pytest.mark.filterwarnings("ignore")
def test_onnx_export_of_a_program_with_kernels_names_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript to export")
    program = torch.export.export(RelationalMemory(8, 3, 4, backend="cpu").eval(), (inputs(),))
    assert "rmc_kernels.unroll_forward.default" in {str(node.target) for node in program.graph.nodes}
    with pytest.raises(Exception, match='backend="reference"'):
        torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, verbose=False)


@pytest.mark.feature("torch.fx.symbolic_trace of a model: a leaf, as nn.LSTM is; the graph pickled and copied")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@EVERY_VARIANT
def test_a_leaf_of_torch_fx(variant: str, backend: str, steps_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    model = Steps(variant, backend)
    traced = torch.fx.symbolic_trace(model)
    traced.graph.lint()
    for node in traced.graph.nodes:
        node.type = None  # the annotations of this file are text, which torch.fx cannot pickle
    traced.recompile()
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["part.core", "part.core", "cell", "readout", "readout"]
    expected, final = model(*steps_inputs)
    expected.square().sum().backward()
    wanted = gradients(model)
    again = torch.fx.symbolic_trace(traced)
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), again):
        output, memory = graph(*steps_inputs)
        assert torch.equal(output, expected)
        assert torch.equal(memory, final)
        output.square().sum().backward()
        close_gradients(gradients(graph), wanted)
    interpreted = torch.fx.Interpreter(traced).run(*steps_inputs)
    assert torch.equal(interpreted[0], expected)


def test_a_leaf_holds_its_hooks_and_what_a_subclass_adds() -> None:
    """Both would count twice, were they traced beside the leaf."""

    class Doubled(RelationalMemory):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            output, memory = super().forward(x)
            return 2 * output, memory

    doubled = Doubled(8, 3, 4, 2)
    doubled.register_forward_hook(lambda module, args, result: (result[0] + 1, result[1]))
    doubled.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model = nn.Sequential(nn.Linear(8, 8), doubled)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert torch.equal(traced(inputs())[0], model(inputs())[0])
    plain = layer("sonnet", "auto")
    plain.load_state_dict(doubled.state_dict())
    close(traced(inputs())[0], 2 * plain(3 * model[0](inputs()))[0] + 1)


def test_a_tracer_that_knows_leaves_itself() -> None:
    seen = []

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            seen.append(module_qualified_name)
            return isinstance(m, (RelationalMemory, nn.Linear))

    model = Steps("sonnet", "auto")
    graph = Leaves().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"].count("part.core") == 2
    assert seen == ["part.core", "part.core", "cell", "readout", "readout"]


@pytest.mark.parametrize("made", [RelationalMemory(8, 3, 4), RelationalMemoryCell(8, 3, 4)], ids=["layer", "cell"])
def test_the_leaf_itself_is_not_traced(made: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"must be .*, got a Proxy of torch\.fx, .* trace a module that holds the"):
        torch.fx.symbolic_trace(made)
    outside = torch.fx.Proxy(torch.fx.Graph().placeholder("x"))  # whose tracer has no modules
    with pytest.raises(TypeError, match=r"x must be .*, got a Proxy of torch\.fx"):
        made(outside)


@pytest.mark.parametrize("fullgraph", [False, True], ids=["graphs", "fullgraph"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hx": torch.zeros(3, 2, 8)}, "has no argument 'hx'; pass memory, one tensor"),
        ({"mask": torch.ones(3, 5)}, "has no argument 'mask'; pass lengths, "),
        ({"memory": (torch.zeros(3, 2, 8), torch.zeros(3, 2, 8))}, "memory must be one tensor"),
        ({"lengths": [1, 2, 9]}, "lengths must be from 0 to T = 5, got one above"),
    ],
)
def test_compiled_calls_name_the_argument_and_the_cure(arguments: dict[str, Any], said: str, fullgraph: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(RelationalMemory(8, 2, 4, 2), backend="eager", fullgraph=fullgraph)
    wrong = torch._dynamo.exc.Unsupported if fullgraph else (TypeError, ValueError)
    with pytest.raises(wrong, match=re.escape(said)):
        compiled(inputs(3, 5, 8), **arguments)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_compiled_lengths_may_be_an_array(dtype: str, compiled_once: None) -> None:
    core, x = RelationalMemory(8, 2, 4, 2), inputs(3, 5, 8)
    compiled = torch.compile(core, backend="eager", fullgraph=True)
    for values in ([1, 0, 5], [2, 3, 4]):  # the values are no constants of the graph
        lengths = np.array(values, dtype=dtype)
        for ours, theirs in zip(compiled(x, lengths=lengths), core(x, lengths=lengths), strict=True):
            close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripting_names_what_works() -> None:
    model = Steps("sonnet", "auto")
    before = dict(model.named_modules())
    for module in (model, model.part["core"], model.cell, nn.Sequential(nn.Linear(8, 8), model.cell)):
        with pytest.raises(
            TypeError, match=r"cannot compile RelationalMemory.*; use torch\.compile, torch\.export\.export, or"
        ):
            torch.jit.script(module)
    assert dict(model.named_modules()) == before


@pytest.mark.feature("torch.jit.trace of a model under torch.no_grad, other B and T, saved and loaded", backend="cpu")
@EVERY_VARIANT
@pytest.mark.filterwarnings("ignore")  # torch warns of each shape that a trace takes for a constant, and of torch.jit
def test_traced_by_torch_jit(variant: str, steps_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """What `torch.jit.script` is told to be instead."""
    model = Steps(variant, "cpu").eval()
    stream = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, steps_inputs), stream)
        stream.seek(0)
        loaded = torch.jit.load(stream)
        for batch, steps in ((4, 6), (1, 2), (3, 9)):
            lengths = torch.arange(batch) % (steps + 1)
            arguments = inputs(batch, steps, 8), lengths, inputs(batch, 3, 8, seed=2)
            for ours, theirs in zip(loaded(*arguments), model(*arguments), strict=True):
                close(ours, theirs)
