"""What the CPU backend is chosen for: half types, one step at a time, a step of training, a machine with other work.

Each is a table of its own, as none fits the list of cases: they compare dtypes, need the bare C++ call, or another
process. Contestants take turns, as everywhere here; figures are medians, but for the time outside of the kernel.
"""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmc_kernels import RelationalMemory, RelationalMemoryCell
from rmc_kernels.backends import cpu
from rmc_kernels.bench import eager, timing
from rmc_kernels.bench.markdown import table
from rmc_kernels.bench.models import equal_hidden_size
from rmc_kernels.bench.record import DIGITS
from rmc_kernels.spec import CellSpec

INPUTS = 64
LARGE = CellSpec.sonnet(INPUTS, 8, 64, 4)
SMALL = CellSpec.sonnet(INPUTS, 4, 32, 4)
TINY = CellSpec.sonnet(INPUTS, 4, 4, 4)
_BURN = "while True: pass"
_ROUND = 10  # calls


@dataclass(frozen=True)
class Figure:
    """One cell of a table.

    Attributes:
        use: "half", "step", "train" or "busy".
        case: the sizes, as shown.
        contestant: who was timed.
        seconds: the median of one call.
        ratio: the eager loop's time over this one; or this one over the time of the bare C++ call, of the empty
            function, or of the same contestant alone.
        outside: the least time of a call outside of the C++ code, in seconds; all of it for the empty function, None
            for contestants of others.
    """

    use: str
    case: str
    contestant: str
    seconds: float
    ratio: float
    outside: float | None = None


def half(budget: float) -> list[Figure]:
    """bfloat16 and float16 on one thread; ratio: the frozen eager float32 loop's time over this one."""
    figures = []
    for batch in (16, 64):
        for training in (False, True):
            calls = dict(_half_calls(batch, 16, training))
            mode = "forward + backward" if training else "forward"
            figures += _against("half", f"B={batch} T=16, {_sizes(LARGE)}, {mode}", calls, "eager", budget, True)
    return figures


def _half_calls(batch: int, steps: int, training: bool) -> Iterator[tuple[str, timing.Call]]:
    x, memory = torch.randn(batch, steps, INPUTS), torch.randn(batch, LARGE.mem_slots, LARGE.mem_size)
    layer = RelationalMemory.from_spec(LARGE, backend="cpu")
    params = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    grad = torch.randn(batch, steps, LARGE.mem_slots * LARGE.mem_size)

    def timed(run: Callable[[], Tensor], leaves: Iterable[Tensor]) -> timing.Call:
        wanted = list(leaves)

        def backward() -> object:
            output = run()
            return torch.autograd.grad(output, wanted, grad.to(output.dtype))

        return backward if training else torch.no_grad()(run)

    def autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output: Tensor = layer(x, memory)[0]
        return output

    yield "eager", timed(lambda: eager.unroll(x, memory, params, LARGE).flatten(2), params.values())
    yield "cpu autocast bfloat16", timed(autocast, layer.parameters())
    halves, saved = (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)
    kinds = [(dtype, "full") for dtype in (torch.float32, *halves)] + [(dtype, "none") for dtype in saved] * training
    for dtype, recompute in kinds:
        other = RelationalMemory.from_spec(LARGE, backend="cpu", dtype=dtype, recompute=recompute)
        rows = x.to(dtype)
        run = timed(lambda other=other, rows=rows: other(rows, memory)[0], other.parameters())  # type: ignore[misc]
        yield f"cpu {str(dtype).removeprefix('torch.')}" + ", saved" * (recompute == "none"), run


def step(budget: float) -> list[Figure]:
    """One step at a time without gradients, one thread; ratio: this time over the bare C++ call's."""
    figures = []
    for spec in (TINY, SMALL, LARGE):
        for batch in (1, 16, 64):
            with ExitStack() as blocks, torch.no_grad():
                calls = dict(_step_calls(spec, batch, blocks))
                figures += _with_outside("step", f"B={batch}, {_sizes(spec)}", calls, "C++ call", _STEPS, budget)
    return figures


def train(budget: float) -> list[Figure]:
    """One step with gradients of all parameters, one thread; ratio: this time over that of a function that is empty."""
    figures = []
    for spec in (TINY, SMALL, LARGE):
        for batch in (1, 16):
            calls = dict(_train_calls(spec, batch))
            figures += _with_outside("train", f"B={batch}, {_sizes(spec)}", calls, _EMPTY, (*_CALLS, _EMPTY), budget)
    return figures


_CALLS = ("cell", "layer, T=1")
_STEPS = ("frozen.step", "frozen.step, resets", *_CALLS)
_EMPTY = "empty autograd.Function"


