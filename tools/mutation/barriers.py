"""Each `bar.sync` of compiled kernels left out, one at a time, under the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from tests.cases import SPECS, draw
from tools.mutation.jobs import Job, digest
from tools.mutation.judges import outcome
from tools.mutation.mutant import SURVIVED
from tools.offline import Launch, offline
from tools.ptxsim import Program, SimulationError, launch

#: Cells and dtypes whose kernels are taken, compiled for sm_80.
CELLS = (("sonnet", "bfloat16"), ("textbook", "float16"), ("r2gen", "bfloat16"))
#: Instructions that touch memory, or lead elsewhere; parameters are read by `ld.param`, which orders nothing.
_BETWEEN = ("ld", "st", "cp", "ldmatrix", "stmatrix", "bra")


class Kernel:
    """A launch that can be repeated.

    Attributes:
        name: of the cell, its dtype and the kernel.
        digest: of its PTX.
        barriers: where each of its barriers comes from.
    """

    def __init__(self, name: str, found: Launch) -> None:
        ptx = found.file("ptx").read_text()
        self.name, self.digest = name, digest(ptx)
        self._found, self._program = found, Program(ptx)
        self.barriers = [barrier.location for barrier in self._program.barriers]
        self._tensors = [argument for argument in found.arguments if isinstance(argument, torch.Tensor)]
        self._before = [tensor.clone() for tensor in self._tensors]
        assert not self._races(set())
        self._after = [tensor.clone() for tensor in self._tensors]

    def judge(self, barrier: int) -> str:
        """What becomes of it without a barrier. Of one that is not missed:

        "spare: " it can be left out together with all others that are spare;
        "doubled: " one of the spare ones does its work, and without both there is a race.
        """
        if self._alone[barrier] != SURVIVED:
            return self._alone[barrier]
        if barrier not in self._spare:
            return f"doubled: a race without it and {self._partner(barrier)}"
        for other in (barrier - 1, barrier + 1):
            if self._nothing_between(barrier, other):
                return f"spare: no access of memory between it and {self._named(other)}"
        return "spare: what it orders is a warp's own, or ordered by those that stay"

    def _partner(self, barrier: int) -> str:
        """The spare barrier next to one without which there is a race without both."""
        for other in sorted(self._spare, key=lambda spare: abs(spare - barrier)):
            if self._without({barrier, other}) != SURVIVED:
                return f"bar.sync {other}"
        return "several spare ones"

    def _named(self, barrier: int) -> str:
        return f"bar.sync {barrier}" if 0 <= barrier < len(self.barriers) else "the end of the kernel"

    @cached_property
    def _alone(self) -> list[str]:
        """What becomes of it without each."""
        return [self._without({barrier}) for barrier in range(len(self.barriers))]

    @cached_property
    def _spare(self) -> set[int]:
        """Barriers that can all be left out together, from the first on."""
        found: set[int] = set()
        for barrier, alone in enumerate(self._alone):
            if alone == SURVIVED and self._without(found | {barrier}) == SURVIVED:
                found.add(barrier)
        return found

    def _nothing_between(self, one: int, other: int) -> bool:
        """Whether no instruction between two barriers touches memory or branches."""
        instructions = self._program.kernel.instructions
        sites = [-1, *(i for i, found in enumerate(instructions) if found.is_barrier), len(instructions)]
        first, last = sorted((one, other))
        between = instructions[sites[first + 1] + 1 : sites[last + 1]]
        return not any(instruction.opcode in _BETWEEN for instruction in between)

    def _without(self, barriers: set[int]) -> str:
        """Whether a race or another error is reported, or only the results are wrong, or neither."""
        try:
            races = self._races(barriers)
        except SimulationError as error:
            return f"error: {type(error).__name__}"
        if races:
            return f"race: {min(races)}"
        same = all(torch.equal(*pair) for pair in zip(map(_bits, self._tensors), map(_bits, self._after), strict=True))
        return SURVIVED if same else "wrong: no race was reported"

    def _races(self, without_barriers: set[int]) -> set[str]:
        found = self._found
        for tensor, content in zip(self._tensors, self._before, strict=True):
            tensor.copy_(content)
        report = launch(
            self._program, found.grid, found.arguments, warps=found.metadata.num_warps,
            shared=found.metadata.shared, without_barriers=without_barriers,
        )  # fmt: skip
        return set(report.races)


def _bits(tensor: Tensor) -> Tensor:
    """Bytes, which are equal where NaNs are."""
    return tensor.contiguous().view(torch.uint8)


def jobs() -> list[Job]:
    """The barriers of every kernel of training steps, with activations kept and with activations computed again."""
    found = [Job("", "", "unchanged", lambda: SURVIVED)]
    for name, dtype in CELLS:
        for kernel in kernels(name, dtype):
            found += [
                Job(kernel.name, kernel.digest, f"bar.sync {number} ({location})", partial(kernel.judge, number))
                for number, location in enumerate(kernel.barriers)
            ]
    return found


def kernels(name: str, dtype: str) -> Iterator[Kernel]:
    """Those that a training step of a cell launches, each once, but for those that project the input side."""
    case = draw(SPECS[name], ("lengths", "resets"), batch=5, steps=2, dtype=getattr(torch, dtype))
    found: dict[str, Kernel] = {}

    def run(launched: Launch) -> None:
        kernel = Kernel(f"{launched.name}, {name} {dtype}", launched)
        if kernel.barriers and launched.name != "project":
            found.setdefault(kernel.name, kernel)

    for kept in (False, True):
        with offline("sm_80", run):
            outcome("triton", case, kept)
    yield from found.values()
