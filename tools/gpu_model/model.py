"""From counts to time per step: the fused forward kernel as it is, other schedules of it, and what it has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import ceil, sqrt

import torch

from rmc_kernels import CellSpec
from rmc_kernels.backends.triton import tiles
from rmc_kernels.bench import eager
from rmc_kernels.bench.models import equal_hidden_size
from tools.gpu_model import machines
from tools.gpu_model.counting import HEADS, Counts, Key
from tools.gpu_model.machines import Gpu

#: What is modelled.
SLOTS, WIDTHS, BATCHES = (1, 4, 8), (64, 128, 256, 512), (1, 16, 256, 4096)
FLOAT32_WIDTHS = (64, 128)
BACKWARD_WIDTHS = (64, 128)
#: Phases of a step with a synchronisation after each: gates with q, k, v; attention; two MLP layers; the update.
PHASES = 5
#: Elements per memory element that the eager loop's operators read and write in a step, in their order in `eager_step`,
#: the copies in `cat`, before `flatten` and in `stack` among them; F = 3 D.
EAGER_ELEMENTS = sum((4, 6, 6, 4, 2, 3, 2, 2, 2, 2, 3, 2, 2, 3, 4, 4, 2, 3, 4, 2))
#: Kernels of a step of the eager loop backwards: operators that are no views.
EAGER_BACKWARD_KERNELS = 55
INPUT_SIZE = 64


@dataclass(frozen=True)
class Size:
    """A sonnet cell of one block, two MLP layers, four heads and unit gates, and a batch."""

    slots: int
    width: int
    batch: int
    dtype: str = "bfloat16"

    @property
    def spec(self) -> CellSpec:
        """The cell."""
        return CellSpec.sonnet(INPUT_SIZE, self.slots, self.width // HEADS, HEADS)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x's dtype."""
        return 4 if self.dtype == "float32" else 2

    def tile(self, gpu: Gpu) -> tiles.Tile:
        """The one that `tiles.choose` takes."""
        return tiles.choose(self.spec, getattr(torch, self.dtype), gpu.target, self.batch, gpu.processors)

    def key(self, rows: int, kernel: str = "forward") -> Key:
        """What has to be counted for a tile of so many rows: it does the same whatever its rows belong to."""
        return Key(self.dtype, self.width, rows, kernel)


def sizes(dtype: str) -> list[Size]:
    """Those of the page."""
    widths = FLOAT32_WIDTHS if dtype == "float32" else WIDTHS
    slots = SLOTS[-1:] if dtype == "float32" else SLOTS
    return [Size(*each, dtype) for each in product(slots, widths, BATCHES)]


#: Of the tiles of the table.
ROWS = (16, 32, 64)
#: What is counted; of the backward pass the tile of small batches.
KEYS = (
    *(Key("bfloat16", *each) for each in product(WIDTHS, ROWS)),
    *(Key("float32", *each) for each in product(FLOAT32_WIDTHS, ROWS)),
    *(Key("bfloat16", *each) for each in product(BACKWARD_WIDTHS, ROWS[:1], ("backward", "recompute"))),
)


@dataclass(frozen=True)
class Estimate:
    """Modelled time of a step, in seconds, and what it is bound by."""

    seconds: float
    bound: str

    @classmethod
    def longest(cls, parts: Mapping[str, float], times: float = 1.0) -> Estimate:
        """Of things that go on side by side, in seconds."""
        bound = max(parts, key=parts.__getitem__)
        return cls(times * parts[bound], bound)


@dataclass(frozen=True)
class Fused:
    """The present kernel with some tile.

    Attributes:
        programs: of the launch.
        together: that share a multiprocessor.
        rounds: so many times as programs fit at once.
        time: of a step.
    """

    programs: int
    together: int
    rounds: int
    time: Estimate


@dataclass(frozen=True)
class Row:
    """One size on one GPU.

    Attributes:
        size, rows: what runs, and the rows of its tile.
        fused: the present kernel.
        best: rows of the tile with which that would take least.
        others: other schedules of it, and rivals, by name.
    """

    size: Size
    rows: int
    fused: Fused
    best: tuple[int, Fused]
    others: Mapping[str, Estimate]


def pipes(counts: Counts, gpu: Gpu) -> dict[str, float]:
    """Cycles of a step for which one program keeps each unit of a multiprocessor busy."""
    each = counts.warps / machines.SCHEDULERS
    done = counts.executed
    return {
        "tensor cores": done.get("matrix", 0) * each * gpu.matrix,
        "FP32 ALU": done.get("fp32", 0) * each * gpu.fp32,
        "other ALU": done.get("simple", 0) * each * gpu.simple,
        "exponentials": done.get("special", 0) * each * gpu.special,
        "issue": sum(number for unit, number in done.items() if unit != "free") * each,
        "shared memory": counts.wavefronts * 128 / gpu.shared,
        "L2 port": counts.sectors * machines.SECTOR / gpu.l2_port,
    }


def chain(counts: Counts, gpu: Gpu) -> float:
    """Cycles of a step that barriers and dependent instructions take: between the two replays."""
    return sqrt(counts.in_order[gpu.name] * counts.reordered[gpu.name])


def resident(counts: Counts, gpu: Gpu) -> int:
    """Programs that fit a multiprocessor side by side."""
    threads, registers = 32 * counts.warps, 8 * ceil(counts.registers / 8)
    by_registers = machines.REGISTERS // (registers * threads)
    by_shared = gpu.shared_memory // (counts.shared + machines.SHARED_OF_SYSTEM)
    return max(1, min(by_registers, by_shared, machines.WARPS // counts.warps, machines.PROGRAMS))


def fused(size: Size, gpu: Gpu, counts: Counts, rows: int) -> Fused:
    """The present kernel: every program takes its tile through all steps; a full machine is passed several times."""
    programs = ceil(size.batch / (rows // tiles.padded_rows(size.spec)))
    each = ceil(programs / gpu.processors)
    together = min(each, resident(counts, gpu))
    rounds = ceil(each / together)
    parts = {"barriers, latency": chain(counts, gpu) / gpu.clock}
    parts |= {name: together * cycles / gpu.clock for name, cycles in pipes(counts, gpu).items()}
    parts["L2"] = programs / rounds * counts.sectors * machines.SECTOR / gpu.l2_rate
    parts["memory"] = least_bytes(size) / rounds / gpu.memory_rate
    return Fused(programs, together, rounds, Estimate.longest(parts, rounds))


def least_bytes(size: Size) -> float:
    """Bytes to and from memory that a step cannot avoid: the input side's terms, the memories it returns."""
    spec = size.spec
    row = (spec.qkv_size + 2 * spec.gate_size) * size.itemsize
    return size.batch * (row + 4 * spec.mem_slots * spec.mem_size)


def row(size: Size, gpu: Gpu, counted: Mapping[Key, Counts]) -> Row:
    """All that is modelled of a size, whose elements fit every tile."""
    by_rows = {rows: fused(size, gpu, counted[size.key(rows)], rows) for rows in ROWS}
    chosen = size.tile(gpu).rows
    best = min(by_rows.items(), key=lambda item: item[1].time.seconds)
    return Row(size, chosen, by_rows[chosen], best, others(size, gpu, counted))


def others(size: Size, gpu: Gpu, counted: Mapping[Key, Counts]) -> dict[str, Estimate]:
    """The same phases under other schedules, and rivals."""
    spec, rows = size.spec, size.batch * size.slots
    weights = size.itemsize * spec.mem_size * (spec.qkv_size + 2 * spec.gate_size + 2 * spec.mem_size)
    wide, narrow = 2 * spec.mem_size + 2 * spec.gate_size, spec.qkv_size + 2 * spec.mem_size
    scratch = rows * (4 * wide + size.itemsize * narrow)
    flops = spec.flops_per_step(size.batch, part="recurrent")
    phase = phase_seconds(size, gpu, counted)

    def kernels(number: int, between: float, each: float, flops: float, l2_bytes: float, memory: float) -> Estimate:
        """So many kernels or phases one after the other, and work that they share evenly."""
        waiting = number * (between + each)
        work = Estimate.longest(
            {
                "products": flops / (product_rate(size, gpu) * machines.PRODUCT_EFFICIENCY),
                "L2": l2_bytes / gpu.l2_rate,
                "memory": memory / gpu.memory_rate,
            }
        )
        return Estimate(waiting + work.seconds, "synchronisation" if waiting > work.seconds else work.bound)

    hidden = equal_hidden_size(spec.parameter_count, INPUT_SIZE, 4)
    passes = size.itemsize * EAGER_ELEMENTS * rows * spec.mem_size
    lstm_flops, lstm_row = 8 * size.batch * hidden**2, size.itemsize * size.batch * hidden
    lstm_weights = size.itemsize * 4 * hidden**2
    least, shortest = least_bytes(size), machines.SHORTEST_KERNEL
    return {
        "cooperative": kernels(PHASES, machines.GRID_BARRIER, phase, flops, 2 * scratch + weights, least),
        "phases in a graph": kernels(PHASES, machines.GRAPH_NODE, phase, flops, 2 * scratch + weights, least),
        "eager in a graph": kernels(
            eager.KERNELS_PER_STEP, machines.GRAPH_NODE, shortest, flops, passes + weights, least
        ),
        # Its gates, four times as wide as its state, are written and read; those of the input come from memory.
        "cuDNN LSTM": kernels(
            machines.LSTM_KERNELS, machines.GRAPH_NODE, shortest, lstm_flops, lstm_weights + 10 * lstm_row, 5 * lstm_row
        ),
    }  # fmt: skip


def product_rate(size: Size, gpu: Gpu) -> float:
    """FLOP/s of products: on the tensor cores, or exact in float32."""
    return gpu.float_rate if size.dtype == "float32" else gpu.tensor_rate


def phase_seconds(size: Size, gpu: Gpu, counted: Mapping[Key, Counts]) -> float:
    """A phase of which every program has one block of columns: as long as such a block takes in the present kernel."""
    key = size.key(ROWS[0])
    return chain(counted[key], gpu) / column_blocks(key) / gpu.clock


def column_blocks(key: Key) -> int:
    """Blocks of columns that a program of the present kernel takes one after the other in a step."""
    spec, tile = key.spec, key.tile
    widths = (spec.qkv_size, 2 * spec.gate_size, spec.mem_size, spec.mem_size, spec.mem_size)
    heads = spec.num_heads * ceil(spec.head_size / tile.head_columns(spec.head_size))
    return sum(ceil(width / tile.columns) for width in widths) + heads


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A forward and a backward pass, in seconds a step; the parts of the backward pass come one after the other.

    Attributes:
        size: what runs, with tiles of the fewest rows.
        forward: the forward pass.
        recomputation: of the activations, all steps side by side.
        walk: back through the steps.
        products: of the weight gradients, and moving what the launches before leave for them.
        rivals: by name.
    """

    size: Size
    forward: float
    recomputation: float
    walk: float
    products: float
    rivals: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """All together."""
        return self.forward + self.recomputation + self.walk + self.products


def training_sizes() -> list[Size]:
    """Those of the page: for larger batches other tiles are chosen, which are not counted."""
    return [Size(*each) for each in product(SLOTS, BACKWARD_WIDTHS, BATCHES[:-1])]


def training(size: Size, gpu: Gpu, counted: Mapping[Key, Counts]) -> Training:
    """All that is modelled of a training step of a long sequence."""
    rows = ROWS[0]
    once = fused(size, gpu, counted[size.key(rows)], rows)
    walk = fused(size, gpu, counted[size.key(rows, "backward")], rows)
    spec, waiting = size.spec, machines.GRAPH_NODE + machines.SHORTEST_KERNEL
    flops = spec.flops_per_step(size.batch, part="recurrent") / (product_rate(size, gpu) * machines.PRODUCT_EFFICIENCY)
    moved = 2 * once.programs * rows * kept_bytes(size) / gpu.memory_rate
    kernels = {"eager in a graph": eager.KERNELS_PER_STEP + EAGER_BACKWARD_KERNELS}
    kernels["cuDNN LSTM"] = 2 * machines.LSTM_KERNELS
    return Training(
        size,
        once.time.seconds,
        side_by_side(once.programs, gpu, counted[size.key(rows, "recompute")]),
        walk.time.seconds,
        max(flops, moved),
        {name: number * waiting for name, number in kernels.items()},
    )


def side_by_side(programs: int, gpu: Gpu, counts: Counts) -> float:
    """Seconds a step where programs of all steps run together, as many as fit."""
    together = resident(counts, gpu)
    cycles = max(chain(counts, gpu), *(together * busy for busy in pipes(counts, gpu).values()))
    traffic = programs * counts.sectors * machines.SECTOR / gpu.l2_rate
    return max(programs / (gpu.processors * together) * cycles / gpu.clock, traffic)


def kept_bytes(size: Size) -> int:
    """Of a row and step: the activations and the workspace of docs/triton-backend.md."""
    spec = size.spec
    width, gates, layers = spec.mem_size, 2 * spec.gate_size, spec.attention_mlp_layers
    kept = size.itemsize * (spec.qkv_size + (layers - 1) * width) + 4 * (2 * width + 7 + gates)
    return kept + size.itemsize * ((2 + layers) * width + spec.qkv_size + width + gates)
