"""`make matrix`: the forward kernel compiled with every tile of the table for every target, without a GPU.

    python -m tests.compile_matrix [--target sm_90 ...]

Compiles what `compile_matrix.json` does not have of these sources and this triton, adds it there, and writes
docs/compile-matrix.md from all of it. Exit code 1 where a tile does not compile, does not fit the target's shared
memory, or spills registers in an inner loop.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton

from rmc_kernels import CellSpec, backends
from rmc_kernels.backends.triton import launch as launching
from rmc_kernels.backends.triton import tiles
from rmc_kernels.backends.triton.device.forward import forward
from rmc_kernels.backends.triton.tiles import TABLE, Entry, Tile
from tests.assembly import Usage
from tests.cases import draw
from tests.offline import TARGETS, offline

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "compile-matrix.md"
#: What a product's operands are, and the dtype of x.
KINDS = {"half": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Job:
    """One tile to compile for one target.

    Attributes:
        triton: its version.
        kind: a key of `KINDS`.
        width: D of the cell.
        tile: of the table, as it is on the target.
        target: one of `TARGETS`.
    """

    triton: str
    kind: str
    width: int
    tile: Tile
    target: str

    def __str__(self) -> str:
        cut = ",".join(map(str, astuple(self.tile)))
        return f"triton {self.triton}, {self.kind}, D = {self.width}, tile {cut}, {self.target}"


class Compiled(NamedTuple):
    """What became of a job; `source` is that of the device functions then."""

    source: str
    usage: Usage


Results = dict[Job, Compiled]


def source(kernel: Any = forward) -> str:
    """A digest of a kernel and of every device function that it calls."""
    texts: dict[str, str] = {}
    waiting: list[Any] = [kernel]
    while waiting:
        function = waiting.pop()
        name = f"{function.fn.__module__}.{function.fn.__name__}"
        if name not in texts:
            texts[name] = inspect.getsource(function.fn)
            names = {node.id for node in ast.walk(ast.parse(texts[name])) if isinstance(node, ast.Name)}
            called = [function.fn.__globals__.get(name) for name in names]
            waiting += [each for each in called if isinstance(each, triton.JITFunction)]
    return sha256("".join(text for _, text in sorted(texts.items())).encode()).hexdigest()[:12]


def kinds(entry: Entry, target: str) -> tuple[str, ...]:
    """The products that an entry is for; TF32 is never used on AMD."""
    if not entry.wide:
        return ("half",)
    return ("float32",) if target.startswith("gfx") else ("float32", "tf32")


def jobs(version: str, targets: tuple[str, ...] = TARGETS) -> Iterator[Job]:
    """Everything there is to compile with a triton; TF32, which the table has no entries of its own for, last."""
    for tf32 in (False, True):
        for entry in TABLE:
            for target in targets:
                for kind in kinds(entry, target):
                    if (kind == "tf32") == tf32:
                        yield Job(version, kind, width(entry), entry.tile_on(target), target)


def width(entry: Entry) -> int:
    """D of a cell that the entry is for."""
    return min(entry.width, 128 if entry.wide else 512)


def compile_job(job: Job, spec: CellSpec | None = None) -> Usage:
    """What the compiled forward kernel uses, with lengths and resets; a cell of 8 slots and 4 heads by default.

    Raises:
        Exception: whatever Triton raises where it does not compile or does not fit.
    """
    spec = spec or CellSpec.sonnet(16, 8, job.width // 4, 4)
    case = draw(spec, ("lengths", "resets"), batch=1, steps=1, dtype=KINDS[job.kind])
    with (
        patch.object(tiles, "choose", return_value=job.tile.fitted(spec.mem_size)),
        patch.object(launching, "precision", return_value="tf32" if job.kind == "tf32" else "ieee"),
        offline(job.target) as launches,
    ):
        backends.BACKENDS["triton"].forward(spec, case.call(), False)
    (launch,) = [launch for launch in launches if launch.name == "forward"]
    return launch.usage()


# -- results -----------------------------------------------------------------------------------------------------------


def load() -> Results:
    """What was compiled before."""
    lines = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return {
        Job(**line["job"] | {"tile": Tile(**line["job"]["tile"])}): Compiled(line["source"], Usage(**line["usage"]))
        for line in lines
    }


def save(results: Results) -> None:
    """One line for each job that the table still has."""
    kept = [job for version in sorted({job.triton for job in results}) for job in jobs(version) if job in results]
    lines = [
        json.dumps({"job": asdict(job), "source": results[job].source, "usage": results[job].usage._asdict()})
        for job in kept
    ]
    RESULTS.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def run(targets: tuple[str, ...]) -> bool:
    """Compile what is missing; whether all is well."""
    results, fine, digest = load(), True, source()
    todo = list(jobs(triton.__version__, targets))
    for number, job in enumerate(todo, start=1):
        start, known = time.monotonic(), results.get(job)
        try:
            usage = known.usage if known is not None and known.source == digest else compile_job(job)
        except Exception as error:  # every tile is to be tried
            print(f"[{number}/{len(todo)}] {job}: {type(error).__name__}: {str(error)[-300:]}", flush=True)
            fine = False
            continue
        results[job] = Compiled(digest, usage)
        save(results)
        fine = fine and not usage.inner
        print(f"[{number}/{len(todo)}] {job}: {usage}, {time.monotonic() - start:.0f} s", flush=True)
    return fine


# -- the page ----------------------------------------------------------------------------------------------------------

_INTRODUCTION = """# What the forward kernel uses