def _step_calls(spec: CellSpec, batch: int, blocks: ExitStack) -> Iterator[tuple[str, timing.Call]]:
    cell, layer = _cell_and_layer(spec)
    x, memory, resets = torch.randn(batch, INPUTS), cell.initial_memory(batch), torch.arange(batch) % 8 == 0
    sequence = x[:, None].clone()
    frozen = blocks.enter_context(RelationalMemoryCell.from_spec(spec, backend="cpu").frozen_weights())
    params = {name: value.detach() for name, value in cell.named_parameters()}
    kernels = cpu.kernels(torch.float32, cpu.forced_isa)[batch * spec.mem_slots >= cpu.AMX_ROWS]
    native = cpu.planned_cell(spec, *kernels).given_addresses
    pointers = tuple(params[name].data_ptr() for name in spec.parameter_names)
    packed, out = native.pack(list(pointers), False), torch.empty_like(memory)
    tensors = (x.data_ptr(), memory.data_ptr(), 0, 0, 0, 0)
    row, gate = eager.hoist(sequence, params, spec)
    torch.compiler.reset()  # torch compiles one function at most 8 times, and there are more cases
    compiled = eager.compiled_step()

    def bare(weights: Any) -> timing.Call:
        return lambda: native.forward((batch, 1, 1), tensors, pointers, weights, out.data_ptr(), 0, 0)

    yield "C++ call", bare(packed)
    yield _STEPS[0], lambda: frozen.step(x, memory)
    yield _STEPS[1], lambda: frozen.step(x, memory, resets=resets)
    yield "C++ call that packs", bare(None)
    yield _CALLS[0], lambda: cell(x, memory)
    yield _CALLS[1], lambda: layer(sequence, memory)
    yield "eager", lambda: eager.unroll(sequence, memory, params, spec)
    yield "compile, without the input", lambda: compiled(memory, row, gate, params, spec)
    for name, run, _ in _lstms(spec, x):
        yield name, run


def _train_calls(spec: CellSpec, batch: int) -> Iterator[tuple[str, timing.Call]]:
    cell, layer = _cell_and_layer(spec)
    x, memory = torch.randn(batch, INPUTS), cell.initial_memory(batch)
    sequence = x[:, None].clone()
    params = dict(cell.named_parameters())

    def trained(run: Callable[[], Tensor], leaves: Iterable[Tensor]) -> timing.Call:
        wanted, grad = list(leaves), torch.ones_like(run())
        return lambda: torch.autograd.grad(run(), wanted, grad)

    yield _CALLS[0], trained(lambda: cell(x, memory)[0], cell.parameters())
    yield _CALLS[1], trained(lambda: layer(sequence, memory)[0], layer.parameters())
    yield _EMPTY, trained(_empty(x, list(params.values()), spec), params.values())
    yield "eager", trained(lambda: eager.unroll(sequence, memory, params, spec), params.values())
    for name, run, leaves in _lstms(spec, x):
        yield name, trained(run, leaves)


def _cell_and_layer(spec: CellSpec) -> tuple[RelationalMemoryCell, RelationalMemory]:
    return RelationalMemoryCell.from_spec(spec, backend="cpu"), RelationalMemory.from_spec(spec, backend="cpu")


def _lstms(spec: CellSpec, x: Tensor) -> Iterator[tuple[str, Callable[[], Tensor], Iterable[Tensor]]]:
    """nn.LSTM with T = 1 and nn.LSTMCell with as many parameters as the cell: name, call, parameters."""
    hidden = equal_hidden_size(spec.parameter_count, INPUTS, 4)
    state, sequence = torch.zeros(2, len(x), hidden), x[:, None].clone()
    lstm, lstm_cell = nn.LSTM(INPUTS, hidden, batch_first=True), nn.LSTMCell(INPUTS, hidden)
    yield f"nn.LSTM, T=1, {hidden} units", lambda: lstm(sequence, (state[:1], state[1:]))[0], lstm.parameters()
    yield f"nn.LSTMCell, {hidden} units", lambda: lstm_cell(x, (state[0], state[1]))[0], lstm_cell.parameters()


def _empty(x: Tensor, params: Sequence[Tensor], spec: CellSpec) -> Callable[[], Tensor]:
    """What torch itself asks for a function of x and the parameters, whatever that computes."""
    grads = [torch.zeros_like(tensor) for tensor in (x, *params)]

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return tensors[0].new_empty(len(x), 1, spec.mem_slots, spec.mem_size)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            assert ctx.saved_tensors
            return tuple(grads)

    return lambda: Empty.apply(x, *params)  # type: ignore[no-untyped-call]


def _with_outside(
    use: str, case: str, calls: dict[str, timing.Call], yardstick: str, ours: Iterable[str], budget: float
) -> list[Figure]:
    figures = _against(use, case, calls, yardstick, budget, False)
    outside = {name: _outside(calls[name], budget / 4) for name in ours}
    return [replace(figure, outside=outside.get(figure.contestant)) for figure in figures]


def _outside(call: timing.Call, budget: float) -> float:
    """The least wall time of a call outside of C++, over rounds that are short enough for some to be undisturbed."""
    from rmc_kernels import _C  # optional: the backend has run

    found: list[float] = []
    end = time.perf_counter() + budget
    _C.time_calls(True)
    try:
        while not found or time.perf_counter() < end:
            _C.call_nanoseconds()
            start = time.perf_counter_ns()
            for _ in range(_ROUND):
                call()
            taken = time.perf_counter_ns() - start
            found.append((taken - _C.call_nanoseconds()) / _ROUND)
    finally:
        _C.time_calls(False)
    return 1e-9 * min(found)


