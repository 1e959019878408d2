"""What a call promises besides right numbers: the same bits every time, CUDA graphs, streams, devices, no waiting."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rmc_kernels import verify
from rmc_kernels.bench.gpu.device import Device
from rmc_kernels.errors import in_short
from rmc_kernels.verify.draws import Draw, by_backend, draw, evaluate

Results = Mapping[str, Tensor]
Status = Literal["right", "wrong", "error", "not served"]
Verdict = tuple[Status, str]


class Look(NamedTuple):
    """What was looked at, what became of it, a word on it, and the trace of the exception if it raised one."""

    name: str
    status: Status
    detail: str
    trace: str = ""


def look_at(device: Device, repeats: int, case: verify.Case) -> list[Look]:
    """All that is looked at of one case: memories and every gradient of it, bit by bit."""
    drawn = draw(case, 0, device.name)
    run = partial(_evaluate, device, drawn)
    expected = {name: value.clone() for name, value in run().items()}
    looks: list[Look] = []
    for name, look in (
        (f"the same bits {repeats} times", partial(_repeats, run, expected, repeats, filled=False)),
        (f"the same bits {repeats} times, from NaN", partial(_repeats, run, expected, repeats, filled=True)),
        ("replayed as a CUDA graph", partial(_graph, device, drawn, run, expected)),
        ("on a stream where x comes late", partial(_late, device, drawn, run, expected)),
        ("waits for nothing", partial(_waits, device, run, expected)),
        ("on another device than the current one", partial(_elsewhere, device, case, expected)),
    ):
        try:
            looks.append(Look(name, *look()))
        except Exception as error:  # the others are still to be looked at
            looks.append(Look(name, "error", in_short(error), traceback.format_exc()))
    return looks


def _evaluate(device: Device, drawn: Draw) -> Results:
    return evaluate(drawn, by_backend(device.backend, drawn.case))


def _repeats(run: Callable[[], Results], expected: Results, repeats: int, *, filled: bool) -> Verdict:
    """Whether all runs give the bits of the first; with `filled`, what torch allocates starts as NaN."""
    with nan_in_new_memory() if filled else nullcontext():
        for number in range(repeats):
            wrong = differing(run(), expected)
            if wrong:
                return "wrong", f"run {number + 1}: {wrong}"
    return "right", f"{len(expected)} tensors"


def _graph(device: Device, drawn: Draw, run: Callable[[], Results], expected: Results) -> Verdict:
    """Whether a captured call, forward and backward, gives on replay what a call gives, also for another x."""
    results, replay = device.capture(run)
    x, original = drawn.call.x, drawn.call.x.clone()
    try:
        for sign in (1, -1):
            x.copy_(sign * original)
            called = {name: value.clone() for name, value in run().items()} if sign < 0 else expected
            for value in results.values():
                value.fill_(torch.nan)
            replay()
            wrong = differing(results, called)
            if wrong:
                return "wrong", f"{'another x' if sign < 0 else 'the same x'}: {wrong}"
    finally:
        x.copy_(original)
    return "right", ""


def _late(device: Device, drawn: Draw, run: Callable[[], Results], expected: Results) -> Verdict:
    """Whether a call is ordered after what its stream did before: x is NaN until then."""
    x, original = drawn.call.x, drawn.call.x.clone()

    def arrive() -> None:
        x.copy_(original)

    x.fill_(torch.nan)
    try:
        wrong = differing(device.on_a_late_stream(arrive, run), expected)
    finally:
        x.copy_(original)
    return ("wrong", wrong) if wrong else ("right", "")


def _waits(device: Device, run: Callable[[], Results], expected: Results) -> Verdict:
    with device.refusing_to_wait():
        results = run()
    wrong = differing(results, expected)
    return ("wrong", wrong) if wrong else ("right", "")


def _elsewhere(device: Device, case: verify.Case, expected: Results) -> Verdict:
    other = device.second()
    if other is None:
        return "not served", "there is one device"
    found = _evaluate(device, draw(case, 0, other))
    wrong = differing({name: value.to(device.name) for name, value in found.items()}, expected)
    return ("wrong", wrong) if wrong else ("right", other)


def differing(results: Results, expected: Results) -> str:
    """Names of the tensors whose bits differ, marked where one has a NaN that was not to be; empty for none."""
    names = [name for name in expected if not _same_bits(results[name], expected[name])]
    return ", ".join(
        f"{name} (NaN)" if results[name].isnan().any() and not expected[name].isnan().any() else name for name in names
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (one, other)))


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """What torch allocates is filled: floats with NaN, integers with their largest value."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators without a deterministic form: their bits are compared
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            settings.fill_uninitialized_memory = filled
