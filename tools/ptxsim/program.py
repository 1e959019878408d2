"""A kernel as basic blocks, each a Python function made when it is first run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.ptxsim import arithmetic, instructions, thread_instructions
from tools.ptxsim.arithmetic import Array
from tools.ptxsim.errors import Unsupported
from tools.ptxsim.parse import Instruction, Kernel, parse
from tools.ptxsim.translator import UNSIGNED, Handler, Translator

_HANDLERS = thread_instructions.HANDLERS | instructions.HANDLERS
_ENDS = ("bra", "ret", "exit")

#: Takes the registers, the unit and the mask of its threads that run (None: all); returns the guard of the instruction
#: that ends the block, None where that has none.
Code = Callable[[list[Array], Any, Array | None], Array | None]


@dataclass
class Block:
    """A basic block.

    Attributes:
        start, stop: its instructions; the one that ends it is among them.
        end: that branch, return or barrier; None where the block runs into the next one.
        target: block that `end` branches to, or None.
        barrier: number of the barrier that ends it, or None.
        needed: registers that blocks after it read.
    """

    start: int
    stop: int
    end: Instruction | None
    target: int | None
    barrier: int | None
    needed: set[str] = field(default_factory=set)


class Program:
    """A parsed kernel that units can run.

    Attributes:
        kernel: what was parsed.
        blocks: in order.
        barriers: the kernel's barriers, in order.

    Raises:
        Unsupported: an instruction of the kernel is not simulated.
    """

    def __init__(self, ptx: str) -> None:
        self.kernel: Kernel = parse(ptx)
        self._constants: dict[str, Any] = {}
        self._code: dict[tuple[int, bool], Code] = {}
        self.blocks = _cut(self.kernel)
        self.barriers = [block.end for block in self.blocks if block.barrier is not None and block.end is not None]
        self._find_needed()

    def code(self, block: int, masked: bool) -> Code:
        """The function of a block, for all threads of a unit or for those in a mask."""
        if (block, masked) not in self._code:
            self._code[block, masked] = self._compile(block, masked)
        return self._code[block, masked]

    def _translated(self, block: Block, masked: bool) -> Translator:
        translator = Translator(self.kernel, self._constants, masked)
        for site in range(block.start, block.stop - (block.end is not None)):
            translator.translate(site, _handler(self.kernel.instructions[site]))
        guard = translator.guard(block.end) if block.end is not None else None
        translator.statements.append(f"guard = {guard}")
        return translator

    def _find_needed(self) -> None:
        """Liveness: a register is needed after a block where a later one reads it before it writes it."""
        translated = [self._translated(block, masked=False) for block in self.blocks]
        before: list[set[str]] = [set(found.read_first) for found in translated]
        changed = True
        while changed:
            changed = False
            for index in reversed(range(len(self.blocks))):
                block = self.blocks[index]
                needed = set().union(*(before[after] for after in self._successors(index)))
                if len(needed) > len(block.needed):
                    block.needed = needed
                    before[index] |= needed - set(translated[index].written)
                    changed = True

    def _successors(self, index: int) -> list[int]:
        block = self.blocks[index]
        found = [] if block.target is None else [block.target]
        leaves = block.end is not None and not block.end.is_barrier and block.end.guard is None
        if index + 1 < len(self.blocks) and not leaves:
            found.append(index + 1)
        return found

    def _compile(self, index: int, masked: bool) -> Code:
        block = self.blocks[index]
        translator = self._translated(block, masked)
        lines = translator.statements
        for register in sorted(block.needed & set(translator.written), key=translator.number):
            value = translator.view(register, UNSIGNED[self.kernel.registers[register]])
            place = f"R[{translator.number(register)}]"
            lines.append(f"{place} = where(m, {value}, {place})" if masked else f"{place} = {value}")
        source = "\n  ".join(["def code(R, U, m):", *lines, "return guard"])
        scope: dict[str, Any] = {**vars(arithmetic), "where": np.where, **self._constants}
        exec(compile(source, f"<{self.kernel.name}, block {index}>", "exec"), scope)
        code: Code = scope["code"]
        return code


def _handler(instruction: Instruction) -> Handler:
    if instruction.opcode not in _HANDLERS:
        raise Unsupported(f"instruction {instruction}: opcode {instruction.opcode}")
    return _HANDLERS[instruction.opcode]


def _cut(kernel: Kernel) -> list[Block]:
    """Blocks begin at labels and after branches, returns and barriers."""
    ends = {i for i, found in enumerate(kernel.instructions) if found.opcode in _ENDS or found.is_barrier}
    inside = {place for place in kernel.labels.values() if place < len(kernel.instructions)}
    starts = sorted({0} | inside | {i + 1 for i in ends if i + 1 < len(kernel.instructions)})
    at = {start: number for number, start in enumerate(starts)}
    blocks, barriers = [], 0
    for start, stop in zip(starts, [*starts[1:], len(kernel.instructions)], strict=True):
        end = kernel.instructions[stop - 1] if stop - 1 in ends else None
        barrier = target = None
        if end is not None and end.is_barrier:
            barrier, barriers = barriers, barriers + 1
        elif end is not None and end.opcode == "bra":
            target = at[kernel.labels[end.operands[0]]]
        blocks.append(Block(start, stop, end, target, barrier))
    return blocks
