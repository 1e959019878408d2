"""How a command ends early: with an error in one line, or with the line that goes on after an interruption."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType

import typer

from rmc_kernels.tasks.models import ModelConfig
from rmc_kernels.tasks.options import option_name
from rmc_kernels.tasks.registry import TASKS
from rmc_kernels.tasks.training import TrainingConfig

#: The options of what the messages of errors begin with.
OPTIONS = {name: f"--{name}" for name in ("config", "models", "out", "overwrite", "rates")} | {
    field.name: f"--{option_name(field.name)}"
    for config in (*TASKS.values(), ModelConfig, TrainingConfig)
    for field in fields(config)
}
#: Errors that tell of what was asked for, not of a fault here.
REFUSALS = (OSError, TypeError, ValueError)


@contextmanager
def one_line(*expected: type[Exception]) -> Iterator[None]:
    """End with exit code 2 and one line on stderr where an expected error is raised; others keep their traceback."""
    try:
        yield
    except expected as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        name, blank, rest = message.partition(" ")
        message = f"{OPTIONS.get(name, name)}{blank}{rest}"
        typer.echo(f"Error: {' '.join(message.split())}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def interruptible(go_on: Callable[[], str]) -> Iterator[None]:
    """End with the exit code of a shell where SIGINT or SIGTERM arrives, and tell on stderr how to go on."""
    arrived = signal.SIGINT

    def terminated(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        arrived = signal.SIGTERM
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo(f"Interrupted; {go_on()}", err=True)
        raise typer.Exit(128 + arrived) from error
    finally:
        signal.signal(signal.SIGTERM, before)
