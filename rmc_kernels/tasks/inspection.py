"""`rmc inspect`: who attends to whom in a trained memory, step by step, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

from rmc_kernels.layers import RelationalMemory
from rmc_kernels.tasks.exits import REFUSALS, one_line
from rmc_kernels.tasks.models import SequenceModel
from rmc_kernels.tasks.plots import write_figure
from rmc_kernels.tasks.registry import trained
from rmc_kernels.tasks.task import Batch, Task


@torch.no_grad()
def attention(model: SequenceModel, inputs: Tensor) -> Tensor:
    """Attention weights [T, blocks, H, N, S] of an RMC for one sequence, a batch of 1.

    Raises:
        ValueError: the model's core is no RMC.
    """
    layer = model.core.layer if hasattr(model.core, "layer") else None
    if not isinstance(layer, RelationalMemory):
        raise ValueError("checkpoint must be of an RMC, got another model: only its slots attend to each other")
    _, _, weights = layer(model.encoder(inputs), return_attention=True)
    return weights[0]  # type: ignore[no-any-return]


@torch.no_grad()
def answers(task: Task, model: SequenceModel, batch: Batch) -> tuple[str, str]:
    """What a model answers after the last step of one sequence, and what is right, in words."""
    features, _ = model.features(batch.inputs)
    classes = int(model.head.best(features[:, -1])), int(batch.targets[0, -1])
    given, right = (repr(task.vocabulary[c])[1:-1] if task.vocabulary else str(c) for c in classes)
    return given, right


def draw(weights: Tensor, captions: list[str], title: str, path: Path) -> Path:
    """A heat map for each head (of the last block) and step; row: the slot that looks, column: what it looks at."""
    shown = weights[:, -1]
    steps, heads, slots, rows = shown.shape
    figure = Figure(figsize=(1.5 + 1.35 * steps, 1.5 + 1.2 * heads), layout="constrained")
    grid = figure.subplots(heads, steps, squeeze=False)
    image = None
    for head in range(heads):
        for step in range(steps):
            axes = grid[head][step]
            image = axes.imshow(shown[step, head].numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axes.set_xticks(range(rows), [*map(str, range(slots)), *["in"] * (rows - slots)], fontsize=6)
            axes.set_yticks(range(slots), map(str, range(slots)), fontsize=6)
            if head == 0:
                axes.set_title(captions[step], fontsize=7)
        grid[head][0].set_ylabel(f"head {head}", fontsize=8)
    figure.suptitle(f"{title}\nrow: the slot that looks; column: the slot, or the input, that it looks at", fontsize=9)
    assert image is not None
    figure.colorbar(image, ax=grid.ravel().tolist(), label="attention", shrink=0.8)
    return write_figure(figure, path, dpi=110)


def example(task: Task, number: int) -> Batch:
    """The held-out sequence `number` of the task's first part, without padding behind its last answer."""
    batch = next(iter(task.held_out(number + 1, 100 * (number + 1)).values()))[0]
    if number >= len(batch.inputs):
        raise ValueError(f"example must be a number below {len(batch.inputs)} here, got {number}")
    row = batch.rows(number, number + 1)
    asked = (row.targets[0] >= 0).nonzero()
    length = int(asked[-1]) + 1
    return Batch(row.inputs[:, :length], row.targets[:, :length])


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="File that `rmc train` left.")],
    number: Annotated[int, typer.Option("--example", min=0, help="Which held-out sequence.")] = 0,
    last: Annotated[int, typer.Option(min=1, help="Steps to draw, the last ones of the sequence.")] = 10,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("attention.png"),
) -> None:
    """Draw the attention between the slots of a trained RMC over the steps of a held-out sequence."""
    with one_line(*REFUSALS):
        task, model, loaded = trained(checkpoint)
        batch = example(task, number)
        weights = attention(model, batch.inputs)
        given, right = answers(task, model, batch)
        captions = [_wrapped(caption) for caption in task.captions(batch, 0)]
        title = f"{task.title}, after {loaded['update']:,} updates\nit answers {given}, right is {right}"
        draw(weights[-last:], captions[-last:], title, out)
    typer.echo(f"wrote {out}")


def _wrapped(caption: str, width: int = 18) -> str:
    """A caption broken between words; a dollar is no mathematics."""
    lines = [""]
    for word in caption.replace("$", r"\$").split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
