"""What each PTX instruction of memory and of whole warps becomes: calls of `Unit`'s methods, by opcode."""

from __future__ import annotations

import re

from tools.ptxsim.errors import Unsupported
from tools.ptxsim.parse import BITS, Instruction
from tools.ptxsim.translator import UNSIGNED, Handler, Translator, vector

_WIDTH = {"global": 64, "shared": 32}
_MMA = re.compile(r"sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(f16|bf16|tf32)\.\2\.f32")
_COPY = re.compile(r"async\.c[ag]\.shared\.global(?:\.L2::\w+)*")
_MATRIX = re.compile(r"sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
#: Of loads and stores: hints to the caches.
_HINTS = re.compile(r"(?:L[12]::.*|c[agsv]|cv|wb|wt|nc|lu|evict_\w+)")


def _space(instruction: Instruction) -> str:
    found = [modifier for modifier in instruction.modifiers if modifier in (*_WIDTH, "param")]
    if len(found) != 1:
        raise Unsupported("an address space other than global, shared and param")
    return found[0]


def _access(instruction: Instruction) -> tuple[str, str, int]:
    """Address space, element type as bits, elements."""
    space = _space(instruction)
    (type_,) = instruction.types
    if type_ in ("s8", "s16"):
        raise Unsupported("an access that extends the sign")
    elements = 1
    for modifier in instruction.modifiers:
        if re.fullmatch("v[24]", modifier):
            elements = int(modifier[1:])
        elif modifier not in (space, type_) and not _HINTS.fullmatch(modifier):
            raise Unsupported(f"modifier {modifier}")
    return space, type_, elements


def _load(block: Translator, instruction: Instruction) -> None:
    space, type_, elements = _access(instruction)
    destinations, source = vector(instruction.operands[0]), instruction.operands[1]
    if len(destinations) != elements:
        raise Unsupported(f"{len(destinations)} registers for {elements} elements")
    if space == "param":
        name = source.strip("[] ")
        block.write(destinations[0], f"U.parameter({name!r}, np.{UNSIGNED[BITS[type_]]})", f"b{BITS[type_]}")
        return
    arguments = [block.address(source, _WIDTH[space]), str(BITS[type_] // 8), str(elements), block.mask()]
    results = [(name, f"b{BITS[type_]}") for name in destinations]
    block.call(f"machine.{space}_memory.load", ["U", *arguments, block.site], results)


def _store(block: Translator, instruction: Instruction) -> None:
    space, type_, elements = _access(instruction)
    values = vector(instruction.operands[1])
    if len(values) != elements or space == "param":
        raise Unsupported(f"{len(values)} registers for {elements} elements of {space} memory")
    stored = ", ".join(block.read(value, f"b{BITS[type_]}") for value in values)
    address = block.address(instruction.operands[0], _WIDTH[space])
    size = str(BITS[type_] // 8)
    block.call(f"machine.{space}_memory.store", ["U", address, size, f"[{stored}]", block.mask(), block.site], [])


def _copy(block: Translator, instruction: Instruction) -> None:
    """cp.async and its groups."""
    text, operands = ".".join(instruction.modifiers), instruction.operands
    if text == "async.commit_group":
        block.call("commit_copies", [block.mask(), block.site], [])
    elif text == "async.wait_group":
        block.call("wait_for_copies", [operands[0], block.mask(), block.site], [])
    elif _COPY.fullmatch(text):
        to, from_ = block.address(operands[0], 32), block.address(operands[1], 64)
        count = block.read(operands[3], "u32") if len(operands) > 3 else f"np.uint32({operands[2]})"
        block.call("copy", [to, from_, str(int(operands[2], 0)), count, block.mask(), block.site], [])
    else:
        raise Unsupported(f"a copy of the kind {text}")


def _matrix(block: Translator, instruction: Instruction) -> None:
    """ldmatrix, stmatrix."""
    found = _MATRIX.fullmatch(".".join(instruction.modifiers))
    if found is None:
        raise Unsupported("a form of matrix access")
    transposed = str(found[2] is not None)
    if instruction.opcode == "ldmatrix":
        registers = vector(instruction.operands[0])
        arguments = [block.address(instruction.operands[1], 32), found[1], transposed, block.mask(), block.site]
        block.call("load_matrices", arguments, [(register, "b32") for register in registers])
    else:
        values = ", ".join(block.read(register, "b32") for register in vector(instruction.operands[1]))
        address = block.address(instruction.operands[0], 32)
        block.call("store_matrices", [address, f"[{values}]", transposed, block.mask(), block.site], [])


def _multiply(block: Translator, instruction: Instruction) -> None:
    """mma: d = a b + c."""
    found = _MMA.fullmatch(".".join(instruction.modifiers))
    if found is None:
        raise Unsupported("a shape or type of mma")
    d, *sources = (vector(operand) for operand in instruction.operands)
    values = [f"[{', '.join(block.read(register, 'b32') for register in source)}]" for source in sources]
    block.call(
        "multiply", [repr(found[2]), found[1], *values, block.mask(), block.site],
        [(register, "b32") for register in d],
    )  # fmt: skip


def _shuffle(block: Translator, instruction: Instruction) -> None:
    if instruction.modifiers[:1] != ("sync",) or instruction.modifiers[-1] != "b32":
        raise Unsupported("a form of shfl")
    mode = instruction.modifiers[1]
    destination, value, lane, clamp, members = instruction.operands
    if (
        mode not in ("bfly", "idx")
        or "|" in destination
        or int(clamp, 0) != 31
        or int(members, 0) not in (-1, 2**32 - 1)
    ):
        raise Unsupported("shfl other than bfly and idx over whole warps")
    arguments = [repr(mode), block.read(value, "b32"), block.read(lane, "u32"), block.mask(), block.site]
    block.call("shuffle", arguments, [(destination, "b32")])


def _warp_barrier(block: Translator, instruction: Instruction) -> None:
    """bar.warp.sync: the threads of a warp advance together here."""
    if instruction.modifiers[:2] != ("warp", "sync"):
        raise Unsupported("a barrier inside a block")


HANDLERS: dict[str, Handler] = {
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "ldmatrix": _matrix,
    "stmatrix": _matrix,
    "mma": _multiply,
    "shfl": _shuffle,
    "bar": _warp_barrier,
}
