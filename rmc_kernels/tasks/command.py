"""`rmc train` and `rmc compare`: train one model on a task, or several beside one another, and leave their curves."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console

from rmc_kernels.tasks import logs, ranks
from rmc_kernels.tasks.comparison import compare, run_name, show_comparison, show_tuning
from rmc_kernels.tasks.cores import CORES, Core
from rmc_kernels.tasks.history import History
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.options import changed, with_options
from rmc_kernels.tasks.plots import plot_curves
from rmc_kernels.tasks.presets import PRESETS, Preset
from rmc_kernels.tasks.progress import TrainingProgress
from rmc_kernels.tasks.registry import TASKS
from rmc_kernels.tasks.training import Trainer, TrainingConfig

train = typer.Typer(no_args_is_help=True)
comparison = typer.Typer(no_args_is_help=True)

PresetName = Annotated[str, typer.Option("--config", help="Preset for the options: small, medium or paper.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch; more than 1 pay for large models only.")]
Out = Annotated[Path, typer.Option(help="Folder for checkpoints, JSON, CSV and plot.")]
HELP = {
    "nth-farthest": "Which vector is the n-th farthest from vector m? The paper's task, for any number and dimension.",
    "program-eval": "Learning to execute: small programs and digits to memorise, character by character.",
    "babi": "Questions about short stories: the bAbI format, or stories made up here.",
    "lm": "Language modelling of any text, by words, characters or what code is made of.",
}


@train.callback()
def _train() -> None:
    """Train an RMC, or another model of as many parameters, on a task. Under torchrun, on several processes."""


@comparison.callback()
def _compare() -> None:
    """Train models of as many parameters on one task, from several seeds each, and show how they compare."""


def _train_one(
    name: str,
    given: Mapping[str, Any],
    config: PresetName = "small",
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out, if there is one.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Log for TensorBoard too, into --out.")] = False,
    threads: Threads = 1,
    out: Out = Path("runs"),
) -> None:
    torch.set_num_threads(threads)
    console = Console()
    preset = _preset(name, config, given)
    with ranks.joined(preset.training.device) as device:
        preset = Preset(preset.task, preset.model, changed(preset.training, {"device": device}))
        run = run_name(preset.task, preset.model, preset.training)
        try:
            trainer = Trainer(preset.task, preset.model, preset.training, out / f"{run}.pt", resume)
        except (OSError, TypeError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
        trainer.history.command = shlex.join(["rmc", *sys.argv[1:]])
        if ranks.rank():
            trainer.run()
            return
        watches = [logs.files(out, run)]
        if tensorboard:
            watches.append(_tensorboard(out / run))
        _run(trainer, watches, console)
        for path in [*trainer.history.write(out, run), plot_curves([trainer.history], out / f"{run}.png")]:
            console.print(f"wrote {path}", soft_wrap=True)


def _compare_all(
    name: str,
    given: Mapping[str, Any],
    config: PresetName = "small",
    models: Annotated[str, typer.Option(help="Which, with commas between: rmc, lstm, gru, transformer.")] = "rmc,lstm",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each model, from the seeds 0, 1, and so on.")] = 3,
    rates: Annotated[
        str, typer.Option(help="Learning rates that each model tries from one more seed; its runs take its best.")
    ] = "",
    processes: Annotated[int | None, typer.Option(min=1, help="Runs at a time; one a core if not given.")] = None,
    out: Out = Path("runs"),
) -> None:
    console = Console()
    cores = cast(list[Core], list(dict.fromkeys(models.split(","))))
    wrong = [core for core in cores if core not in CORES]
    if wrong:
        raise typer.BadParameter(f"models takes {', '.join(CORES)}, with commas between; got {wrong[0]!r}")
    tried = _rates(rates, given)
    preset = _preset(name, config, given)
    command = shlex.join(["rmc", *sys.argv[1:]])
    try:
        found = compare(preset, range(seeds), console, cores, processes, out, tried, command)
    except (OSError, TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if found.tuning:
        show_tuning(found, console)
    show_comparison(found, console)
    console.print(f"wrote {plot_curves(found.histories, out / f'{name}.png')}", soft_wrap=True)


def _rates(text: str, given: Mapping[str, Any]) -> list[float]:
    """The learning rates of `--rates`."""
    if not text:
        return []
    if "learning_rate" in given:
        raise typer.BadParameter("rates takes the place of lr; got both")
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"rates takes numbers with commas between, got {text!r}") from error
    if not all(0 < rate < math.inf for rate in rates):
        raise typer.BadParameter(f"rates takes numbers above 0, got {text!r}")
    return list(dict.fromkeys(rates))


def _preset(name: str, config: str, given: Mapping[str, Any]) -> Preset:
    """The preset with the options that were given."""
    presets = PRESETS[name]
    if config not in presets:
        raise typer.BadParameter(f"config takes {' or '.join(presets)} for {name}, got {config!r}")
    preset = presets[config]
    try:
        return Preset(changed(preset.task, given), changed(preset.model, given), changed(preset.training, given))
    except (OSError, TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


def _run(trainer: Trainer, watches: list[logs.Watch], console: Console) -> None:
    """Train with a progress bar, and tell."""
    history = trainer.history
    console.print(
        f"[bold]{history.task}[/]: {history.model['core']}, {history.parameters:,} parameters, "
        f"backend {history.backend}, seed {trainer.config.seed}"
    )
    if trainer.update:
        console.print(f"going on from {trainer.checkpoint} after {trainer.update:,} updates", soft_wrap=True)
    with TrainingProgress(console) as progress:
        bar = progress.add("training", trainer.config.updates)

        def watch(trainer: Trainer) -> None:
            speed = trainer.tokens / trainer.seconds
            progress.show(bar, trainer.update, speed, history.measure, history.final)
            for each in watches:
                each(trainer)

        trainer.run(watch)
    console.print(_summary(history))


def _summary(history: History) -> str:
    final = history.final
    levels = "".join(f", {level} {accuracy:.1%}" for level, accuracy in history.levels.items())
    found = f"accuracy [bold]{final.accuracy:.1%}[/]{levels}"
    if history.measure == "perplexity":
        found = f"perplexity [bold]{final.perplexity:,.2f}[/] ({final.loss / math.log(2):.3f} bits), {found}"
    parts = "".join(f"\n  {part} {accuracy:.1%}" for part, accuracy in history.parts.items())
    return (
        f"{found}; {final.update:,} updates, {final.examples:,} sequences, {final.tokens:,} tokens, "
        f"{final.seconds:.0f} s, {final.cpu_seconds:.0f} s of CPU time{parts}"
    )


def _tensorboard(folder: Path) -> logs.Watch:
    try:
        return logs.tensorboard(folder)
    except ModuleNotFoundError as error:
        raise typer.BadParameter("--tensorboard needs tensorboard: pip install tensorboard") from error


for _name in TASKS:
    for _app, _run_it in ((train, _train_one), (comparison, _compare_all)):
        _app.command(_name, help=HELP[_name])(
            with_options(partial(_run_it, _name), TASKS[_name], ModelConfig, TrainingConfig)
        )
