"""The statements of a basic block in Python, on numpy arrays with one element a thread.

A register holds an unsigned array, or an unsigned scalar where all threads hold the same. Inside a basic block it is a
local variable per type that it was read or written as, so that a chain of float32 instructions views nothing twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tools.ptxsim.errors import Unsupported
from tools.ptxsim.parse import BITS, Instruction, Kernel

UNSIGNED = {1: "bool", 8: "uint8", 16: "uint16", 32: "uint32", 64: "uint64"}
_SIGNED = {"s8": "int8", "s16": "int16", "s32": "int32", "s64": "int64"}
_FLOAT = {"f16": "float16", "f32": "float32", "f64": "float64"}


def dtype_of(type_: str) -> str:
    """The numpy dtype that a PTX type is computed in; half types other than float16 are their bits."""
    return _SIGNED.get(type_) or _FLOAT.get(type_) or UNSIGNED[BITS[type_]]


class Translator:
    """Collects the statements of one basic block.

    Attributes:
        statements: so far.
        site: number of the instruction that is translated, as an argument in a statement.
        constants: numpy scalars by the name they have in the statements; shared by the blocks of a kernel.
        read_first: registers read before the block wrote them.
        written: registers that the block wrote, with the dtype they have at its end.
    """

    def __init__(self, kernel: Kernel, constants: dict[str, Any], masked: bool) -> None:
        self._kernel, self._masked = kernel, masked
        self._numbers = {name: number for number, name in enumerate(kernel.registers)}
        self._known: set[tuple[str, str]] = set()
        self._guard: str | None = None
        self.statements: list[str] = []
        self.site = ""
        self.constants = constants
        self.read_first: set[str] = set()
        self.written: dict[str, str] = {}

    # -- operands ------------------------------------------------------------------------------------------------------

    def variable(self, register: str, dtype: str) -> str:
        """The local variable of a register as a dtype."""
        return f"r{self._numbers[register]}_{dtype}"

    def number(self, register: str) -> int:
        """The place of a register among all."""
        return self._numbers[register]

    def view(self, register: str, dtype: str) -> str:
        """A variable that holds the register as a dtype of its own width; it is made where there is none."""
        if (register, dtype) not in self._known:
            own = UNSIGNED[self._kernel.registers[register]]
            name = self.variable(register, dtype)
            if register in self.written:
                self.statements.append(f"{name} = {self.variable(register, self.written[register])}.view({_np(dtype)})")
            elif dtype == own:
                self.read_first.add(register)
                self.statements.append(f"{name} = R[{self._numbers[register]}]")
            else:
                self.statements.append(f"{name} = {self.view(register, own)}.view({_np(dtype)})")
            self._known.add((register, dtype))
        return self.variable(register, dtype)

    def read(self, operand: str, type_: str) -> str:
        """An expression of the operand's value as a PTX type: a register, a special register, a symbol or a number."""
        dtype = dtype_of(type_)
        if operand in self._kernel.registers:
            width = self._kernel.registers[operand]
            if width == BITS[type_]:
                return self.view(operand, dtype)
            if 1 in (width, BITS[type_]):
                raise Unsupported(f"register {operand} read as {type_}")
            narrow = f"{self.view(operand, UNSIGNED[width])}.astype({_np(UNSIGNED[BITS[type_]])})"
            return narrow if dtype == UNSIGNED[BITS[type_]] else f"{narrow}.view({_np(dtype)})"
        if operand.startswith("%"):
            return f"U.special[{operand!r}].astype({_np(dtype)})"
        if operand in self._kernel.symbols:
            return self._constant(self._kernel.symbols[operand], dtype)
        return self._constant(_immediate(operand, type_), dtype)

    def _constant(self, bits: int, dtype: str) -> str:
        name = f"k_{bits:x}_{dtype}"
        unsigned = UNSIGNED[1 if dtype == "bool" else np.dtype(dtype).itemsize * 8]
        self.constants[name] = np.array(bits, unsigned).view(dtype)[()]
        return name

    def write(self, register: str, expression: str, type_: str) -> None:
        """Assign an expression of a PTX type to a register; "_" takes anything."""
        if register == "_":
            return
        dtype, width = dtype_of(type_), self._kernel.registers[register]
        if BITS[type_] != width:
            if type_ in _SIGNED:
                wide = f"int{width}"
            elif type_ in _FLOAT:
                raise Unsupported(f"{type_} written to the {width} bits of {register}")
            else:
                wide = UNSIGNED[width]
            dtype, expression = wide, f"({expression}).astype({_np(wide)})"
        if self._guard is not None:
            expression = f"where({self._guard}, {expression}, {self.view(register, dtype)})"
        self.statements.append(f"{self.variable(register, dtype)} = {expression}")
        self._known = {known for known in self._known if known[0] != register} | {(register, dtype)}
        self.written[register] = dtype

    def address(self, operand: str, width: int) -> str:
        """The address of "[register + offset]", unsigned of `width` bits."""
        found = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", operand)
        if found is None:
            raise Unsupported(f"address {operand}")
        base = self.read(found[1], f"b{width}")
        offset = int(found[3] or "0", 0) * (-1 if found[2] == "-" else 1)
        return f"({base} + {self._constant(offset % 2**width, UNSIGNED[width])})" if offset else base

    def mask(self) -> str:
        """The threads that execute the instruction: None for all."""
        if self._guard is None:
            return "m" if self._masked else "None"
        return f"(m & {self._guard})" if self._masked else self._guard

    # -- instructions --------------------------------------------------------------------------------------------------

    def translate(self, site: int, handler: Handler) -> None:
        """Add the statements of the kernel's instruction number `site`.

        Raises:
            Unsupported: it is not simulated.
        """
        instruction = self._kernel.instructions[site]
        self.site = str(site)
        try:
            self._guard = self.guard(instruction)
            handler(self, instruction)
        except (Unsupported, KeyError, ValueError, IndexError) as error:
            raise Unsupported(f"instruction {instruction}: {error!r}") from None

    def guard(self, instruction: Instruction) -> str | None:
        """The expression of an instruction's guard."""
        if instruction.guard is None:
            return None
        return f"{'~' if instruction.negated else ''}{self.view(instruction.guard, 'bool')}"

    def call(self, function: str, arguments: Iterable[str], results: Iterable[tuple[str, str]]) -> None:
        """Call a method of the unit that returns one array per result (register, PTX type of its bits)."""
        call = f"U.{function}({', '.join(arguments)})"
        results = list(results)
        if not results:
            self.statements.append(call)
            return
        self.statements.append(f"found = {call}")
        for i, (register, type_) in enumerate(results):
            self.write(register, f"found[{i}]", type_)

    def predicate(self, operand: str) -> str:
        """A predicate operand, maybe negated, maybe a number."""
        return f"~{self.read(operand[1:], 'pred')}" if operand.startswith("!") else self.read(operand, "pred")


def vector(operand: str) -> list[str]:
    """The registers of "{a, b}", or of "a"."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _np(dtype: str) -> str:
    return f"np.{dtype}" if dtype != "bool" else "bool"


def _immediate(text: str, type_: str) -> int:
    """The bits of a number as a PTX type."""
    bits = BITS[type_]
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text) and bits == 64:
        return int(text[2:], 16)
    if bits == 1:
        return int(int(text) != 0)
    number = int(text.rstrip("U"), 0)
    return number % (1 << bits)


#: Adds the statements of an instruction to a translator.
Handler = Callable[[Translator, Instruction], None]
