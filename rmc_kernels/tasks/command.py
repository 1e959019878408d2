"""`rmc train` and `rmc compare`: train one model on a task, or several beside one another, and leave their curves."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console

from rmc_kernels.tasks import logs, ranks
from rmc_kernels.tasks.comparison import compare, run_name, show_comparison, show_tuning
from rmc_kernels.tasks.cores import CORES, Core
from rmc_kernels.tasks.exits import REFUSALS, interruptible, one_line
from rmc_kernels.tasks.files import claimed, left_by_a_run
from rmc_kernels.tasks.history import History
from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.options import changed, with_options
from rmc_kernels.tasks.plots import plot_curves
from rmc_kernels.tasks.presets import PRESETS, Preset
from rmc_kernels.tasks.progress import TrainingProgress
from rmc_kernels.tasks.registry import TASKS
from rmc_kernels.tasks.training import Trainer, TrainingConfig, check_device

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
    overwrite: Annotated[bool, typer.Option(help="Replace the run in --out, if there is one.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Log for TensorBoard too, into --out.")] = False,
    threads: Threads = 1,
    out: Out = Path("runs"),
) -> None:
    torch.set_num_threads(threads)
    with one_line(*REFUSALS):
        preset = _preset(name, config, given)
        device = ranks.own_device(preset.training.device)
        check_device(device)
    training = changed(preset.training, {"device": device})
    checkpoint = out / f"{run_name(preset.task, preset.model, training)}.pt"
    trainer: Trainer | None = None

    def go_on() -> str:
        if trainer is None or trainer.saved is None:
            return f"to begin again: {_command()}"
        return f"to go on from update {trainer.saved:,}: {_command(resume=True)}"

    with ranks.joined(device), ExitStack() as stack:
        first = ranks.rank() == 0  # the process that writes and tells
        if first:
            stack.enter_context(interruptible(go_on))
        with one_line(*REFUSALS):
            if first:
                stack.enter_context(claimed(checkpoint))
            line = shlex.join(["rmc", *sys.argv[1:]])
            trainer = Trainer(preset.task, preset.model, training, checkpoint, resume, overwrite, line)
            if first and overwrite:
                _remove_plots(checkpoint)
            log = logs.tensorboard(checkpoint.with_suffix("")) if first and tensorboard else None
        if first:
            with one_line(OSError):
                _run(trainer, checkpoint, log)
        else:
            trainer.run()


def _command(resume: bool = False) -> str:
    """The command line of this process, or the one that resumes its run."""
    launcher = ["torchrun", f"--nproc-per-node={ranks.world()}", "-m", "rmc_kernels"] if ranks.world() > 1 else ["rmc"]
    given = sys.argv[1:]
    if resume:
        given = [argument for argument in given if argument not in ("--resume", "--overwrite")] + ["--resume"]
    return shlex.join([*launcher, *given])


def _remove_plots(checkpoint: Path) -> None:
    """Remove what stands for the curve of a run that is overwritten, and that the new one does not replace at once."""
    checkpoint.with_suffix(".png").unlink(missing_ok=True)
    for events in checkpoint.with_suffix("").glob("events.out.tfevents.*"):
        events.unlink()


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
    with interruptible(lambda: f"to go on: {_command()}"), one_line(*REFUSALS):
        cores = cast(list[Core], list(dict.fromkeys(models.split(","))))
        wrong = [core for core in cores if core not in CORES]
        if wrong:
            raise ValueError(f"models must be some of {', '.join(CORES)}, with commas between, got {wrong[0]!r}")
        preset, tried = _preset(name, config, given), _rates(rates, given)
        found = compare(preset, range(seeds), console, cores, processes, out, tried, _command())
        if found.tuning:
            show_tuning(found, console)
        show_comparison(found, console)
        console.print(f"wrote {plot_curves(found.histories, out / f'{name}.png')}", soft_wrap=True)


def _rates(text: str, given: Mapping[str, Any]) -> list[float]:
    """The learning rates of `--rates`."""
    if not text:
        return []
    if "learning_rate" in given:
        raise ValueError("rates must not be given beside lr, whose place they take")
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError as error:
        raise ValueError(f"rates must be numbers with commas between, got {text!r}") from error
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates must be numbers above 0, got {text!r}")
    return list(dict.fromkeys(rates))


def _preset(name: str, config: str, given: Mapping[str, Any]) -> Preset:
    """The preset with the options that were given."""
    presets = PRESETS[name]
    if config not in presets:
        raise ValueError(f"config must be {' or '.join(presets)} for {name}, got {config!r}")
    preset = presets[config]
    return Preset(changed(preset.task, given), changed(preset.model, given), changed(preset.training, given))


def _run(trainer: Trainer, checkpoint: Path, log: logs.Watch | None) -> None:
    """Train with a progress bar, tell, and draw the curve."""
    console, history = Console(), trainer.history
    console.print(
        f"[bold]{history.task}[/]: {history.model['core']}, {history.parameters:,} parameters, "
        f"backend {history.backend}, seed {trainer.config.seed}"
    )
    if trainer.saved is not None:
        console.print(f"going on from {checkpoint} after {trainer.update:,} updates", soft_wrap=True)
    with TrainingProgress(console) as progress:
        bar = progress.add("training", trainer.config.updates)

        def watch(trainer: Trainer) -> None:
            speed = trainer.tokens / trainer.seconds
            progress.show(bar, trainer.update, speed, history.measure, history.final)
            if log is not None:
                log(trainer)

        trainer.run(watch)
    console.print(_summary(history))
    plot_curves([history], checkpoint.with_suffix(".png"))
    for path in left_by_a_run(checkpoint):
        console.print(f"wrote {path}", soft_wrap=True)


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


for _name in TASKS:
    for _app, _run_it in ((train, _train_one), (comparison, _compare_all)):
        _app.command(_name, help=HELP[_name])(
            with_options(partial(_run_it, _name), TASKS[_name], ModelConfig, TrainingConfig)
        )
