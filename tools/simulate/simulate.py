"""`make simulate`: every compiled Triton kernel run by `tools.ptxsim`, and what came of it kept.

    python -m tools.simulate [--minutes 60]

Runs the cells that `simulate.csv` does not have of these sources and this triton, in an order in which the first
ones are of every kind. Exit code 1 where one is wrong or has a race.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from rmc_kernels import backends
from rmc_kernels.backends.reference import unroll
from rmc_kernels.backends.triton import device, kept, launch, plan, tiles
from rmc_kernels.verify import Case, baseline, check_case, criterion
from tests.cases import SPECS, DrawnCall, draw
from tools.ptxsim import Report, Schedule
from tools.simulate.simulated import simulated

RESULTS = Path(__file__).with_suffix(".csv")
#: What is known of a cell, beside its name: texts, then numbers that only a cell that is right has.
_TEXTS, _NUMBERS = ("sources", "outcome"), ("launches", "instructions", "seconds")
#: What of it has a table between these markers.
PAGE = Path(__file__).parents[2] / "docs" / "triton-backend.md"
_BEGIN, _END = "<!-- simulated -->\n", "<!-- /simulated -->"
TRITON = backends.BACKENDS["triton"]
SERVED = [name for name, spec in SPECS.items() if spec.variant != "l0sg"]
KINDS = [(dtype, target) for target in ("sm_80", "sm_90") for dtype in ("float32", "bfloat16", "float16")]
#: Device functions that only the backward pass has.
_BACKWARD_FILES = ("back_attention", "back_phases", "backward", "forward_kept", "recompute")
_SCHEDULES: tuple[Schedule, ...] = ("lockstep", "warp")


@dataclass
class Work:
    """What was run.

    Attributes:
        launches: of kernels.
        instructions: that warps executed.
    """

    launches: int = 0
    instructions: int = 0

    def add(self, reports: list[Report]) -> None:
        """Count them; none may have a race."""
        assert reports
        assert [race for report in reports for race in report.races] == []
        self.launches += len(reports)
        self.instructions += sum(report.instructions for report in reports)


def forward(name: str, dtype: str, target: str) -> Work:
    """As many steps of batch elements as `rmc verify` pools, 48, and more; the same bits in another order of warps."""
    case = draw(SPECS[name], ("lengths", "resets"), batch=17, steps=3, dtype=getattr(torch, dtype))
    work, found = Work(), []
    for schedule in _SCHEDULES:
        with simulated(target, schedule, seed=len(name)) as reports:
            found.append(TRITON.forward(case.spec, case.call(), False)[0])
        work.add(reports)
    assert torch.equal(*found)
    exact, eager = unroll(case.spec, case.to(torch.float64).call())[0], unroll(case.spec, case.call())[0]
    verdict = criterion(found[0], eager, exact)
    assert verdict.ok, str(verdict)
    return work


def backward(name: str, dtype: str, target: str) -> Work:
    """Every gradient, of activations that are computed again and of those that the forward pass kept.

    Races are looked for in two steps of both; the draws that the criterion pools are held to their numbers alone.
    """
    spec = SPECS[name]
    case = draw(spec, ("lengths", "resets"), batch=5, steps=2, dtype=getattr(torch, dtype))
    work = Work()
    for saved in (False, True):
        found = []
        for schedule in _SCHEDULES:
            with simulated(target, schedule, seed=len(name)) as reports:
                found.append(_gradients(case, saved))
            work.add(reports)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    verified = Case(
        spec, dtype, 16, 2, lengths=True, resets=True, dropout_mask=not spec.input_rows_live,
        recompute=("full", "none")[len(name) % 2],
    )  # fmt: skip
    fewest = dict.fromkeys(baseline.FEWEST_DRAWS, 4)
    with patch.object(baseline, "FEWEST_DRAWS", fewest), simulated(target, races=False) as reports:
        result = check_case(verified, "triton")
    assert result.status == "right", (result.reason, result.misses)
    work.add(reports)
    return work


def _gradients(case: DrawnCall, saved: bool) -> list[Tensor]:
    call = case.call()
    memories, activations, _ = TRITON.forward(case.spec, call, saved)
    grad = torch.randn(memories.shape, generator=torch.Generator().manual_seed(1))
    needs = [True, True, call.reset_memory is not None, *[True] * len(call.params)]
    found = TRITON.backward(case.spec, call, memories, activations, grad, needs)
    return [memories, *(gradient for gradient in found if gradient is not None)]


@dataclass(frozen=True)
class Cell:
    """A pass of a cell in a dtype for a target."""

    run: Callable[[str, str, str], Work]
    name: str
    dtype: str
    target: str

    def __str__(self) -> str:
        return f"{self.run.__name__} {self.name} {self.dtype} {self.target}"


def cells() -> Iterator[Cell]:
    """All, in rounds: each has every spec, forward and backward, and the rounds take turns with dtypes and targets."""
    for turn in range(len(KINDS)):
        for number, name in enumerate(SERVED):
            for run in (forward, backward):
                yield Cell(run, name, *KINDS[(turn + number) % len(KINDS)])


@cache
def sources(run: Callable[[str, str, str], Work]) -> str:
    """A digest of what the kernels of a pass are compiled from."""
    files = sorted(Path(device.__file__).parent.glob("*.py"))
    texts = [path.read_bytes() for path in files if run is backward or path.stem not in _BACKWARD_FILES]
    tables = [tiles.TABLE, tiles.PROJECTION, *([tiles.BACKWARD] if run is backward else [])]
    layouts = [inspect.getsource(each) for each in (plan, kept, launch.compiler_options)]
    digest = sha256(b"".join([*texts, repr(tables).encode(), *map(str.encode, layouts)])).hexdigest()
    return f"triton {triton.__version__}, {digest[:16]}"


def main() -> int:
    """Run what is not known yet, and write the page; 1 where something known is not right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1e9, help="when to stop")
    parser.add_argument("--only", default="", help='cells whose name begins so, such as "forward sonnet"')
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    chosen = [cell for cell in cells() if str(cell).startswith(given.only)]
    before = load()
    names = {str(cell): sources(cell.run) for cell in cells()}
    found = {name: value for name, value in before.items() if value["sources"] == names.get(name)}
    for cell in chosen:
        if str(cell) in found or time.monotonic() > deadline:
            continue
        found[str(cell)] = {"sources": names[str(cell)], **outcome(cell)}
        print(cell, found[str(cell)], flush=True)
        save(found)
    PAGE.write_text(within(PAGE.read_text(), found))
    outcomes = Counter(value["outcome"].split(":")[0] for value in found.values())
    print(f"{len(found)} of {len(names)} cells run: {dict(outcomes)}")
    return 0 if set(outcomes) == {"right"} else 1


