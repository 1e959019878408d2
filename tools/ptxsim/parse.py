"""PTX text to `Kernel`: parameters, registers, labels and instructions of one entry, as they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tools.ptxsim.errors import SimulationError, Unsupported

#: Width of each PTX type in bits.
BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32,
    "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64,
}  # fmt: skip
BARRIERS = ("bar", "barrier")
#: Directives without effect on what is computed.
_HINTS = ('.pragma "nounroll"', '.pragma "used_bytes_mask')


@dataclass(frozen=True)
class Instruction:
    """One statement `@guard opcode.modifiers operands;`.

    Attributes:
        guard: predicate register, or None.
        negated: whether the guard has to be false.
        opcode: up to the first dot.
        modifiers: what follows it.
        operands: as written; "{a, b}" and "[r+4]" are one operand.
        location: "file:line" in the source with the calls it was inlined through, innermost first.
        text: the statement.
    """

    guard: str | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    location: str
    text: str

    @property
    def types(self) -> tuple[str, ...]:
        """Those modifiers that are types."""
        return tuple(modifier for modifier in self.modifiers if modifier in BITS)

    @property
    def is_barrier(self) -> bool:
        """Whether it is a barrier of the program, not of a warp."""
        return self.opcode in BARRIERS and "warp" not in self.modifiers

    def __str__(self) -> str:
        return f"`{self.text}` ({self.location})"


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter and its place in the parameter space, in bytes."""

    name: str
    type: str
    offset: int


@dataclass
class Kernel:
    """One entry of a PTX module.

    Attributes:
        name: of the entry.
        parameters: in order.
        registers: width in bits, by name.
        instructions: in order.
        labels: index of the instruction that follows each.
        symbols: offset in shared memory, by name.
        shared: bytes of shared memory that are declared with a size.
    """

    name: str
    parameters: list[Parameter]
    registers: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    shared: int = 0


_ENTRY = re.compile(r"\.entry\s+([\w$.]+)\s*\((.*?)\)[^{]*\{", re.S)
_EXTERNAL = re.compile(r"\.extern\s+\.shared\s.*?([\w$]+)\[\]")
_PARAMETER = re.compile(r"\.param\s+\.(\w+).*?([\w$]+)\s*$", re.S)
_LOCATION = re.compile(r"\.loc\s[^/]*//\s*(.*)")
_LABEL = re.compile(r"([\w$]+):")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.S)


def parse(ptx: str) -> Kernel:
    """The one entry of a module.

    Raises:
        SimulationError: there is none, or more than one.
        Unsupported: a parameter or directive that is not simulated.
    """
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise SimulationError(f"a PTX module with one entry is taken, got {len(entries)} entries")
    (entry,) = entries
    kernel = Kernel(entry[1], _parameters(entry[2]))
    kernel.symbols = {found[1]: 0 for found in _EXTERNAL.finditer(ptx, 0, entry.start())}
    for statement, location in _statements(kernel, ptx[entry.end() :]):
        if statement.startswith(".reg"):
            _declare_registers(kernel, statement)
        elif statement.startswith(".shared"):
            _declare_shared(kernel, statement)
        elif statement.startswith(_HINTS):
            continue
        elif statement.startswith("."):
            raise Unsupported(f"directive `{statement}` ({location})")
        else:
            kernel.instructions.append(_instruction(statement, location))
    return kernel


def split(operands: str) -> tuple[str, ...]:
    """The operands of a list that commas separate, except inside braces and brackets."""
    return tuple(part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", operands) if part.strip())


def _parameters(text: str) -> list[Parameter]:
    found, offset = [], 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        match = _PARAMETER.fullmatch(declaration)
        if match is None or match[1] not in BITS:
            raise Unsupported(f"parameter `{declaration}`")
        size = BITS[match[1]] // 8
        offset = -(-offset // size) * size
        found.append(Parameter(match[2], match[1], offset))
        offset += size
    return found


def _statements(kernel: Kernel, body: str) -> Iterator[tuple[str, str]]:
    """(statement, location) up to the end of the entry; labels are noted on the way."""
    location, depth, statement = "", 1, ""
    for line in body.splitlines():
        found = _LOCATION.search(line)
        if found is not None:
            location = found[1].strip()
            continue
        code = line.split("//")[0].strip()
        label = _LABEL.fullmatch(code)
        if label is not None:
            kernel.labels[label[1]] = len(kernel.instructions)
            continue
        if not statement and code in ("{", "}"):
            depth += 1 if code == "{" else -1
            if not depth:
                return
            continue
        *whole, rest = f"{statement} {code}".split(";")
        statement = rest.strip()
        for part in whole:
            yield part.strip(), location


def _declare_registers(kernel: Kernel, statement: str) -> None:
    found = _REGISTERS.fullmatch(statement)
    assert found is not None
    for name in found[2].split(","):
        family = re.fullmatch(r"\s*([%\w$]+)(?:<(\d+)>)?\s*", name)
        assert family is not None
        names = [f"{family[1]}{i}" for i in range(int(family[2]))] if family[2] else [family[1]]
        kernel.registers.update(dict.fromkeys(names, BITS[found[1]]))


def _declare_shared(kernel: Kernel, statement: str) -> None:
    found = _SHARED.fullmatch(statement)
    if found is None:
        raise Unsupported(f"directive `{statement}`")
    align = int(found[1] or 4)
    start = -(-kernel.shared // align) * align
    kernel.symbols[found[3]] = start
    kernel.shared = start + BITS[found[2]] // 8 * int(found[4] or 1)


def _instruction(statement: str, location: str) -> Instruction:
    found = _STATEMENT.fullmatch(statement)
    if found is None:
        raise Unsupported(f"statement `{statement}` ({location})")
    opcode, *modifiers = found[3].split(".")
    return Instruction(
        guard=found[2],
        negated=found[1] == "!",
        opcode=opcode,
        modifiers=tuple(filter(None, modifiers)),
        operands=split(found[4]),
        location=location,
        text=" ".join(statement.split()),
    )
