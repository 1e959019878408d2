"""PTX instructions by the unit that they keep busy."""

from __future__ import annotations

import re
from typing import NamedTuple

from tools.ptxsim.parse import BITS, Instruction, Kernel

#: Those that become nothing, or next to nothing, in machine code.
_FREE = {"mov", "cvta", "bra", "ret", "exit"}
_SPECIAL = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "div", "tanh", "sin", "cos"}
_FLOAT = {"add", "sub", "mul", "fma", "mad"}
_REGISTER = re.compile(r"%[\w$]+")
#: Units that an instruction may keep busy; "free" for none.
UNITS = (
    "matrix", "fp32", "simple", "special", "shuffle", "shared", "load", "store", "copy", "commit", "wait", "barrier",
    "free",
)  # fmt: skip


class Operation(NamedTuple):
    """What the model sees of an instruction.

    Attributes:
        unit: one of `UNITS`.
        writes, reads: registers.
        size: bytes that a thread moves; for "wait", groups of copies that may still be on their way.
    """

    unit: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    size: int = 0


def operations(kernel: Kernel) -> list[Operation]:
    """The kernel's instructions, in order."""
    return [_operation(instruction, kernel) for instruction in kernel.instructions]


def _operation(instruction: Instruction, kernel: Kernel) -> Operation:
    groups = [tuple(r for r in _REGISTER.findall(text) if r in kernel.registers) for text in instruction.operands]
    guard = () if instruction.guard is None else (instruction.guard,)
    unit, size = _unit(instruction)
    if unit in ("store", "copy") or instruction.opcode in ("st", "stmatrix", "bra"):
        return Operation(unit, (), sum(groups, guard), size)
    return Operation(unit, groups[0] if groups else (), sum(groups[1:], guard), size)


def _unit(instruction: Instruction) -> tuple[str, int]:
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode in _FREE or "param" in modifiers:
        return "free", 0
    if instruction.is_barrier:
        return "barrier", 0
    if opcode == "mma":
        return "matrix", 0
    if opcode in ("ld", "st"):
        elements = next((int(m[1:]) for m in modifiers if re.fullmatch("v[24]", m)), 1)
        size = BITS[instruction.types[-1]] // 8 * elements
        if any(modifier.startswith("shared") for modifier in modifiers):
            return "shared", size
        return ("load" if opcode == "ld" else "store"), size
    if opcode in ("ldmatrix", "stmatrix"):
        return "shared", 16
    if opcode == "cp":
        if "commit_group" in modifiers:
            return "commit", 0
        return ("wait", int(instruction.operands[0])) if "wait_group" in modifiers else ("copy", 16)
    if opcode == "shfl":
        return "shuffle", 0
    if opcode in _SPECIAL:
        return "special", 0
    if opcode in _FLOAT and set(instruction.types) & {"f32", "f16x2", "bf16x2"}:
        return "fp32", 0
    return "simple", 0
