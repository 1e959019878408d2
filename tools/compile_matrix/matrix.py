"""Every Triton kernel compiled with every tile of its table for every target, without a GPU; kept in a CSV file."""

from __future__ import annotations

import ast
import csv
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton

from rmc_kernels import CellSpec, backends
from rmc_kernels.backends.triton import gradients, kept, plan, tiles
from rmc_kernels.backends.triton import launch as launching
from rmc_kernels.backends.triton.device.backward import backward
from rmc_kernels.backends.triton.device.forward import forward
from rmc_kernels.backends.triton.device.forward_kept import forward_kept
from rmc_kernels.backends.triton.device.project import project
from rmc_kernels.backends.triton.device.recompute import recompute
from rmc_kernels.backends.triton.parameters import Linear
from rmc_kernels.backends.triton.tiles import ANY, BACKWARD, PROJECTION, TABLE, Entry, Tile
from tests.cases import SPECS, draw
from tools.offline import TARGETS, offline
from tools.offline.assembly import Usage

#: A row for jobs that differ in the target only; of each target the numbers of `Usage`.
RESULTS = Path(__file__).with_suffix(".csv")
_TILE = tuple(part.name for part in fields(Tile))
#: The versions of triton that are compiled with.
MEASURED = ("3.7.1", "3.9.0")
#: What a product's operands are, and the dtype of x.
KINDS = {"half": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
KERNELS: dict[str, Any] = {
    "forward": forward, "forward_kept": forward_kept, "recompute": recompute, "backward": backward, "project": project,
}  # fmt: skip
#: The tables of tiles, and the kernels that run in them.
TABLES: tuple[tuple[tuple[Entry, ...], tuple[str, ...]], ...] = (
    (TABLE, ("forward", "forward_kept", "recompute")),
    (BACKWARD, ("backward",)),
    (
        tuple(Entry(ANY, wide, PROJECTION, "an ordinary product, left side in blocks") for wide in (False, True)),
        ("project",),
    ),
)
#: The cell of 8 slots and 4 heads at an entry's widest D (where it has no bound 512, in float32 128).
WIDEST = "widest"


@dataclass(frozen=True)
class Job:
    """One kernel to compile with one tile for one target.

    Attributes:
        triton: its version.
        kernel: a key of `KERNELS`.
        kind: a key of `KINDS`.
        width: D of the entry's widest cell.
        tile: of the table, as it is on the target.
        target: one of `TARGETS`.
        cell: `WIDEST` or a key of `SPECS`.
    """

    triton: str
    kernel: str
    kind: str
    width: int
    tile: Tile
    target: str
    cell: str = WIDEST

    def __str__(self) -> str:
        cut = ",".join(map(str, astuple(self.tile)))
        cell = f"D = {self.width}" if self.cell == WIDEST else self.cell
        return f"triton {self.triton}, {self.kernel}, {self.kind}, {cell}, tile {cut}, {self.target}"

    @property
    def spec(self) -> CellSpec:
        """The cell."""
        return CellSpec.sonnet(16, 8, self.width // 4, 4) if self.cell == WIDEST else SPECS[self.cell]


class Compiled(NamedTuple):
    """What became of a job; `source` is the `source` of the kernel then."""

    source: str
    usage: Usage


Results = dict[Job, Compiled]


@cache
def source(kernel: str) -> str:
    """A digest of all that decides on a kernel's code but cell and tile.

    That is every device function that it calls, its plan and the compiler's options.
    """
    texts = {
        "plan": inspect.getsource(plan),
        "kept": "" if kernel in ("forward", "project") else inspect.getsource(kept),
        "options": inspect.getsource(launching.compiler_options) + inspect.getsource(Tile),
    }
    waiting: list[Any] = [KERNELS[kernel]]
    while waiting:
        function = waiting.pop()
        name = f"{function.fn.__module__}.{function.fn.__name__}"
        if name not in texts:
            texts[name] = inspect.getsource(function.fn)
            names = {node.id for node in ast.walk(ast.parse(texts[name])) if isinstance(node, ast.Name)}
            called = [function.fn.__globals__.get(name) for name in names]
            waiting += [each for each in called if isinstance(each, triton.JITFunction)]
    return sha256("".join(text for _, text in sorted(texts.items())).encode()).hexdigest()[:12]


# -- jobs --------------------------------------------------------------------------------------------------------------


def kinds(entry: Entry, target: str) -> tuple[str, ...]:
    """The products that an entry is for; TF32 is never used on AMD."""
    if not entry.wide:
        return ("half",)
    return ("float32",) if target.startswith("gfx") else ("float32", "tf32")


def width(entry: Entry) -> int:
    """D of the widest cell that the entry is for."""
    return min(entry.width, 128 if entry.wide else 512)


def jobs(version: str) -> Iterator[Job]:
    """Everything there is to compile with a triton: the sample, then the rest; TF32, which has no entries, last."""
    yield from dict.fromkeys([*sample(version), *_whole(version)])


def _whole(version: str) -> Iterator[Job]:
    for tf32 in (False, True):
        for table, kernels in TABLES:
            for entry in table:
                for target in TARGETS:
                    for kind in kinds(entry, target):
                        if (kind == "tf32") == tf32:
                            yield from (job_of(version, kernel, entry, target, kind) for kernel in kernels)


def job_of(version: str, kernel: str, entry: Entry, target: str, kind: str, cell: str = WIDEST) -> Job:
    """The job of an entry."""
    return Job(version, kernel, kind, width(entry), entry.tile_on(target), target, cell)


def sample(version: str) -> Iterator[Job]:
    """What CI compiles anew and holds to the committed results."""
    for kernel, entry, target, cell in (
        ("forward", TABLE[1], "sm_80", WIDEST),
        ("forward", TABLE[0], "gfx942", "textbook"),
        ("forward", TABLE[9], "sm_90", WIDEST),
        ("forward", TABLE[12], "sm_86", WIDEST),
        ("forward", TABLE[0], "sm_120", "blocks"),
        ("forward_kept", TABLE[1], "sm_80", "sonnet"),
        ("forward_kept", TABLE[9], "sm_90", "matrix-blocks"),
        ("recompute", TABLE[9], "sm_90", "matrix-blocks"),
        ("recompute", TABLE[12], "sm_80", "textbook"),
        ("backward", BACKWARD[1], "sm_80", WIDEST),
        ("backward", BACKWARD[0], "sm_90", "matrix-blocks"),
        ("backward", BACKWARD[3], "sm_80", "textbook"),
    ):
        yield job_of(version, kernel, entry, target, kinds(entry, target)[0], cell)


def compile_jobs(jobs: Iterable[Job]) -> dict[Job, Usage]:
    """What the compiled kernels of some jobs use that differ in the kernel only, with lengths and resets.

    Raises:
        Exception: whatever Triton raises where one does not compile or does not fit.
    """
    wanted = {job.kernel: job for job in jobs}
    job = next(iter(wanted.values()))
    spec, backend, tile = job.spec, backends.BACKENDS["triton"], job.tile.fitted(job.spec.mem_size)
    call = draw(spec, ("lengths", "resets"), batch=1, steps=1, dtype=KINDS[job.kind]).call()
    with ExitStack() as stack:
        for owner, name, replacement in (
            (tiles, "choose", lambda *args: tile),
            (tiles, "backward", lambda *args: tile),
            (launching, "precision", lambda dtype: "tf32" if job.kind == "tf32" else "ieee"),
            *((gradients, kernel, _Nothing()) for kernel in ("recompute", "backward") if kernel not in wanted),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        launches = stack.enter_context(offline(job.target))
        if "project" in wanted:
            D = job.width
            launching.project_rows(call.x.new_zeros(1, D), Linear(call.x.new_zeros(1, D, D), call.x.new_zeros(1, D)))
        stack.enter_context(patch.object(launching, "project_rows", _projected))
        if "forward" in wanted:
            backend.forward(spec, call, False)
        if "forward_kept" in wanted:
            backend.forward(spec, call, True)
        if wanted.keys() & {"recompute", "backward"}:
            memories = torch.zeros(1, 1, spec.mem_slots, spec.mem_size)
            nothing = call.x.new_empty(0, dtype=torch.uint8)
            backend.backward(spec, call, memories, nothing, torch.zeros_like(memories), [True] * (3 + len(call.params)))
    return {wanted[launch.name]: launch.usage() for launch in launches}


class _Nothing:
    """In place of a kernel that is not to be compiled."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _projected(rows: torch.Tensor, linear: Linear) -> torch.Tensor:
    """In place of `launch.project_rows`, which compiles a kernel of its own."""
    return rows.new_zeros(rows.shape[0], linear.weight.shape[-2])


def worse(found: Usage, before: Usage) -> list[str]:
    """What a kernel uses more of than before."""
    return [
        f"{name}: {now}, was {then}"
        for name, now, then in zip(Usage._fields, found, before, strict=True)
        if name != "mma" and now > then
    ]


# -- results -----------------------------------------------------------------------------------------------------------


def load() -> Results:
    """What was compiled before."""
    found: Results = {}
    if not RESULTS.exists():
        return found
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            tile = Tile(**{name: int(row[name]) for name in _TILE})
            for target in filter(row.get, TARGETS):
                job = Job(row["triton"], row["kernel"], row["kind"], int(row["width"]), tile, target, row["cell"])
                found[job] = Compiled(row["source"], Usage(*map(int, row[target].split())))
    return found


def save(results: Results) -> None:
    """A row for the jobs that the table still has and that differ in the target only, with the `Usage` of each."""
    found: dict[tuple[Job, str], dict[str, str]] = {}
    for version in sorted({job.triton for job in results}):
        for job in jobs(version):
            if job in results:
                usages = found.setdefault((replace(job, target=""), results[job].source), {})
                usages[job.target] = " ".join(map(str, results[job].usage))
    with RESULTS.open("w", newline="") as file:
        columns = ("triton", "kernel", "kind", "width", "cell", *_TILE, "source", *TARGETS)
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {**vars(job), **vars(job.tile), "source": source, **usages} for (job, source), usages in found.items()
        )


def run(todo: list[Job]) -> bool:
    """Compile what is missing; whether all is well."""
    results = load()
    known = [job for job in todo if job in results and results[job].source == source(job.kernel)]
    print(f"{len(known)} of {len(todo)} are known", flush=True)
    fine = not any(results[job].usage.inner for job in known)
    left = len(todo) - len(known)
    waiting = [job for job in todo if job not in known]
    groups = [list(alike) for _, alike in groupby(waiting, lambda job: replace(job, kernel=""))]
    while groups:
        group, start = groups.pop(0), time.monotonic()
        try:
            found = compile_jobs(group)
        except Exception as error:  # every tile is to be tried
            if len(group) > 1:
                groups = [[job] for job in group] + groups
            else:
                print(f"{group[0]}: {type(error).__name__}: {str(error)[-300:]}", flush=True)
                left, fine = left - 1, False
            continue
        results |= {job: Compiled(source(job.kernel), usage) for job, usage in found.items()}
        save(results)
        left, fine = left - len(group), fine and not any(usage.inner for usage in found.values())
        for job, usage in found.items():
            print(f"{job}: {usage}", flush=True)
        print(f"{left} left, {time.monotonic() - start:.0f} s", flush=True)
    return fine
