"""Runs that a page is made from, kept small: in one file, of every run its settings, its curve and its last point.

The first run is written whole, of the others only what differs from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rmc_kernels.tasks.history import History, Point

#: The file in a folder of runs.
NAME = "runs.json"
#: What the curve is made of, by what is drawn; the last point is kept whole.
CURVES = {"accuracy": ("update", "accuracy"), "perplexity": ("update", "loss")}
#: Of a point of which only that is known.
_UNKNOWN: dict[str, Any] = {**dict.fromkeys(("seconds", "loss", "accuracy", "cpu_seconds"), math.nan), "examples": 0}
#: Fields whose own fields are compared one by one; every run of a summary must have the same ones.
PARTS = ("model", "training", "options", "curve", "last")
#: Significant digits: more than any table shows.
DIGITS = 7


def write(runs: Sequence[History], folder: Path, curves: bool) -> Path:
    """Write the summary of runs into a folder, and return its path.

    Args:
        runs: in the order in which they are to be read.
        folder: made if it is not there.
        curves: whether the points before the last are kept, of which a picture is drawn.

    Raises:
        ValueError: there is no run, or two of them have other fields in one of the `PARTS`.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    first, *others = (_plain(run, curves) for run in runs)
    kept = {"first": first, "others": [_difference(first, other) for other in others]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> list[History]:
    """The runs of a file: those of a summary, or the one that `rmc train` wrote.

    Of points before the last, a summary keeps only what is drawn, see `CURVES`: the rest of them is NaN, or 0 examples.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file holds neither, or is damaged.
    """
    try:
        kept = json.loads(path.read_bytes())
    except ValueError:
        kept = None
    if not isinstance(kept, dict) or "first" not in kept:
        return [History.read(path)]
    try:
        return [_history(_merged(kept["first"], other)) for other in ({}, *kept["others"])]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a summary of runs, got another file or a damaged one") from error


def _plain(run: History, curves: bool) -> dict[str, Any]:
    kept = asdict(run)
    points = kept.pop("points")
    drawn = points[:-1] if curves else []
    kept["curve"] = {name: [point[name] for point in drawn] for name in CURVES[run.measure]}
    kept["last"] = points[-1]
    return _rounded(kept)  # type: ignore[no-any-return]


def _history(kept: dict[str, Any]) -> History:
    curve, last = kept.pop("curve"), kept.pop("last")
    rows = [dict(zip(curve, row, strict=True)) for row in zip(*curve.values(), strict=True)]
    points = [Point(**{**_UNKNOWN, **row}) for row in rows]
    return History(**kept, points=[*points, Point(**last)])


def _difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run is not as in the first one."""
    found = {name: value for name, value in other.items() if value != first[name]}
    for part in found.keys() & PARTS:
        before, now = first[part], found[part]
        if list(before) != list(now):
            raise ValueError(f"runs must have the same fields of {part}, got {', '.join(before)} and {', '.join(now)}")
        found[part] = {name: value for name, value in now.items() if value != before[name]}
    return found


def _merged(first: Mapping[str, Any], difference: Mapping[str, Any]) -> dict[str, Any]:
    """The first run with the difference put in."""
    return {**first, **difference, **{part: {**first[part], **difference.get(part, {})} for part in PARTS}}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
