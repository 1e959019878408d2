"""What a step of a kernel executes, counted: the kernel is compiled for sm_80 and its PTX is run.

One program with a full tile runs one step and three; half the difference is a step. Of `recompute`, in which a program
is a step, one runs.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton

from rmc_kernels import CellSpec, backends
from rmc_kernels.backends.triton import device, tiles
from rmc_kernels.backends.triton.device.backward import backward
from rmc_kernels.backends.triton.device.forward import forward
from rmc_kernels.backends.triton.device.recompute import recompute
from tests.cases import draw
from tools.compile_matrix.matrix import source
from tools.gpu_model.machines import GPUS, SECTOR
from tools.gpu_model.operations import operations
from tools.gpu_model.replay import Scoreboard
from tools.offline import Launch, offline
from tools.ptxsim import Program
from tools.ptxsim import launch as simulate
from tools.ptxsim.arithmetic import Array
from tools.ptxsim.memory import Memory
from tools.ptxsim.program import Code
from tools.ptxsim.unit import Unit

RESULTS = Path(__file__).with_name("counts.json")
#: Where the counted code is from. On sm_90 tiles of 64 rows take wgmma, which the simulator does not run.
TARGET = "sm_80"
SLOTS, HEADS = 8, 4
KERNELS = {"forward": forward, "backward": backward, "recompute": recompute}
#: Banks of shared memory, four bytes wide.
BANKS = 32


@dataclass(frozen=True)
class Key:
    """What is counted: a cell of 8 slots and 4 heads, and a tile.

    Attributes:
        dtype: name of the torch dtype of x.
        width: D.
        rows: of the tile.
        kernel: a key of `KERNELS`.
    """

    dtype: str
    width: int
    rows: int
    kernel: str = "forward"

    def __str__(self) -> str:
        kernel = "" if self.kernel == "forward" else f"{self.kernel}, "
        return f"{kernel}{self.dtype}, D = {self.width}, {self.rows} rows"

    @property
    def source(self) -> str:
        """Digest of the kernel's present sources."""
        return source(self.kernel)

    @property
    def spec(self) -> CellSpec:
        """The cell."""
        return CellSpec.sonnet(64, SLOTS, self.width // HEADS, HEADS)

    @property
    def tile(self) -> tiles.Tile:
        """The tile of the table."""
        wide = self.dtype == "float32"
        fitting = [entry for entry in tiles.TABLE if entry.wide == wide and entry.width >= self.width]
        return next(e.tile for e in fitting if e.width == fitting[0].width and e.tile.rows == self.rows).fitted(
            self.width
        )


@dataclass(frozen=True)
class Counts:
    """What one program does in a step, and the compiled kernel.

    Attributes:
        source: digest of the kernel's sources, see `compile_matrix.source`.
        warps, registers, shared: of a program; registers of a thread, bytes of shared memory.
        executed: unit -> instructions of a warp.
        wavefronts: of shared memory, all warps together, shuffles included.
        sectors: of L2, all warps together.
        barriers: how often a program passes those inside a device function, by "phase: function".
        in_order, reordered: GPU -> cycles, see `replay`.
    """

    source: str
    warps: int
    registers: int
    shared: int
    executed: Mapping[str, float]
    wavefronts: float
    sectors: float
    barriers: Mapping[str, float] = field(default_factory=dict)
    in_order: Mapping[str, float] = field(default_factory=dict)
    reordered: Mapping[str, float] = field(default_factory=dict)


class _Traced(Program):
    """A program that notes which blocks run."""

    def __init__(self, ptx: str) -> None:
        super().__init__(ptx)
        self.trace: list[int] = []

    def code(self, block: int, masked: bool) -> Code:
        self.trace.append(block)
        return super().code(block, masked)


class _Traffic:
    """Wavefronts and sectors that warps move, by the number of the instruction."""

    def __init__(self) -> None:
        self.wavefronts: dict[int, list[int]] = defaultdict(list)
        self.sectors: dict[int, list[int]] = defaultdict(list)

    def memory(self, *arguments: Any) -> Memory:
        """A memory of the simulator that reports here."""
        traffic, window = self, arguments[4]

        class Noted(Memory):
            def locate(self, unit: Unit, address: Array, size: int, lanes: Array | None, site: int) -> Array:
                offset = super().locate(unit, address, size, lanes, site)
                warp = unit.by.warp if lanes is None else unit.by.warp[lanes]
                (traffic.wavefronts if window else traffic.sectors)[site] += (
                    wavefronts(offset, size, warp) if window else sectors(offset, warp)
                )
                return offset

        return Noted(*arguments)

    def per_warp(self) -> dict[int, float]:
        """Of one warp's execution, on average, by instruction; those of a copy are its sectors."""
        found = {site: float(np.mean(moved)) for site, moved in self.wavefronts.items()}
        return found | {site: float(np.mean(moved)) for site, moved in self.sectors.items()}


def sectors(offset: Array, warp: Array) -> list[int]:
    """How many sectors each warp touches; accesses [threads] are aligned, so none spans two."""
    return [len(np.unique(offset[warp == one] // SECTOR)) for one in np.unique(warp)]


def wavefronts(offset: Array, size: int, warp: Array) -> list[int]:
    """How many wavefronts each warp takes: the most different words in one bank."""
    words = offset[:, None] // 4 + np.arange(max(size // 4, 1))
    found = []
    for one in np.unique(warp):
        different = np.unique(words[warp == one])
        found.append(int(np.bincount(different % BANKS).max()))
    return found


def launch_of(key: Key, steps: int) -> Launch:
    """The launch of the kernel for one full tile of elements; what it reads is not computed, nor does it matter."""
    elements = key.rows // tiles.padded_rows(key.spec)
    call = draw(key.spec, batch=elements, steps=steps, dtype=getattr(torch, key.dtype)).call()
    triton_backend = backends.BACKENDS["triton"]
    with patch.object(tiles, "choose", return_value=key.tile), offline(TARGET) as found:
        memories, kept, _ = triton_backend.forward(key.spec, call, key.kernel == "backward")
        if key.kernel != "forward":
            needs = [True] * (3 + len(call.params))
            triton_backend.backward(key.spec, call, memories, kept, torch.zeros_like(memories), needs)
    (launch,) = [each for each in found if each.name == key.kernel]
    return launch


def count(key: Key) -> Counts:
    """Compile, run, count and replay."""
    runs = []
    for steps in (1,) if key.kernel == "recompute" else (1, 3):
        found = launch_of(key, steps)
        program, traffic = _Traced(found.file("ptx").read_text()), _Traffic()
        with patch("tools.ptxsim.machine.Memory", traffic.memory):
            simulate(program, found.grid, found.arguments, warps=found.metadata.num_warps, shared=found.metadata.shared)
        runs.append(_run(program, traffic, found.metadata.num_warps))
    usage = found.usage()
    last, before = runs[-1], runs[0] if len(runs) > 1 else {}
    # Two runs are two steps apart, one is a step.
    step = {name: round((value - before.get(name, 0)) / len(runs), 1) for name, value in last.items()}

    def named(kind: str) -> dict[str, float]:
        return {name.removeprefix(f"{kind} "): value for name, value in step.items() if name.startswith(f"{kind} ")}

    return Counts(
        key.source, found.metadata.num_warps, usage.registers, usage.shared, named("executed"), step["wavefronts"],
        step["sectors"], named("at"), named("in order"), named("reordered"),
    )  # fmt: skip


def _run(program: _Traced, traffic: _Traffic, warps: int) -> dict[str, float]:
    """Everything that is counted of one run, by name."""
    known, sites = operations(program.kernel), list(_sites(program))
    found = Counter(f"executed {known[site].unit}" for site in sites)
    found.update(
        f"at {_place(program.kernel.instructions[site].location)}" for site in sites if known[site].unit == "barrier"
    )
    totals: dict[str, float] = dict(found)
    totals["wavefronts"] = totals.get("executed shuffle", 0) * warps
    totals["wavefronts"] += sum(sum(traffic.wavefronts[site]) for site in traffic.wavefronts)
    totals["sectors"] = sum(sum(moved) for moved in traffic.sectors.values())
    moved = traffic.per_warp()
    for gpu in GPUS:
        for order in ("in order", "reordered"):
            board = Scoreboard(gpu, warps, moved, order == "reordered")
            totals[f"{order} {gpu.name}"] = board.run(known, sites)
    return totals


def _place(location: str) -> str:
    """The phase and the function, "phase: function", of a location "file:line:column @[ caller ... ]"."""
    names = [_function(*found.groups()) for found in re.finditer(r"(\w+\.py):(\d+)", location)]
    return f"{names[-2] if len(names) > 1 else 'between phases'}: {names[0]}"


@lru_cache(maxsize=4096)
def _function(file: str, line: str) -> str:
    """The function of a device module, or of Triton's library, that has a line."""
    for folder in (Path(device.__file__).parent, Path(triton.language.__file__).parent):
        if (folder / file).exists():
            tree = ast.parse((folder / file).read_text())
            functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            return next(f.name for f in functions if f.lineno <= int(line) <= (f.end_lineno or 0))
    raise FileNotFoundError(file)


def _sites(program: _Traced) -> Iterator[int]:
    for block in program.trace:
        yield from range(program.blocks[block].start, program.blocks[block].stop)


# -- results -----------------------------------------------------------------------------------------------------------


def load() -> dict[Key, Counts]:
    """What was counted."""
    if not RESULTS.exists():
        return {}
    return {Key(**entry.pop("key")): Counts(**entry) for entry in json.loads(RESULTS.read_text())}


def save(found: Mapping[Key, Counts]) -> None:
    """Write all of it."""
    order = sorted(found, key=lambda key: (key.kernel != "forward", key.dtype, key.width, key.rows))
    lines = [json.dumps({"key": asdict(key)} | asdict(found[key])) for key in order]
    RESULTS.write_text("[\n " + ",\n ".join(lines) + "\n]\n")
