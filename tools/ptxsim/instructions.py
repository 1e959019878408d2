"""What each PTX instruction that computes becomes: handlers for `Translator.translate`, by opcode."""

from __future__ import annotations

from tools.ptxsim.errors import Unsupported
from tools.ptxsim.parse import BITS, Instruction
from tools.ptxsim.translator import UNSIGNED, Handler, Translator, dtype_of, vector

#: Half types are computed in float32 and rounded after; packed ones half by half.
_HALVES = ("f16", "bf16", "f16x2", "bf16x2")
_PACKED = ("f16x2", "bf16x2")
_FLOATS = ("f32", "f64", *_HALVES)
_FLOAT_OPERATIONS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "fma": "fma({0}, {1}, {2})",
    "min": "np.fmin({0}, {1})", "max": "np.fmax({0}, {1})",
    "min.NaN": "np.minimum({0}, {1})", "max.NaN": "np.maximum({0}, {1})",
    "neg": "-{0}", "abs": "np.abs({0})", "sqrt": "np.sqrt({0})", "rcp": "np.float32(1) / {0}", "ex2": "np.exp2({0})",
}  # fmt: skip
_INTEGER_OPERATIONS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "mad": "{0} * {1} + {2}",
    "min": "np.minimum({0}, {1})", "max": "np.maximum({0}, {1})", "neg": "np.negative({0})",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}",
}  # fmt: skip
_COMPARISONS = {
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
}  # fmt: skip
#: "ne" is false where one is a NaN; those that end in u are true there.
_FLOAT_COMPARISONS = _COMPARISONS | {
    "ne": "({0} < {1}) | ({0} > {1})", "equ": "~(({0} < {1}) | ({0} > {1}))", "neu": "{0} != {1}",
    "ltu": "~({0} >= {1})", "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
    "nan": "np.isnan({0}) | np.isnan({1})", "num": "~(np.isnan({0}) | np.isnan({1}))",
}  # fmt: skip
_BOOLEAN = {"and": "&", "or": "|", "xor": "^"}
_ROUNDED = {"rni": "np.rint({})", "rzi": "np.trunc({})", "rmi": "np.floor({})", "rpi": "np.ceil({})"}
#: Rounding to nearest is numpy's own; approximations are computed exactly.
_WITHOUT_EFFECT = ("rn", "approx", "full", "lo")


def _refuse_modifiers(instruction: Instruction, known: tuple[str, ...]) -> None:
    unknown = set(instruction.modifiers) - set(instruction.types) - set(known) - set(_WITHOUT_EFFECT)
    if unknown:
        raise Unsupported(f"modifiers {sorted(unknown)}")


def _widened(block: Translator, operand: str, type_: str) -> list[str]:
    """float32 expressions of an operand of a half type: one, or those of the low and the high half."""
    bits = block.read(operand, f"b{BITS[type_]}")
    halves = [f"low({bits})", f"high({bits})"] if type_ in _PACKED else [bits]
    return [f"from_{type_.removesuffix('x2')}({half})" for half in halves]


def _narrowed(expressions: list[str], type_: str) -> str:
    """The bits of float32 expressions rounded to a half type."""
    halves = [f"to_{type_.removesuffix('x2')}({expression})" for expression in expressions]
    return f"pack({halves[0]}, {halves[1]})" if type_ in _PACKED else halves[0]


def _arithmetic(block: Translator, instruction: Instruction) -> None:
    type_ = instruction.types[-1]
    destination, *sources = instruction.operands
    _refuse_modifiers(instruction, ("NaN", "ftz", "wide"))
    if "wide" in instruction.modifiers:
        _wide(block, instruction)
    elif type_ == "pred":
        formula = _INTEGER_OPERATIONS[instruction.opcode]
        block.write(destination, formula.format(*map(block.predicate, sources)), type_)
    elif type_ not in _FLOATS:
        formula = _INTEGER_OPERATIONS[instruction.opcode]
        block.write(destination, formula.format(*(block.read(source, type_) for source in sources)), type_)
    else:
        formula = _FLOAT_OPERATIONS[instruction.opcode + ".NaN" * ("NaN" in instruction.modifiers)]
        if type_ in _HALVES:
            parts = zip(*(_widened(block, source, type_) for source in sources), strict=True)
            block.write(destination, _narrowed([formula.format(*part) for part in parts], type_), f"b{BITS[type_]}")
            return
        operands = [block.read(source, type_) for source in sources]
        if "ftz" in instruction.modifiers:
            block.write(destination, f"flush({formula.format(*(f'flush({operand})' for operand in operands))})", type_)
        else:
            block.write(destination, formula.format(*operands), type_)


def _wide(block: Translator, instruction: Instruction) -> None:
    """mul.wide, mad.wide: the product in twice the width."""
    type_ = instruction.types[-1]
    wide = f"{type_[0]}{2 * BITS[type_]}"
    destination, *sources = instruction.operands
    a, b = (f"{block.read(source, type_)}.astype(np.{dtype_of(wide)})" for source in sources[:2])
    block.write(destination, " + ".join([f"{a} * {b}", *(block.read(source, wide) for source in sources[2:])]), wide)


def _shift(block: Translator, instruction: Instruction) -> None:
    (type_,) = instruction.types
    destination, source, amount = instruction.operands
    operator = {"shl": "<<", "shr": ">>"}[instruction.opcode]
    by = f"{block.read(amount, 'u32')}.astype(np.{dtype_of(type_)})"
    block.write(destination, f"{block.read(source, type_)} {operator} {by}", type_)


