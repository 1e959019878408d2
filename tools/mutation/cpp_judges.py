"""What a mutant of the C++ kernels has to survive; see `judges.py`."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast
from unittest.mock import patch

import torch
from torch import Tensor

from rmc_kernels import CellSpec, backends
from rmc_kernels.backends import Call, cpu
from tests.cases import SPECS, VARIANTS, DrawnCall, draw
from tools.mutation.judges import (
    OPTIONS,
    TOLERANCE,
    WIDE,
    Killed,
    compare,
    compare_all,
    expected,
    outcome,
    with_padding,
)

#: A case with what the reference makes of it.
Vector = tuple[str, DrawnCall, dict[str, Tensor]]

#: Cells for what only some sizes reach, with B and T of a call: attention over many slots, with room between its lanes
#: and without; groups of one element; more blocks and layers than two; more input rows than are projected at once.
_REACHING = {
    "many slots": (CellSpec.sonnet(3, 33, 3, 2, key_size=70), 2, 2),
    "many masked slots": (CellSpec.r2gen(32, 8, 4), 3, 2),
    "many rows": (CellSpec.sonnet(3, 66, 5, 1), 1, 2),
    "two live rows": (CellSpec.l0sg(1, 3, 5), 2, 2),
    "many live rows": (CellSpec.l0sg(66, 2, 3, 1), 2, 5),
    "three blocks": (replace(SPECS["blocks"], num_blocks=3, attention_mlp_layers=4), 3, 3),
    "many input rows": (CellSpec.sonnet(2, 1, 2, 1, input_rows=3), 64, 2),
}
#: Gradients that are added up in several pieces, and, at a batch of 32, in two slices.
_LARGE = CellSpec.sonnet(2100, 32, 4, 2)
#: Tiles that end early, or never begin; of which the first element alone has ended; lengths that are not in [0, T].
_LENGTHS = {"ended": [2, 4, 4], "the first ended": [1, 5, 5], "not begun": [0, 0, 0], "out of range": [9, -3, 2]}
#: Batches whose activations need all of the room for them or nearly so, and one.
_FULL = (15, 19, 36, 40, 1)


def cpp_vectors(dtype: str) -> list[Vector]:
    """Every cell with and without options; one step, one element; several groups of them; what only sizes reach."""
    drawn: dict[str, DrawnCall] = {}
    torch_dtype = getattr(torch, dtype)
    for name, spec in SPECS.items():
        for options in (OPTIONS, ()):
            drawn[f"{name}{' with options' * bool(options)}"] = draw(spec, options, dtype=torch_dtype)
    drawn["groups"] = draw(SPECS["sonnet"], OPTIONS, batch=40, steps=9, dtype=torch_dtype)
    drawn |= {f"one step, {name}": draw(SPECS[name], batch=2, steps=1, dtype=torch_dtype) for name in VARIANTS}
    drawn |= {name: draw(spec, batch=2, steps=2, dtype=torch_dtype) for name, spec in WIDE.items()}
    for name, (spec, batch, steps) in _REACHING.items():
        drawn[name] = draw(spec, OPTIONS, batch=batch, steps=steps, dtype=torch_dtype)
    for name, lengths in _LENGTHS.items():
        drawn[name] = draw(SPECS["sonnet"], OPTIONS, steps=5, dtype=torch_dtype)
        drawn[name].options["lengths"] = torch.tensor(lengths)
    drawn["one element"] = draw(SPECS["matrix"], OPTIONS, batch=1, dtype=torch_dtype)
    drawn["one number"] = draw(SPECS["one-slot"], OPTIONS, batch=1, steps=1, dtype=torch_dtype)
    drawn["one number"].options["lengths"] = torch.tensor([0])
    drawn["one element and step"] = draw(WIDE["wide-heads"], batch=1, steps=1, dtype=torch_dtype)
    drawn["tiles"] = draw(
        SPECS["sonnet"], batch=24, steps=11, dtype=torch_dtype
    )  # more steps than are projected at once
    drawn["slices"] = draw(_LARGE, batch=32, steps=1, dtype=torch_dtype)
    if dtype == "float64":  # to differ by 709, where its exponential overflows; so large, float32 errs too much
        drawn["large scores"] = draw(SPECS["textbook"], dtype=torch_dtype)
        drawn["large scores"].params["blocks.0.qkv.weight"] *= 100
    return [(name, case, expected(case.to(torch.float64))) for name, case in drawn.items() if with_padding(case)]


def cpp(backend: backends.Backend, vectors: Sequence[Vector]) -> None:
    """C++ kernels against the reference: memories and gradients, saved and recomputed, in one thread and in two.

    Raises:
        Killed: something differs, or is written to that was not given.
    """
    watched: Any = _Watched(backend)
    for threads, kept, (name, case, exact) in _cpp_calls(vectors):
        torch.set_num_threads(threads)
        compare_all(outcome(watched, case, kept), exact, name)
    by_name = {name: (case, exact) for name, case, exact in vectors}
    for name in ("one step, sonnet", "groups"):
        case, exact = by_name[name]
        turned = {key: value.mT.contiguous().mT for key, value in case.params.items() if value.dim() == 2}
        frozen = replace(case, params=case.params | turned)  # packed weights are all that can be read
        with backends.frozen_weights(frozen.call().params):
            compare_all(outcome(watched, frozen, False), exact, f"frozen weights, {name}")
    for wanted in ("x", "memory", "blocks.0.qkv.weight"):
        compare_all(outcome(watched, case, False, {wanted}), exact, f"{wanted} alone")
    for batch in _FULL:
        watched.forward(case.spec, Call(case.x[:batch, :1], case.memory[:batch], case.call().params), True)
    for batch, steps in ((0, 2), (2, 0)):
        found = outcome(watched, draw(case.spec, batch=batch, steps=steps, dtype=case.x.dtype), False)
        if any(value.any() for value in found.values()):
            raise Killed(f"{batch} elements, {steps} steps")
    if case.x.dtype is torch.float32:
        for name in ("one step, sonnet", "tiles"):
            _cpp_frozen_step(backend, *by_name[name])
        _cpp_functions()
    _cpp_sizes()


class _Watched:
    """A backend that is found out where it writes past the end of what it was given, or leaves some of it unwritten."""

    def __init__(self, backend: backends.Backend) -> None:
        self._backend = backend

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self._watched(self._backend.forward, *arguments)  # type: ignore[no-any-return]

    def backward(self, *arguments: Any) -> list[Tensor]:
        return self._watched(self._backend.backward, *arguments)  # type: ignore[no-any-return]

    def _watched(self, function: Callable[..., Any], *arguments: Any) -> Any:
        ends: list[Tensor] = []

        def new_empty(tensor: Tensor, size: int | Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
            made, shape = dtype or tensor.dtype, torch.Size((size,) if isinstance(size, int) else size)
            given = torch.full((shape.numel() + 64,), torch.nan if made.is_floating_point else 255, dtype=made)
            ends.append(given[shape.numel() :])
            return given[: shape.numel()].view(shape)

        with patch.object(Tensor, "new_empty", new_empty):
            result = function(*arguments)
        if vars(cpu)["_C"].touched():
            raise Killed("a part of the scratch memory is left")
        if any(((end == end) & (end != 255)).any() for end in ends):
            raise Killed("a tensor is left")
        return result


def _cpp_frozen_step(backend: backends.Backend, case: DrawnCall, exact: dict[str, Tensor]) -> None:
    """A frozen step from the given memory, from the initial one, and where some elements start over."""

    def refused(*_: object) -> NoReturn:
        raise Killed("a frozen step is refused")

    params, x, memory = case.call().params, case.x[:, 0].contiguous(), case.memory
    initial, resets = memory[-1].flip(0).contiguous(), torch.arange(len(memory)) % 2 == 0
    with backends.frozen_weights(params) as block:
        step = cast(cpu.CpuBackend, backend).frozen_step(case.spec, block, initial, flat=True, ordinary=refused)
        if step is None:
            raise Killed("there is no frozen step")
        output, final = step(x, memory, None)
        compare(output, exact["memories"][:, 0].flatten(1), TOLERANCE, "frozen step")
        compare(final, exact["memories"][:, 0], TOLERANCE, "frozen step, memory")
        starts = torch.where(resets[:, None, None], initial, memory)
        for name, found, like in (
            ("the initial memory", step(x, None, None), step(x, initial.expand_as(memory), None)),
            ("resets", step(x, memory, resets), step(x, starts, None)),
        ):
            for one, other in zip(found, like, strict=True):
                compare(one, other, TOLERANCE, f"frozen step, {name}")


def _cpp_functions() -> None:
    """exp, sigmoid and tanh of float32, at the edges too; what is below 2^-126 may be 0."""
    module = vars(cpu)["_C"]
    edges = [200.0, -200.0, torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 88.7, -87.0, 1e-30, -1e-30]
    x = torch.cat([torch.linspace(-86, 86, 4001), torch.tensor(edges)])
    for number, function in enumerate((torch.exp, torch.sigmoid, torch.tanh)):
        y = torch.empty_like(x)
        module.vector_math("generic", number, x.data_ptr(), y.data_ptr(), x.numel())
        exact = function(x)
        same = torch.isclose(y, exact, rtol=4e-7, atol=2**-126, equal_nan=True)
        same &= exact.isnan() | (y.signbit() == exact.signbit())
        if not same.all():
            raise Killed(f"{function.__name__} of {x[~same][0]:g}")


#: Sizes that a cell cannot have; 2^30 is the largest.
_IMPOSSIBLE: tuple[dict[str, int], ...] = (
    *({name: size} for name in (*cpu._SIZES, "key_width", "rows") for size in (0, 2**30 + 1)),
    {"num_heads": 2**15, "key_width": 2**15},  # too many columns of q | k | v
    {"rows": 2**15, "num_heads": 1, "head_size": 2**16},  # of the input rows as one
)


def _cpp_sizes() -> None:
    """A cell that is too large is refused before anything is made for it."""
    spec, kernels = SPECS["sonnet"], cpu._KERNELS[0]
    names = (*cpu._FLAGS, *cpu._SIZES, "key_width", "rows", "gate_style", "forget_bias", "input_bias")
    usual = {name: getattr(spec, name) for name in names}
    plan: Callable[..., object] = cpu.plan_cell
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
    plan(SimpleNamespace(**usual | {"mem_slots": 2**30}), *kernels)
    for sizes in _IMPOSSIBLE:
        try:
            plan(SimpleNamespace(**usual | sizes), *kernels)
        except ValueError:
            continue
        except MemoryError:
            pass
        raise Killed(f"a cell of {sizes}")


def _cpp_calls(vectors: Sequence[Vector]) -> Iterator[tuple[int, bool, Vector]]:
    """(threads, whether activations are kept, vector); without options a cell is run one way only, by turns."""
    for number, vector in enumerate(vectors):
        for kept in (True, False):
            if vector[0] in SPECS and kept != bool(number % 4 // 2):
                continue
            yield 1, kept, vector
            if vector[0] in ("groups", "many live rows", "one element", "slices"):
                yield 2, kept, vector
