"""`rmc train`: train a model on a task, and leave its curve as JSON, CSV and a plot."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console

from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.nth_farthest import NthFarthest
from rmc_kernels.tasks.plots import plot_accuracy
from rmc_kernels.tasks.presets import NTH_FARTHEST
from rmc_kernels.tasks.progress import TrainingProgress
from rmc_kernels.tasks.training import Trainer, TrainingConfig

train = typer.Typer(no_args_is_help=True)
Options = TypeVar("Options", NthFarthest, ModelConfig, TrainingConfig)


class Core(str, Enum):
    """The recurrent core of the model."""

    RMC = "rmc"
    LSTM = "lstm"


class Config(str, Enum):
    """A preset that the other options override."""

    SMALL = "small"
    PAPER = "paper"


@train.callback()
def _train() -> None:
    """Train an RMC, or an LSTM of as many parameters, on a relational task."""


@train.command("nth-farthest")
def nth_farthest(
    config: Annotated[Config, typer.Option(help="Preset for everything below.")] = Config.SMALL,
    model: Annotated[Core, typer.Option(help="An LSTM gets as many parameters as the RMC.")] = Core.RMC,
    objects: Annotated[int | None, typer.Option(help="Vectors of a sequence.")] = None,
    dims: Annotated[int | None, typer.Option(help="Coordinates of a vector.")] = None,
    slots: Annotated[int | None, typer.Option(help="Memory slots of the RMC.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads of the RMC.")] = None,
    head_size: Annotated[int | None, typer.Option(help="Units of a head.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer updates.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after so much wall time, if before --steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples of an update.")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the examples.")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, triton, cpu or reference.")] = None,
    device: Annotated[str | None, typer.Option(help="A torch device, such as cpu or cuda.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; more than 1 pay for large models only.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the JSON, CSV and plot.")] = Path("runs"),
) -> None:
    """Which vector is the n-th farthest from vector m? The paper's task, for any number and dimension of vectors."""
    torch.set_num_threads(threads)
    preset = NTH_FARTHEST[config.value]
    try:
        trainer = Trainer(
            _override(preset.task, objects=objects, dims=dims),
            _override(
                preset.model, core=model.value, slots=slots, heads=heads, head_size=head_size, backend=backend
            ),
            _override(
                preset.training, updates=steps, seconds=seconds, batch_size=batch_size, learning_rate=lr, seed=seed,
                device=device,
            ),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    name = f"nth-farthest-{model.value}-seed{trainer.config.seed}"
    _run(trainer, out, name, Console())


def _override(preset: Options, **changes: Any) -> Options:
    """The preset with the options that were given."""
    return replace(preset, **{name: value for name, value in changes.items() if value is not None})


def _run(trainer: Trainer, out: Path, name: str, console: Console) -> None:
    """Train with a progress bar, write what came of it into `out`, and tell."""
    history = trainer.history
    console.print(
        f"[bold]{history.task}[/]: {history.model['core']}, {history.parameters:,} parameters, "
        f"backend {history.backend}, seed {trainer.config.seed}"
    )
    with TrainingProgress(console) as progress:
        bar = progress.add("training", trainer.config.updates)
        trainer.run(lambda trainer: progress.show(bar, trainer.update, history.final))
    levels = ", ".join(f"{level} {accuracy:.1%}" for level, accuracy in history.levels.items())
    console.print(
        f"accuracy [bold]{history.final.accuracy:.1%}[/] ({levels}) after {history.final.update:,} updates and "
        f"{history.final.examples:,} examples in {history.final.seconds:.0f} s"
    )
    for path in [*history.write(out, name), plot_accuracy([history], out / f"{name}.png")]:
        console.print(f"wrote {path}")
