"""The command line `rmc`: assembles the commands, each of which lives in the package it belongs to."""

from __future__ import annotations

import importlib
import sys
from typing import Any, NamedTuple


class Command(NamedTuple):
    """Where a command lives, and its line in `rmc --help`.

    `name` in `module` is a function with typer options, or a typer.Typer of subcommands, imported when called for.
    """

    module: str
    name: str
    help: str


COMMANDS = {
    "info": Command("rmc_kernels.info", "info", "Show versions, the machine, and which backend serves what."),
    "verify": Command("rmc_kernels.verify.command", "verify", "Verify every backend against float64."),
    "bench": Command("rmc_kernels.bench.command", "bench", "Measure speed and memory beside other implementations."),
    "train": Command("rmc_kernels.tasks.command", "train", "Train a model on a task."),
    "compare": Command("rmc_kernels.tasks.command", "comparison", "Train models of equal size beside one another."),
    "inspect": Command("rmc_kernels.tasks.inspection", "inspect", "Draw who attends to whom in a trained memory."),
    "sample": Command("rmc_kernels.tasks.sampling", "sample", "Write text with a trained language model."),
    "results": Command("rmc_kernels.tasks.results", "results", "Write the tables of docs/results.md from their runs."),
    "demo": Command("rmc_kernels.demo", "demo", "Verify, measure and learn; leaves plots in demo/."),
}
#: What the extra [cli] brings.
EXTRA = ("typer", "rich", "matplotlib")


def main() -> None:
    """Run the command line with the arguments of this process."""
    try:
        app = _assemble(sys.argv[1:])
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.exit(f"rmc needs {package}, which is not installed: pip install 'rmc-kernels[cli]'")
    app(prog_name="rmc")


def _assemble(arguments: list[str]) -> Any:
    """A typer app with the command that is called for; the others stand there with their help only."""
    import typer  # optional: the package works without a command line

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def rmc() -> None:
        """Relational Memory Core for PyTorch: fused kernels, verified and measured."""

    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in COMMANDS.items():
        if name != called:
            app.command(name, help=command.help)(_placeholder)
            continue
        found = getattr(importlib.import_module(command.module), command.name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name, help=command.help)
        else:
            app.command(name, help=command.help)(found)
    return app


def _placeholder() -> None:
    raise AssertionError("the command that is called for is imported")