Written by `make matrix` from [compile_matrix.json](../tests/compile_matrix.json); no GPU was there, and no number of
registers is a speed. Every tile of the table, compiled for every target: the `sonnet` cell of 8 slots and 4 heads at
the entry's widest D (where it has no bound 512, in float32 128), with lengths and resets, which take a few registers.

* Spilled: stores and loads of registers that did not fit, and how many of them are in inner loops, that is in any loop
  but those over time and over blocks.
* Shared: bytes of shared memory of a program. Products: tensor-core instructions; float32 has none on NVIDIA's targets.
* Barriers: most are the compiler's own, between two layouts.
* A figure that differs between triton versions is given for each.
* Compiled so far: {done}.
"""
_COLUMNS = ("triton", "registers", "spilled", "of them inner", "shared", "products", "barriers")


def page(results: Results) -> str:
    """docs/compile-matrix.md from the results for the tiles that the table has."""
    versions = sorted({job.triton for job in results})
    every = {version: list(jobs(version)) for version in versions}
    counts = [
        f"{len(results.keys() & known)} of {len(known)} with triton {version}" for version, known in every.items()
    ]
    parts = [_INTRODUCTION.format(done=", ".join(counts))]
    for entry in TABLE:
        tile = entry.tile
        bound = "any wider D" if entry.width == tiles.ANY else f"D up to {entry.width}"
        parts.append(
            f"\n## {'float32' if entry.wide else 'Half types'}, {bound}, {tile.rows} rows\n\n"
            f"{tile.columns} columns, {tile.inner} of the inner dimension, {tile.head} of a head at a time; "
            f"{tile.warps} warps ({tiles.AMD_WARPS} on gfx942), {tile.stages} stages. "
            f"{entry.reason[0].upper()}{entry.reason[1:]}.\n\n"
            f"| target | {' | '.join(_COLUMNS)} |\n|{'---|' * (1 + len(_COLUMNS))}\n"
        )
        for target in TARGETS:
            for kind in kinds(entry, target):
                wanted = [Job(version, kind, width(entry), entry.tile_on(target), target) for version in versions]
                found = {job.triton: results[job].usage for job in wanted if job in results}
                cells = [", ".join(found) or "not yet", *map(_together, zip(*found.values(), strict=True))]
                name = f"{target}, TF32" if kind == "tf32" else target
                parts.append(f"| {' | '.join([name, *cells])} |\n")
    return "".join(parts)


def _together(figures: tuple[int, ...]) -> str:
    """One figure where the versions agree, all of them otherwise."""
    return str(figures[0]) if len(set(figures)) == 1 else " / ".join(map(str, figures))


def main() -> int:
    """Compile, print what is found, write the page; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this; may be repeated")
    fine = run(tuple(parser.parse_args().target or TARGETS))
    PAGE.write_text(page(load()))
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