def load() -> dict[str, dict[str, Any]]:
    """What was found of each cell."""
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        return {
            row["cell"]: {name: row[name] for name in _TEXTS}
            | {name: json.loads(row[name]) for name in _NUMBERS if row[name]}
            for row in csv.DictReader(file)
        }


def save(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a row a cell."""
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("cell", *_TEXTS, *_NUMBERS), lineterminator="\n")
        writer.writeheader()
        writer.writerows({"cell": name, **value} for name, value in sorted(found.items()))


def within(text: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with its table made of what was found."""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert begin
    assert end
    return f"{before}{begin}{_table(found)}{end}{after}"


def _table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """How many cells of each kind are right; what is not, by name; how much was run."""
    right = {name for name, value in found.items() if value["outcome"] == "right"}
    lines = ["| right | " + " | ".join(f"{dtype}, {target}" for dtype, target in KINDS) + " |", f"|---{'|---' * 6}|"]
    for run in (forward, backward):
        names = [[str(Cell(run, name, *kind)) for name in SERVED] for kind in KINDS]
        counts = [f"{len(right.intersection(each))} of {len(each)}" for each in names]
        lines.append(f"| {run.__name__} | {' | '.join(counts)} |")
    launches, instructions = (sum(found[name][key] for name in right) for key in ("launches", "instructions"))
    wrong = [f"{name}: {value['outcome']}" for name, value in found.items() if name not in right]
    lines += ["", f"{len(found)} of {len(list(cells()))} cells run, {launches} launches, {instructions:,} instructions"
              f" of warps; not right: {'; '.join(wrong) or 'none'}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def outcome(cell: Cell) -> dict[str, object]:
    """What a cell is: right, with figures, or the error that it ended in."""
    start = time.process_time()
    try:
        work = cell.run(cell.name, cell.dtype, cell.target)
    except Exception as error:  # whatever may be wrong with a kernel, or with the simulator
        return {"outcome": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"outcome": "right", **vars(work), "seconds": round(time.process_time() - start, 1)}
