"""Models around the layer under torch.compile, torch.export and ONNX."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def test_a_fused_backend_is_no_onnx() -> None:
    """Why `backend="reference"`: an exported kernel is an operator that ONNX does not know."""
    program = torch.export.export(RelationalMemory(8, 3, 4, backend="cpu").eval(), (inputs(),))
    names = {str(node.target) for node in program.graph.nodes}
    assert "rmc_kernels.unroll_forward.default" in names
