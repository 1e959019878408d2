"""compile-matrix.md from the results of `matrix`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rmc_kernels.backends.triton import tiles
from rmc_kernels.backends.triton.tiles import Entry
from tools.compile_matrix.matrix import KERNELS, TABLES, WIDEST, Results, job_of, jobs, kinds
from tools.compile_matrix.traffic import SLOTS, Line
from tools.offline import TARGETS
from tools.offline.assembly import Usage

PAGE = Path(__file__).with_name("compile-matrix.md")

_INTRODUCTION = """# What the Triton kernels use

Written by `make matrix` from [matrix.csv](matrix.csv); no GPU was there, and no number of
registers is a speed. Every tile of the table, compiled for every target: the `sonnet` cell of 8 slots and 4 heads at
the entry's widest D (where it has no bound 512, in float32 128), with lengths and resets, which take a few registers.

* Kernels: `forward`; `forward_kept`, which keeps activations; `recompute` and `backward`, the two of the way back.
* Spilled: stores and loads of registers that did not fit, and how many of them are in inner loops, that is in any loop
  but those over time and over blocks.
* Shared: bytes of shared memory of a program. Products: tensor-core instructions; float32 has none on NVIDIA's targets.
* Barriers: most are the compiler's own, between two layouts.
* Ranges are over the targets and triton versions; matrix.csv has each.

## What is compiled

"""
_TRAFFIC = """
## Traffic

KiB that one program loads and stores in one step, counted by the strict interpreter
(`python -m tools.compile_matrix.traffic`): every element that a load or store of the source names, masked ones left
out, with lengths and resets. That is what the kernel asks for; how much of it caches serve, and what the compiler keeps
in registers, is not known without a GPU. Weights are loaded once a program and step. The last column is the sum for one
batch element of 8 slots.

"""
_RANGES = ("kernel", "targets", "registers", "spilled", "of them inner", "shared", "products", "barriers")
_COLUMNS = ("kernel", "target", "triton", "registers", "spilled", "of them inner", "shared", "products", "barriers")


def page(results: Results, lines: list[Line]) -> str:
    """The page, for the tiles that the table has."""
    versions = sorted({job.triton for job in results})
    parts = [_INTRODUCTION, *_overview(results, versions), "\n", *_several_sources(results), *_spilling(results)]
    for table, kernels in TABLES:
        parts += (line for entry in table for line in _entry(results, versions, entry, kernels))
    small = [job for job in results if job.cell != WIDEST]
    parts.append(
        "\n## Small cells\n\nThose of `tests/cases.py` that CI compiles anew, too; tiles as fitted to them.\n\n"
    )
    parts += _head("cell", *_COLUMNS)
    for version in versions:
        for job in jobs(version):
            if job in small:
                usage = map(str, results[job].usage)
                parts.append(_row(job.cell, job.kernel, f"{job.target}, {job.kind}", job.triton, *usage))
    parts += _traffic(lines)
    return "".join(parts)


def _several_sources(results: Results) -> Iterable[str]:
    """The kernels whose sources changed while some of their figures stayed."""
    digests = {(job.kernel, compiled.source) for job, compiled in results.items()}
    found = [name for name in KERNELS if sum(kernel == name for kernel, _ in digests) > 1]
    if found:
        yield (
            f"`make matrix` was stopped early: figures of {', '.join(f'`{name}`' for name in found)} are of two states "
            "of their sources; matrix.csv has the digest of each.\n\n"
        )


def _traffic(lines: list[Line]) -> Iterable[str]:
    """What programs move."""
    yield _TRAFFIC
    yield from _head("kernel", "dtype", "D", "rows", "weights", "other loads", "stores", "of a batch element")
    for line in lines:
        each = (line.weights + line.loads + line.stores) * SLOTS // line.rows
        cell = ("float32" if line.wide else "half", str(line.width), str(line.rows))
        yield _row(
            line.kernel, *cell, *(f"{size / 1024:.1f}" for size in (line.weights, line.loads, line.stores, each))
        )


def _overview(results: Results, versions: list[str]) -> Iterable[str]:
    """How much of everything there is results are for."""
    yield from _head("triton", *KERNELS, "spill anything", "spill in inner loops")
    for version in versions:
        every = list(jobs(version))
        found = {job: results[job].usage for job in every if job in results}
        counts = [
            f"{sum(job.kernel == kernel for job in found)} of {sum(job.kernel == kernel for job in every)}"
            for kernel in KERNELS
        ]
        spilling = [usage for usage in found.values() if usage.spills]
        yield _row(version, *counts, str(len(spilling)), str(sum(usage.inner > 0 for usage in spilling)))
    if missing := [version for version in versions if any(job not in results for job in jobs(version))]:
        yield f"\n**Not yet compiled**, with triton {' and '.join(missing)}: what has no row below.\n"


def _spilling(results: Results) -> Iterable[str]:
    """Everything that spills, most first."""
    spilling = sorted((job for job in results if results[job].usage.spills), key=lambda job: -results[job].usage.spills)
    if spilling:
        yield "## What spills\n\nOutside inner loops, unless said otherwise; stores and loads.\n\n"
        yield from (f"* {results[job].usage.spills}, {results[job].usage.inner} inner: {job}\n" for job in spilling)


def _entry(results: Results, versions: list[str], entry: Entry, kernels: tuple[str, ...]) -> Iterable[str]:
    tile = entry.tile
    bound = "any wider D" if entry.width == tiles.ANY else f"D up to {entry.width}"
    yield (
        f"\n## {', '.join(kernels)}: {'float32' if entry.wide else 'half types'}, {bound}, {tile.rows} rows\n\n"
        f"{tile.columns} columns, {tile.inner} of the inner dimension, {tile.head} of a head at a time; "
        f"{tile.warps} warps ({tiles.AMD_WARPS} on gfx942), {tile.stages} stages. "
        f"{entry.reason[0].upper()}{entry.reason[1:]}.\n\n"
    )
    found: dict[tuple[str, str], list[Usage]] = {}
    for kernel in kernels:
        for target in TARGETS:
            for kind in kinds(entry, target):
                wanted = [job_of(version, kernel, entry, target, kind) for version in versions]
                family = "gfx942" if target == "gfx942" else "sm_*"
                place = f"{family}, TF32" if kind == "tf32" else family
                usages = [results[job].usage for job in wanted if job in results]
                if usages:
                    found.setdefault((kernel, place), []).extend(usages)
    rows = [_row(*names, *map(_range, zip(*usages, strict=True))) for names, usages in found.items()]
    yield from (*_head(*_RANGES), *rows) if rows else ("Not yet compiled.\n",)


def _head(*columns: str) -> Iterable[str]:
    return (_row(*columns), f"|{'---|' * len(columns)}\n")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _range(figures: tuple[int, ...]) -> str:
    """The least and the most."""
    return str(figures[0]) if len(set(figures)) == 1 else f"{min(figures)} to {max(figures)}"
