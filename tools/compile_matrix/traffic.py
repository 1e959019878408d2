"""Bytes that a program of each Triton kernel loads and stores in a step, counted by the strict interpreter.

    TRITON_INTERPRET=1 python -m tools.compile_matrix.traffic

`make matrix` runs it. Writes traffic.csv, from which compile-matrix.md has its table; nothing that is counted
depends on the target.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from unittest.mock import patch

import torch

from rmc_kernels import CellSpec, backends
from rmc_kernels.backends.triton import tiles
from rmc_kernels.backends.triton.tiles import TABLE, Entry
from tests.cases import draw
from tools.strict import Report, strict

RESULTS = Path(__file__).with_suffix(".csv")
#: Slots and heads of the cell.
SLOTS, HEADS = 8, 4
#: Arguments that are weights of the recurrence, or their transposed copies.
_WEIGHTS = ("qkv_weight", "mlp_weight", "gate_weight", "qkv_back", "mlp_back", "gate_back")


@dataclass(frozen=True)
class Line:
    """What one program of a kernel moves in one step.

    Attributes:
        wide: whether in float32; in half types otherwise.
        width: D of the `sonnet` cell.
        rows: of the tile.
        kernel: its name.
        weights: bytes of weights loaded.
        loads: of anything else.
        stores: bytes stored.
    """

    wide: bool
    width: int
    rows: int
    kernel: str
    weights: int
    loads: int
    stores: int


def count(entry: Entry, width: int) -> list[Line]:
    """Of all kernels in an entry's tile, for a cell of width `width` with lengths and resets."""
    spec, backend = CellSpec.sonnet(16, SLOTS, width // HEADS, HEADS), backends.BACKENDS["triton"]
    dtype = torch.float32 if entry.wide else torch.bfloat16
    call = draw(spec, ("lengths", "resets"), batch=entry.tile.rows // SLOTS, steps=1, dtype=dtype).call()
    with patch.object(tiles, "choose", lambda *args: entry.tile.fitted(width)), strict() as report:
        memories, activations, _ = backend.forward(spec, call, False)
        backend.backward(spec, call, memories, activations, torch.ones_like(memories), [True] * (3 + len(call.params)))
        backend.forward(spec, call, True)
    return [_line(report, entry, width, kernel) for kernel in ("forward", "forward_kept", "recompute", "backward")]


def _line(report: Report, entry: Entry, width: int, kernel: str) -> Line:
    found: Counter[str] = Counter()
    for (name, argument, kind), size in report.traffic.items():
        if name == kernel:
            found["weights" if argument in _WEIGHTS else kind] += size
    assert report.launches.count(kernel) == 1
    return Line(entry.wide, width, entry.tile.rows, kernel, found["weights"], found["load"], found["store"])


def load() -> list[Line]:
    """What was counted before."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return [
            Line(
                row["wide"] == "True", int(row["width"]), int(row["rows"]), row["kernel"],
                *(int(row[name]) for name in ("weights", "loads", "stores")),
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def save(lines: Sequence[Line]) -> None:
    """A row for each."""
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Line))
        writer.writerows(astuple(line) for line in lines)


def main() -> None:
    """Count and save."""
    lines: list[Line] = []
    for entry in TABLE:
        lines += count(entry, min(entry.width, 128 if entry.wide else 512))
        print(*lines[-4:], sep="\n", flush=True)
        save(lines)


if __name__ == "__main__":
    main()
