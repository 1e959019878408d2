"""What compiled code uses, read from its assembly: registers, spills and where they are, products, barriers."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: Operations by what they are.
_NVIDIA = {
    "spills": r"STL|LDL",
    "inner": r"STL|LDL",
    "mma": r"HMMA|HGMMA|UTCHMMA|UTCQMMA",
    "barriers": r"BAR",
}
_AMD = {
    "spills": r"scratch_(store|load)\w*",
    "inner": r"scratch_(store|load)\w*",
    "mma": r"v_(mfma|wmma)\w*",
    "barriers": r"s_barrier",
}
#: Loops of the forward kernel that are no inner ones: over time, over blocks.
OUTER = 2


class Usage(NamedTuple):
    """What one compiled kernel uses.

    Attributes:
        registers: of a thread; of AMD's vector registers, those for accumulators included.
        spills: loads and stores of registers that did not fit.
        inner: those of them in inner loops, that is in a loop other than the `OUTER` longest.
        shared: bytes of shared memory of a program.
        mma: tensor-core instructions.
        barriers: those of the source and those that the compiler put between two layouts.
    """

    registers: int
    spills: int
    inner: int
    shared: int
    mma: int
    barriers: int


class Operation(NamedTuple):
    """An instruction: its name, and the label that it goes to; empty for none."""

    name: str
    target: str


def nvidia(cubin: bytes, shared: int) -> Usage:
    """That of a cubin."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    code = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(?:.*?`\((\.L_\w+)\))?")
    return _usage(text, int(registers[1]), shared, code, r"\s*(\.L_\w+):", _NVIDIA)


def amd(text: str, shared: int) -> Usage:
    """That of assembly for an AMD target."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    assert registers is not None
    code = re.compile(r"\s+([a-z]\w+)(?:.*?(\.LBB\w+))?")
    return _usage(text, int(registers[1]), shared, code, r"(\.LBB\w+):", _AMD)


def _usage(text: str, registers: int, shared: int, code: re.Pattern[str], label: str, kinds: dict[str, str]) -> Usage:
    operations: list[Operation] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(operations)
        elif found := code.match(line):
            operations.append(Operation(found[1], found[2] or ""))
    inner = {at for start, stop in _loops(operations, labels)[OUTER:] for at in range(start, stop + 1)}
    counts = {
        kind: sum(
            re.fullmatch(names, operation.name) is not None and (kind != "inner" or at in inner)
            for at, operation in enumerate(operations)
        )
        for kind, names in kinds.items()
    }
    return Usage(registers=registers, shared=shared, **counts)


def _loops(operations: Iterable[Operation], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last operation of every loop, longest first: of each label that is gone back to."""
    last: dict[int, int] = {}
    for at, operation in enumerate(operations):
        start = labels.get(operation.target, at + 1)
        if start <= at:
            last[start] = max(at, last.get(start, at))
    return sorted(last.items(), key=lambda loop: loop[0] - loop[1])


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
