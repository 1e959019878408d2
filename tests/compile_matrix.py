"""`make matrix`: compile the forward kernel with every tile of the table for every target, without a GPU.

    python -m tests.compile_matrix [--target sm_90 ...]

Prints registers, spills, shared memory, tensor-core instructions and barriers of each; exit code 1 where one does not
compile or does not fit the target's shared memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from unittest.mock import patch

import torch
import triton

from rmc_kernels import CellSpec, backends
from rmc_kernels.backends.triton import tiles
from rmc_kernels.backends.triton.tiles import TABLE, Entry
from tests.cases import draw
from tests.offline import TARGETS, offline

COLUMNS = ("registers", "spill_stores", "spill_loads", "shared", "mma", "barriers")


def spec_of(entry: Entry) -> CellSpec:
    """A cell that the entry is for: 8 slots, 4 heads."""
    width = min(entry.width, 128 if entry.wide else 512)
    return CellSpec.sonnet(16, 8, width // 4, 4)


def compile_entry(entry: Entry, target: str, spec: CellSpec | None = None) -> dict[str, int]:
    """What the compiled forward kernel uses with the entry's tile on a target.

    Raises:
        Exception: whatever Triton raises where it does not compile or does not fit.
    """
    spec = spec or spec_of(entry)
    case = draw(spec, batch=1, steps=1, dtype=torch.float32 if entry.wide else torch.bfloat16)
    tile = entry.tile.fitted(spec.mem_size)
    with patch.object(tiles, "choose", return_value=tile), offline(target) as launches:
        backends.BACKENDS["triton"].forward(spec, case.call(), False)
    (launch,) = [launch for launch in launches if launch.name == "forward"]
    return launch.resources()


def lines(targets: list[str]) -> Iterator[tuple[str, bool]]:
    """Each line of the table, and whether all is well in it."""
    for entry in TABLE:
        for target in entry.targets:
            if target in targets:
                name = f"| D={spec_of(entry).mem_size} {'float32' if entry.wide else 'half'} {entry.tile.rows} rows"
                try:
                    found = compile_entry(entry, target)
                except Exception as error:  # every entry is to be tried
                    yield f"{name} | {target} | {type(error).__name__}: {str(error)[-200:]} |", False
                else:
                    yield f"{name} | {target} | {' | '.join(str(found[column]) for column in COLUMNS)} |", True


def main() -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this; may be repeated")
    chosen = parser.parse_args().target or list(TARGETS)
    print(f"triton {triton.__version__}\n\n| tile | target | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    fine = True
    for line, ok in lines(chosen):
        print(line, flush=True)
        fine = fine and ok
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
