"""Launches a program on torch tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tools.ptxsim.arithmetic import Array
from tools.ptxsim.machine import BASE, Machine, Report, Schedule
from tools.ptxsim.parse import BITS
from tools.ptxsim.program import Program
from tools.ptxsim.translator import UNSIGNED, dtype_of

#: Bytes between two tensors: an access just outside of one hits nothing else.
_GAP = 256
#: Instructions of one warp that no launch of the tests comes near.
LIMIT = 5_000_000


def launch(
    program: Program,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    *,
    warps: int,
    shared: int = 0,
    schedule: Schedule = "lockstep",
    seed: int = 0,
    limit: int = LIMIT,
    allow: Collection[str] = (),
    without_barriers: Collection[int] = (),
    races: bool = True,
) -> Report:
    """Run a kernel.

    Args:
        program: the kernel.
        grid: programs along x, y, z.
        arguments: in the order of the kernel's parameters: CPU tensors, which are read and written in place; numbers;
            None for 0. Parameters past them are 0.
        warps, shared, schedule, seed, limit, allow, without_barriers, races: see `Machine`.

    Raises:
        SimulationError: the kernel did something that it must not; races are in the report instead.
    """
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): _bytes(tensor) for tensor in tensors}
    starts, size = {}, _GAP
    for pointer, content in storages.items():
        starts[pointer] = size
        size = -(-(size + len(content) + _GAP) // _GAP) * _GAP
    memory, inside = np.full(size, 0xFF, np.uint8), np.zeros(size, bool)
    for pointer, content in storages.items():
        start = starts[pointer]
        memory[start : start + len(content)] = content
        inside[start : start + len(content)] = True

    def bits(value: Any, type_: str) -> Array:
        if isinstance(value, torch.Tensor):
            value = BASE + starts[value.untyped_storage().data_ptr()] + value.storage_offset() * value.element_size()
        if type_.startswith("f"):
            return np.array([value or 0], dtype_of(type_)).view(UNSIGNED[BITS[type_]])
        return np.array([int(value or 0) % 2 ** BITS[type_]], UNSIGNED[BITS[type_]])

    given = [*arguments, *[None] * (len(program.kernel.parameters) - len(arguments))]
    pairs = list(zip(program.kernel.parameters, given, strict=True))
    names = {tensor.untyped_storage().data_ptr(): f"argument {i}" for i, tensor in _tensors(arguments)}
    machine = Machine(
        program, grid, warps, shared, memory, inside,
        [(names[pointer], start, start + len(storages[pointer])) for pointer, start in starts.items()],
        {parameter.name: bits(value, parameter.type) for parameter, value in pairs},
        schedule, seed, limit, allow, without_barriers, races,
    )  # fmt: skip
    report = machine.run()
    for pointer, content in storages.items():
        content[:] = memory[starts[pointer] : starts[pointer] + len(content)]
    return report


def _tensors(arguments: Sequence[Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """In reverse, so that the first of two arguments in one storage names it."""
    for number, argument in reversed(list(enumerate(arguments))):
        if isinstance(argument, torch.Tensor):
            yield number, argument


def _bytes(tensor: torch.Tensor) -> Array:
    """The whole storage of a tensor, as a view."""
    view: Array = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    return view
