"""Runs that a page is made from, kept small: in one table, of every run its settings, its curve and its last point.

A row a field, such as `training.seed`, and a column a run; an empty cell is a field that a run does not have. A cell is
JSON, or a text as it is. `curve.100` is what is drawn of the run at update 100; the last point is kept whole.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rmc_kernels.tasks.history import History, Point

#: The file in a folder of runs.
NAME = "runs.csv"
#: Columns of the curve, by the measure that is drawn.
_DRAWN = {"accuracy": "accuracy", "perplexity": "loss"}
#: Of a point of which only that is known.
_UNKNOWN: dict[str, Any] = {**dict.fromkeys(("seconds", "loss", "accuracy", "cpu_seconds"), math.nan), "examples": 0}
#: Fields that have fields of their own.
_PARTS = ("levels", "model", "training", "options", "parts", "part_levels", "curve", "last")
#: Significant digits: more than any table shows.
DIGITS = 7


def write(runs: Sequence[History], folder: Path, curves: bool) -> Path:
    """Write the summary of runs into a folder, and return its path.

    Args:
        runs: in the order in which they are to be read.
        folder: made if it is not there.
        curves: whether the points before the last are kept, of which a picture is drawn.

    Raises:
        ValueError: there is no run.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    columns = [_flat(run, curves) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["", *(f"run {number}" for number in range(1, len(runs) + 1))])
        writer.writerows([name, *(column.get(name, "") for column in columns)] for name in names)
    return path


def read(path: Path) -> list[History]:
    """The runs of a summary.

    Of points before the last, a summary keeps only what is drawn: the rest of them is NaN, or 0 examples.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file holds none, or is damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            names, *columns = zip(*csv.reader(file, strict=True), strict=True)
        if not columns:
            raise ValueError("no run")
        return [_history(zip(names[1:], column[1:], strict=True)) for column in columns]
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a summary of runs, got another file or a damaged one") from error


def _flat(run: History, curves: bool) -> dict[str, str]:
    """The cells of a run by name."""
    fields = asdict(run)
    points = fields.pop("points")
    fields["curve"] = {str(point["update"]): point[_DRAWN[run.measure]] for point in points[:-1]} if curves else {}
    fields["last"] = points[-1]
    cells: dict[str, str] = {}
    for name, value in fields.items():
        inner = {f"{name}.{key}": each for key, each in value.items()} if name in _PARTS else {name: value}
        cells |= {key: _cell(each) for key, each in inner.items()}
    return cells


def _history(cells: Iterable[tuple[str, str]]) -> History:
    fields: dict[str, Any] = {part: {} for part in _PARTS}
    for name, cell in cells:
        part, _, key = name.partition(".")
        if cell:
            (fields[part] if part in _PARTS else fields)[key or part] = _value(cell)
    curve, last, drawn = fields.pop("curve"), fields.pop("last"), _DRAWN[fields["measure"]]
    updates = sorted(curve, key=int)
    points = [Point(**{**_UNKNOWN, "update": int(update), drawn: curve[update]}) for update in updates]
    return History(**fields, points=[*points, Point(**last)])


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value if value and _value(value) == value else json.dumps(value)
    return json.dumps(float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value)


def _value(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell
