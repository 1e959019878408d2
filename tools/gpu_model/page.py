"""gpu-model.md: template.md, filled from what was counted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from rmc_kernels.bench import eager
from tools.gpu_model import machines, model
from tools.gpu_model.counting import TARGET, Counts, Key
from tools.gpu_model.machines import GPUS, Gpu
from tools.gpu_model.model import Fused, Row, row, sizes, training, training_sizes

PAGE = Path(__file__).with_name("gpu-model.md")
TEMPLATE = Path(__file__).with_name("template.md")
RIVALS = ("eager in a graph", "cuDNN LSTM")
SCHEDULES = ("cooperative", "phases in a graph")
PHASES = ("gate_terms", "project_qkv", "attend", "hidden_layer", "last_layer", "update", "between phases")
#: Functions of Triton's library that join the values of several warps.
SUMS = ("sum", "max")

Counted = Mapping[Key, Counts]


def page(counted: Counted) -> str:
    """The whole page."""
    gpu = GPUS[0]
    parts = [
        _times(found, dtype, [row(size, found, counted) for size in sizes(dtype)])
        for found, dtype in ((gpu, "bfloat16"), (gpu, "float32"), (GPUS[1], "bfloat16"))
    ]
    return TEMPLATE.read_text(encoding="utf-8").format(
        **_conclusions(gpu, [row(size, gpu, counted) for size in sizes("bfloat16")], counted),
        uncertainty=f"{machines.UNCERTAINTY:g}",
        node=f"{1e6 * machines.GRAPH_NODE:g}",
        shortest=f"{1e6 * machines.SHORTEST_KERNEL:g}",
        grid=f"{1e6 * machines.GRID_BARRIER:g}",
        efficiency=f"{100 * machines.PRODUCT_EFFICIENCY:g}",
        phases=model.PHASES,
        kernels=eager.KERNELS_PER_STEP,
        elements=model.EAGER_ELEMENTS,
        lstm_kernels=machines.LSTM_KERNELS,
        target=TARGET,
        ceilings=_ceilings(),
        counts=_counts(gpu, counted),
        barrier_table=_barriers(counted),
        times="\n".join(parts).rstrip(),
        training=_training(gpu, counted),
        back_kernels=model.EAGER_BACKWARD_KERNELS,
    )


# -- tables ------------------------------------------------------------------------------------------------------------


def _ceilings() -> str:
    """Every parameter of a GPU, and where they are from."""
    rows = [
        (
            known.name.replace("_", " "),
            *(_number(getattr(gpu, known.name)) for gpu in GPUS),
            known.metadata["meaning"],
            known.metadata["source"],
        )
        for known in fields(Gpu)
        if known.metadata
    ]
    sources = "".join(f"* {key}: {source}.\n" for key, source in machines.SOURCES.items())
    return f"{_table(('', *(gpu.name for gpu in GPUS), 'meaning', 'source'), rows)}\n{sources}"


def _counts(gpu: Gpu, counted: Counted) -> str:
    rows = []
    for key, found in counted.items():
        done, busy = found.executed, model.pipes(found, gpu)
        fullest = max(busy, key=busy.__getitem__)
        rows.append(
            (
                str(key),
                str(found.warps),
                *(f"{done.get(unit, 0):,.0f}" for unit in ("matrix", "fp32", "simple", "special")),
                f"{found.wavefronts / 1000:,.1f}",
                f"{found.sectors * machines.SECTOR / 1024:,.0f}",
                *(f"{done.get(unit, 0):,.0f}" for unit in ("barrier", "wait")),
                f"{found.reordered[gpu.name] / 1000:,.0f} to {found.in_order[gpu.name] / 1000:,.0f}",
                f"{busy[fullest] / 1000:,.1f}, {fullest}",
            )
        )
    head = (
        "", "warps", "mma", "fp32", "other ALU", "special", "wavefronts, k", "L2 KiB", "barriers", "waits",
        "chain, k cycles", "busiest unit, k cycles",
    )  # fmt: skip
    return _table(head, rows)


def _barriers(counted: Counted) -> str:
    rows = []
    for key, found in counted.items():
        if key.kernel == "forward":
            rows.append((str(key), *(f"{_of_phase(found, phase):,.0f}" for phase in PHASES), f"{_sums(found):,.0f}"))
    return _table(("", *(phase.replace("_", " ") for phase in PHASES), "sums"), rows)


def _of_phase(counts: Counts, phase: str) -> float:
    """Barriers of a phase."""
    return sum(number for place, number in counts.barriers.items() if place.startswith(f"{phase}: "))


def _sums(counts: Counts) -> float:
    """Barriers inside of sums."""
    return sum(number for place, number in counts.barriers.items() if place.split(": ")[1] in SUMS)


def _times(gpu: Gpu, dtype: str, rows: Iterable[Row]) -> str:
    lines = []
    for found in rows:
        size, now = found.size, found.fused.time.seconds
        best = min(found.others[name].seconds for name in SCHEDULES)
        rows_best, fused_best = found.best
        lines.append(
            (
                f"{size.slots}, {size.width}, {size.batch}",
                str(found.rows),
                _programs(found.fused),
                _micro(now, now <= best),
                found.fused.time.bound,
                "" if rows_best == found.rows else f"{rows_best}: {_micro(fused_best.time.seconds)}",
                *(_micro(found.others[name].seconds, found.others[name].seconds < now) for name in SCHEDULES),
                *(_micro(found.others[name].seconds) for name in RIVALS),
            )
        )
    head = ("slots, D, B", "rows", "programs", "as it is", "bound by", "best rows", *SCHEDULES, *RIVALS)
    return f"## {gpu.name}, {dtype}: µs a step, modelled\n\n{_table(head, lines)}"


def _training(gpu: Gpu, counted: Counted) -> str:
    lines = []
    for size in training_sizes():
        found = training(size, gpu, counted)
        parts = (found.forward, found.recomputation, found.walk, found.products, found.seconds)
        lines.append(
            (
                f"{size.slots}, {size.width}, {size.batch}",
                *map(_micro, parts),
                *(_micro(found.rivals[name]) for name in RIVALS),
            )
        )
    head = ("slots, D, B", "forward", "recomputation", "walk back", "products", "all", *RIVALS)
    return _table(head, lines)


def _programs(fused: Fused) -> str:
    together = f", {fused.together} together" if fused.together > 1 else ""
    return f"{fused.programs:,}{together}" + (f", {fused.rounds} rounds" if fused.rounds > 1 else "")


# -- figures of the conclusions ----------------------------------------------------------------------------------------


def _conclusions(gpu: Gpu, rows: Sequence[Row], counted: Counted) -> dict[str, str]:
    def slower(chosen: Sequence[Row], rival: str, factor: float = 1.0) -> int:
        """In how many the kernel takes more than so many times what a rival takes; below 1 it is the faster one."""
        return sum(r.fused.time.seconds > factor * r.others[rival].seconds for r in chosen)

    def behind(chosen: Sequence[Row], rival: str) -> str:
        clear = slower(chosen, rival, machines.UNCERTAINTY)
        return f"{slower(chosen, rival)} of {len(chosen)} sizes ({clear} clearly)"

    def first(width: int) -> str:
        return _micro(next(r.fused.time.seconds for r in rows if (r.size.width, r.size.batch) == (width, 1)))

    def gain(found: Row) -> float:
        return found.fused.time.seconds / min(found.others[name].seconds for name in SCHEDULES)

    def of_lstm(found: Row) -> float:
        return found.fused.time.seconds / found.others[RIVALS[1]].seconds

    largest = max(row.size.batch for row in rows)
    usual = [row for row in rows if row.size.batch < largest]
    narrow = [row for row in usual if row.size.width <= 128]
    ahead, clearly = (len(narrow) - slower(narrow, RIVALS[0], factor) for factor in (1, 1 / machines.UNCERTAINTY))
    by_tile = [row.fused.time.seconds / row.best[1].time.seconds for row in rows]
    singles = [of_lstm(row) for row in rows if row.size.batch == 1]
    worst = max(rows, key=gain)
    example = counted[Key("bfloat16", 128, 16)]
    fp32 = {"fp32_wide": 512, "fp32_resident": 256}
    back = [
        model.chain(counted[Key("bfloat16", width, 16, "backward")], gpu)
        / model.chain(counted[Key("bfloat16", width, 16)], gpu)
        for width in model.BACKWARD_WIDTHS
    ]
    trainings = [training(size, gpu, counted) for size in training_sizes()]
    trained = sum(found.seconds < found.rivals[RIVALS[0]] for found in trainings)
    return {
        "gpu": gpu.name,
        "sizes": str(len(rows)),
        "waiting": str(sum(row.fused.time.bound == "barriers, latency" for row in rows)),
        **{f"d{width}": first(width) for width in model.WIDTHS},
        "barriers": f"{example.executed['barrier']:,.0f}",
        "sums": f"{_sums(example):,.0f}",
        "attention": f"{_of_phase(example, 'attend'):,.0f}",
        **{name: f"{counted[Key('bfloat16', width, 16)].executed['fp32']:,.0f}" for name, width in fp32.items()},
        "back": " and ".join(f"{ratio:.1f}" for ratio in back),
        "trained": f"{trained} of {len(trainings)}",
        "eager": _micro(eager.KERNELS_PER_STEP * (machines.GRAPH_NODE + machines.SHORTEST_KERNEL)),
        "narrow": f"{ahead} of {len(narrow)} sizes ({clearly} clearly)",
        "wide_lost": behind([row for row in usual if row.size.width >= 256], RIVALS[0]),
        "large_lost": behind([row for row in rows if row.size.batch == largest], RIVALS[0]),
        "lstm_lost": behind(rows, RIVALS[1]),
        "lstm_factor": f"{min(singles):.0f} to {max(singles):.0f}",
        "sixteen": f"{sum(row.best[0] == min(model.ROWS) for row in rows)} of {len(rows)}",
        "better_tile": str(sum(factor > 1 for factor in by_tile)),
        "tile_gain": f"{max(by_tile):.1f}",
        "worst": f"{worst.size.slots} slots, D = {worst.size.width}, B = {worst.size.batch}",
        "gain": f"{gain(worst):.0f}",
    }


def _micro(seconds: float, bold: bool = False) -> str:
    micro = 1e6 * seconds
    text = f"{micro:,.0f}" if micro >= 10 else f"{micro:.1f}"
    return f"**{text}**" if bold else text


def _number(value: float) -> str:
    return re.sub(r"e\+0?", "e", f"{value:.4g}") if value >= 1e6 else f"{value:,g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))