def busy(budget: float) -> list[Figure]:
    """Another process on one core, default threads, forward; ratio: the time beside it over the time alone."""
    figures = []
    for batch in (1, 16):
        x = torch.randn(batch, 16, INPUTS)
        layers = {name: RelationalMemory.from_spec(LARGE, backend=name) for name in ("cpu", "reference")}
        calls = {name: _forward(layer, x) for name, layer in layers.items()}
        alone = _medians(calls, budget, torch.get_num_threads())
        with neighbour():
            beside = _medians(calls, budget, torch.get_num_threads())
        case = f"B={batch} T=16, {_sizes(LARGE)}, {torch.get_num_threads()} threads"
        figures += [Figure("busy", case, name, beside[name], beside[name] / alone[name]) for name in calls]
    return figures


def _forward(layer: RelationalMemory, x: Tensor) -> timing.Call:
    return torch.no_grad()(lambda: layer(x))


@contextmanager
def neighbour() -> Iterator[None]:
    """Another process that never waits, held to one core where the system allows it."""
    process = subprocess.Popen([sys.executable, "-c", _BURN])
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
        time.sleep(0.3)
        yield
    finally:
        process.kill()
        process.wait()


class Use(NamedTuple):
    """A table: its title, what its ratios are, and what fills it, given seconds for each case."""

    title: str
    ratio: str
    figures: Callable[[float], list[Figure]]


USE_CASES = {
    "half": Use("Half types, one thread", "times faster than eager float32", half),
    "step": Use("One step, one thread, no gradients", "times the C++ call with packed weights", step),
    "train": Use("One step with gradients, one thread", "times an empty autograd.Function", train),
    "busy": Use("Another process on one core", "times the time alone", busy),
}
_BEGIN, _END = "<!-- uses -->", "<!-- /uses -->"


def markdown(figures: Iterable[Figure]) -> str:
    """A table for each use."""
    lines: list[str] = []
    for name, use in USE_CASES.items():
        rows = [figure for figure in figures if figure.use == name]
        if rows:
            outside = any(figure.outside is not None for figure in rows)
            titles = ["case", "contestant", "us a call", use.ratio, *["us outside of the kernel"] * outside]
            cells = [_cells(figure)[: len(titles)] for figure in rows]
            lines += [f"### {use.title}", "", table(titles, cells, numbers=len(titles) - 2), ""]
    return "\n".join(lines)


def _cells(figure: Figure) -> list[str]:
    outside = "" if figure.outside is None else f"{figure.outside * 1e6:.1f}"
    return [figure.case, figure.contestant, f"{figure.seconds * 1e6:.1f}", f"{figure.ratio:.2f}", outside]


def within(text: str, figures: Iterable[Figure]) -> str:
    """A document with the tables between its markers.

    Raises:
        ValueError: it has no markers.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"the document must have the markers {_BEGIN} and {_END}")
    return f"{before}{_BEGIN}\n{markdown(figures)}\n{_END}{after}"


def as_json(figures: Iterable[Figure]) -> str:
    """The figures as a list of objects."""
    return json.dumps([asdict(figure) for figure in figures], indent=1)


def as_csv(figures: Iterable[Figure]) -> str:
    """The figures, one a row, rounded; `from_csv` reads them back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Figure))
    for figure in figures:
        numbers = (figure.seconds, figure.ratio, figure.outside)
        cells = ("" if number is None else f"{number:.{DIGITS}g}" for number in numbers)
        writer.writerow((figure.use, figure.case, figure.contestant, *cells))
    return text.getvalue()


def from_csv(text: str) -> list[Figure]:
    """The figures that `as_csv` wrote."""
    _, *rows = csv.reader(io.StringIO(text))
    return [
        Figure(use, case, contestant, float(seconds), float(ratio), float(outside) if outside else None)
        for use, case, contestant, seconds, ratio, outside in rows
    ]


def _against(
    use: str, case: str, calls: dict[str, timing.Call], yardstick: str, budget: float, speedup: bool
) -> list[Figure]:
    medians = _medians(calls, budget, 1)
    base = medians[yardstick]
    return [Figure(use, case, name, s, base / s if speedup else s / base) for name, s in medians.items()]


def _medians(calls: dict[str, timing.Call], budget: float, threads: int) -> dict[str, float]:
    clock = timing.by_cpu if threads == 1 else timing.by_wall
    entries = [timing.Entry(call, threads, clock) for call in calls.values()]
    samples = timing.interleave(entries, budget, lambda threads: None)
    return {name: statistics.median(s.seconds for s in taken) for name, taken in zip(calls, samples, strict=True)}


def _sizes(spec: CellSpec) -> str:
    return f"{spec.mem_slots} slots, D={spec.mem_size}"
