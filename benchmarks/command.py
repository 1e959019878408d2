"""`rmc bench`: the command line of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from rmc_kernels import backends
from rmc_kernels.benchmarks.cases import SUITES
from rmc_kernels.benchmarks.contestants import RIVALS
from rmc_kernels.benchmarks.suite import run_suite


def bench(
    suite: Annotated[str, typer.Option(help=f"One of: {', '.join(SUITES)}.")] = "quick",
    backend: Annotated[str, typer.Option(help="all, or one of: triton, cpu, reference.")] = "all",
    against: Annotated[str | None, typer.Option(help=f"Rivals, of: {','.join(RIVALS)}.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="PATH.json, or a folder; plots go beside it.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Only cases of so many threads; may be repeated.")] = None,
) -> None:
    """Time the cell against eager PyTorch and other models, beside what the machine can do."""
    console = Console()
    rivals = None if against is None else [name.strip() for name in against.split(",") if name.strip()]
    for name, values, takes in (
        ("suite", [suite], tuple(SUITES)),
        ("backend", [backend], ("all", *backends.CHOICES[1:])),
        ("device", [device], ("cpu", "cuda")),
        ("against", rivals or [], RIVALS),
    ):
        for value in values:
            if value not in takes:
                raise typer.BadParameter(f"--{name} takes one of {', '.join(takes)}; got {value!r}")
    if device == "cuda" and not torch.cuda.is_available():
        console.print(
            f"There is no GPU: torch {torch.__version__} sees no CUDA device. Nothing was timed.", style="red"
        )
        raise typer.Exit(1)
    result = run_suite(suite, console=console, backend=backend, against=rivals, device=device, threads=threads)
    result.show(console)
    for note in result.notes():
        console.print(
            note, markup=False, highlight=False, style="red" if note.startswith(("PARITY", "ERROR")) else None
        )
    if out is not None:
        for path in result.write(out if out.suffix == ".json" else out / f"bench-{suite}.json"):
            console.print(f"written: {path}", highlight=False)
    raise typer.Exit(0 if result.ok else 1)