def _extract(block: Translator, instruction: Instruction) -> None:
    (type_,) = instruction.types
    destination, source, start, length = instruction.operands
    values = block.read(source, type_), block.read(start, "u32"), block.read(length, "u32")
    block.write(destination, f"extract_bits({', '.join(values)})", f"b{BITS[type_]}")


def _permute(block: Translator, instruction: Instruction) -> None:
    if instruction.modifiers != ("b32",):
        raise Unsupported("a mode of prmt")
    destination, *sources = instruction.operands
    block.write(destination, f"permute_bytes({', '.join(block.read(source, 'b32') for source in sources)})", "b32")


def _compare(block: Translator, instruction: Instruction) -> None:
    """setp. `p|q`: of packed halves the results of the low and the high half, otherwise the result and its opposite."""
    comparison, *rest = instruction.modifiers
    (type_,) = instruction.types
    _refuse_modifiers(instruction, (comparison, *_BOOLEAN))
    destinations, a, b, *combined = instruction.operands
    if type_ in _HALVES:
        pairs = list(zip(_widened(block, a, type_), _widened(block, b, type_), strict=True))
    else:
        pairs = [(block.read(a, type_), block.read(b, type_))]
    formula = (_FLOAT_COMPARISONS if type_ in _FLOATS else _COMPARISONS)[comparison]
    results = [f"({formula.format(*pair)})" for pair in pairs]
    if len(results) == 1:
        results.append(f"~{results[0]}")
    if combined:
        (boolean,) = (part for part in rest if part in _BOOLEAN)
        results = [f"{result} {_BOOLEAN[boolean]} {block.predicate(combined[0])}" for result in results]
    names = [name.strip() for name in destinations.split("|")]
    if instruction.guard in names:
        raise Unsupported("a guard that is written")
    if len(names) == 2:  # p may be what q is combined with: both first, then the writes
        block.statements.append(f"found = ({results[0]}, {results[1]})")
        results = ["found[0]", "found[1]"]
    for name, result in zip(names, results, strict=False):
        block.write(name, result, "pred")


def _select(block: Translator, instruction: Instruction) -> None:
    type_ = f"b{BITS[instruction.types[-1]]}"
    destination, a, b, condition = instruction.operands
    block.write(
        destination, f"where({block.predicate(condition)}, {block.read(a, type_)}, {block.read(b, type_)})", type_
    )


def _move(block: Translator, instruction: Instruction) -> None:
    (type_,) = instruction.types
    bits = BITS[type_]
    destination, source = instruction.operands
    if type_ == "pred":
        block.write(destination, block.predicate(source), type_)
    elif destination.startswith("{"):
        parts = vector(destination)
        width = bits // len(parts)
        whole = block.read(source, f"b{bits}")
        block.statements.append(f"whole = {whole}")
        for i, part in enumerate(parts):
            shifted = f"(whole >> np.{UNSIGNED[bits]}({i * width}))" if i else "whole"
            block.write(part, f"{shifted}.astype(np.{UNSIGNED[width]})", f"b{width}")
    elif source.startswith("{"):
        parts = vector(source)
        width = bits // len(parts)
        wide = f"np.{UNSIGNED[bits]}"
        terms = (
            f"({block.read(part, f'b{width}')}.astype({wide}) << {wide}({i * width}))" for i, part in enumerate(parts)
        )
        block.write(destination, " | ".join(terms), f"b{bits}")
    else:
        block.write(destination, block.read(source, f"b{bits}"), f"b{bits}")


def _convert(block: Translator, instruction: Instruction) -> None:
    _refuse_modifiers(instruction, (*_ROUNDED, "rna"))
    to, *from_ = instruction.types
    destination, *sources = instruction.operands
    if to in _PACKED:  # the first source becomes the high half
        upper, lower = (block.read(source, "f32") for source in sources)
        block.write(destination, _narrowed([lower, upper], to), "b32")
        return
    (type_,), (source,) = from_, sources
    value = _widened(block, source, type_)[0] if type_ in _HALVES else block.read(source, type_)
    for modifier in instruction.modifiers:
        value = _ROUNDED.get(modifier, "{}").format(value)
    if to == "tf32":
        block.write(destination, f"to_tf32({value})", "b32")
    elif to in _HALVES:
        block.write(destination, _narrowed([f"{value}.astype(np.float32)"], to), "b16")
    elif type_ in _FLOATS and to not in _FLOATS:
        block.write(destination, f"to_integer({value}, np.{dtype_of(to)})", to)
    else:
        block.write(destination, f"{value}.astype(np.{dtype_of(to)})", to)


def _address_space(block: Translator, instruction: Instruction) -> None:
    """cvta: here a generic address is a global one."""
    if "shared" in instruction.modifiers:
        raise Unsupported("generic addresses of shared memory")
    destination, source = instruction.operands
    block.write(destination, block.read(source, "b64"), "b64")


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys([*_FLOAT_OPERATIONS, *_INTEGER_OPERATIONS], _arithmetic),
    "shl": _shift,
    "shr": _shift,
    "bfe": _extract,
    "prmt": _permute,
    "setp": _compare,
    "selp": _select,
    "mov": _move,
    "cvt": _convert,
    "cvta": _address_space,
}
