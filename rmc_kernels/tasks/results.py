"""`rmc results`: the tables of docs/results.md, written from the records of runs beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from PIL import Image

from rmc_kernels.tasks import summary
from rmc_kernels.tasks.exits import one_line
from rmc_kernels.tasks.files import replacing
from rmc_kernels.tasks.history import History
from rmc_kernels.tasks.plots import CORES, groups, model_label, plot_curves

#: Every block between these markers is replaced by the table of the folder that it names.
BLOCK = re.compile(r"(<!-- table: ([\w/.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
#: Of a picture: a third of the bytes, and the lines keep their colours.
COLOURS = 48


def read_runs(folder: Path) -> list[History]:
    """The runs of a folder's summary, or those whose JSON it holds: by core, learning rate and seed.

    Raises:
        OSError, ValueError: there is none, or one is not a record of a run, or a damaged one.
    """
    path = folder / summary.NAME
    runs = summary.read(path) if path.exists() else [History.read(path) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise ValueError(f"runs must be folders with the JSON of `rmc train`, got {folder}")
    order = list(CORES)
    key = [(order.index(r.model["core"]), r.training["learning_rate"], r.training["seed"]) for r in runs]
    return [runs[i] for i in sorted(range(len(runs)), key=key.__getitem__)]


def table(runs: Sequence[History]) -> str:
    """One row a run, then for each model the mean over its seeds at each learning rate; then parts, then settings."""
    measure = runs[0].measure
    head = ["model", "parameters", "learning rate", "seed", measure, "updates", "CPU s", "wall s"]
    rows = [
        [
            CORES[run.model["core"]][0], f"{run.parameters:,}", f"{run.training['learning_rate']:g}",
            str(run.training["seed"]), run.measured, f"{run.final.update:,}", _cpu_seconds([run]),
            f"{run.final.seconds:.0f}",
        ]
        for run in runs
    ]  # fmt: skip
    for same in groups(runs):
        if len(same) > 1:
            name, rate = CORES[same[0].model["core"]][0], same[0].training["learning_rate"]
            means, seconds = f"**{name}, mean of {len(same)}**", _cpu_seconds(same)
            rows.append([means, "", f"{rate:g}", "", f"**{_mean(same)}**", "", seconds, ""])
    levels = [f"{name} {level:.1%}" for name, level in runs[0].levels.items()] if measure == "accuracy" else []
    blocks = [_markdown(head, rows)]
    if levels:
        blocks.append(f"To compare with: {', '.join(levels)}.")
    if runs[0].parts:
        blocks.append(_parts(runs))
    blocks.append(_settings(runs))
    return "\n\n".join(blocks) + "\n"


def _mean(runs: Sequence[History]) -> str:
    if runs[0].measure == "accuracy":
        return f"{mean(run.final.accuracy for run in runs):.1%}"
    return f"{mean(run.final.perplexity for run in runs):,.2f}"


def _cpu_seconds(runs: Sequence[History]) -> str:
    """Their mean; runs from before it was measured have none."""
    seconds = mean(run.final.cpu_seconds for run in runs)
    return f"{seconds:.0f}" if seconds else "-"


def _parts(runs: Sequence[History]) -> str:
    """Accuracy in each part of the task, the mean over the seeds of each model, and the level to compare with."""
    found = groups(runs)
    levels = next((run.part_levels for run in runs if run.part_levels), {})  # runs of before have none
    head = ["accuracy", *(f"{model_label(same, runs)}, seeds: {len(same)}" for same in found)]
    rows = [[part, *(f"{mean(run.parts[part] for run in same):.1%}" for same in found)] for part in runs[0].parts]
    if levels:
        head.append(list(runs[0].levels)[-1])
        rows = [[*row, f"{levels[row[0]]:.1%}"] for row in rows]
    return _markdown(head, rows)


def _settings(runs: Sequence[History]) -> str:
    """What the runs have in common, and a command that repeats the first of each model."""
    first = runs[0]
    model = {k: v for k, v in first.model.items() if k not in ("core", "backend")}
    training = {k: v for k, v in first.training.items() if k not in ("learning_rate", "seed", "device")}
    lines = [
        f"{kind}: {', '.join(f'{name} {value}' for name, value in fields.items())}."
        for kind, fields in (("Task", dict(first.options)), ("RMC and readout", model), ("Training", training))
    ]
    commands = list(dict.fromkeys(same[0].command for same in groups(runs) if same[0].command))
    backends = sorted({f"{CORES[run.model['core']][0]} {run.backend}" for run in runs})
    machines = dict.fromkeys(run.machine for run in runs)
    lines.append(f"Backend: {', '.join(backends)}; {'; '.join(machines)}.")
    return "  \n".join(lines) + "\n\n" + "\n".join(f"    {command}" for command in commands)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def fill(page: str, folder: Path) -> str:
    """The page with every table made anew from the runs in `folder`."""
    return BLOCK.sub(lambda m: f"{m[1]}{table(read_runs(folder / m[2]))}{m[3]}", page)


def _shown(folder: str, page: str) -> bool:
    """Whether the page shows the curves of a folder."""
    return f"/{folder}/curves.png" in page


def results(
    page: Annotated[Path, typer.Option(help="The page whose tables are written.")] = Path("docs/results.md"),
    runs: Annotated[Path, typer.Option(help="Folder of the folders that the page names.")] = Path("docs/results"),
    add: Annotated[Path | None, typer.Option(help="Folder of `rmc train` whose runs are to be kept there.")] = None,
    name: Annotated[str | None, typer.Option(help="Folder that keeps the runs of --add; its own name without.")] = None,
) -> None:
    """Write the tables of a page, and the curves that it shows, from the summaries of runs beside it."""
    with one_line(OSError, ValueError):
        text = page.read_text(encoding="utf-8")
        if add is not None:
            folder = name or add.name
            typer.echo(f"wrote {summary.write(read_runs(add), runs / folder, curves=_shown(folder, text))}")
        filled = fill(text, runs)
        with replacing(page) as file:
            file.write(filled.encode())
        for _, folder, _ in BLOCK.findall(text):
            if _shown(folder, text):
                path = plot_curves(read_runs(runs / folder), runs / folder / "curves.png")
                picture = Image.open(path).convert("RGB")
                picture.quantize(COLOURS, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
                typer.echo(f"wrote {path}")
    typer.echo(f"wrote {page}")
