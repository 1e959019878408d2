"""A result without its samples as CSV: header lines name the command and the machine, then one row a figure.

    # schema: 1
    # name: "quick"
    # command: "rmc bench --suite quick"
    # machine.processor: "AMD EPYC"
    case,contestant,threads,flops,...,contention
    "B=16 T=16 N=8 D=256 H=4, forward, 1 thread",eager,1,2040528896,...

An empty cell is a field at its default. Seconds and ratios are medians, `_low` and `_high` their quartiles.
"""

from __future__ import annotations

import csv
import io
import json
from itertools import groupby, takewhile
from typing import Any

from rmc_kernels.bench.record import TimedCase, short
from rmc_kernels.bench.suite import SCHEMA, SuiteResult

_HEADER = "# "
_BETWEEN_REASONS = "; "
#: Columns of text; the other cells are numbers or booleans, as in JSON.
_TEXT = ("case", "contestant", "clock", "status", "note", "trace", "contention")


def to_csv(result: SuiteResult) -> str:
    """The medians, quartiles and counts of a result; `from_csv` reads them back."""
    about: dict[str, Any] = {"schema": SCHEMA, "name": result.name, "command": result.command}
    for part, values in (("machine", result.machine), ("absent", result.absent)):
        about |= {f"{part}.{name}": value for name, value in values.items()}
    rows = [
        {"case": case.case.name, **short(figure), "contention": _BETWEEN_REASONS.join(case.contention)}
        for case in result.without_samples().cases
        for figure in case.figures
    ]
    columns = dict.fromkeys(name for row in rows for name in row if name != "contention")
    text = io.StringIO()
    text.writelines(f"{_HEADER}{name}: {json.dumps(value)}\n" for name, value in about.items())
    writer = csv.DictWriter(text, [*columns, "contention"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(name, value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def is_csv(text: str) -> bool:
    """Whether a text is what `to_csv` wrote, and no JSON."""
    return text.startswith(_HEADER)


def from_csv(text: str) -> SuiteResult:
    """The result that `to_csv` wrote.

    Raises:
        KeyError, TypeError, ValueError, csv.Error: another schema, or a damaged text.
    """
    about: dict[str, Any] = {"machine": {}, "absent": {}}
    lines = text.splitlines(keepends=True)
    header = list(takewhile(is_csv, lines))
    for line in header:
        name, _, value = line.removeprefix(_HEADER).partition(": ")
        part, _, key = name.partition(".")
        (about[part] if key else about)[key or part] = json.loads(value)
    if about["schema"] != SCHEMA:
        raise ValueError(f"text must be a benchmark result of schema {SCHEMA}, got {about['schema']!r}")
    rows = csv.DictReader(io.StringIO("".join(lines[len(header) :]), newline=""), strict=True)
    cases = []
    for (name, contention), group in groupby(rows, lambda row: (row["case"], row["contention"])):
        figures = [_figure(row) for row in group]
        reasons = contention.split(_BETWEEN_REASONS) if contention else []
        cases.append(TimedCase.from_dict({"name": name, "figures": figures, "contention": reasons}))
    return SuiteResult(about["name"], about["machine"], about["absent"], cases, about["command"])


def _figure(row: dict[str, str]) -> dict[str, Any]:
    """The fields of a figure that are not at their defaults."""
    cells = {name: cell for name, cell in row.items() if cell and name not in ("case", "contention")}
    return {name: cell if name in _TEXT else json.loads(cell) for name, cell in cells.items()}


def _cell(name: str, value: Any) -> str:
    return value if name in _TEXT else json.dumps(value)
