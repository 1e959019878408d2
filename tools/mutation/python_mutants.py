"""Mutants of Python source: one place of one function changed, by rules that know nothing of what it computes."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

from tools.mutation.mutant import Mutant, numbered

#: Functions whose call is replaced by its first argument: a missing tanh, sigmoid, softmax, cast, ...
_REMOVABLE = {
    "abs", "clone", "exp", "flatten", "float", "layer_norm", "max", "normalise", "relu", "sigmoid", "softmax", "sqrt",
    "tanh", "to", "transpose", "trans",
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}  # fmt: skip
#: Parts of the syntax that compute nothing.
_SKIPPED = ("annotation", "returns", "decorator_list", "args", "ctx")


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of the functions of a file, each change once."""
    return numbered(_mutants(file, source))


def _mutants(file: str, source: str) -> Iterator[Mutant]:
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        for owner, name, place, node in _places(function, body):
            for replacement in _replacements(node):
                before, after = ast.unparse(node), ast.unparse(replacement)
                if before == after:
                    continue
                _put(owner, name, place, replacement)
                changed = ast.unparse(ast.fix_missing_locations(tree))
                _put(owner, name, place, node)
                line = getattr(node, "lineno", function.lineno)
                yield Mutant(file, line, function.name, before, after, changed + "\n")


def _put(owner: ast.AST, name: str, place: int | None, node: ast.AST) -> None:
    if place is None:
        setattr(owner, name, node)
    else:
        getattr(owner, name)[place] = node


def _places(function: ast.FunctionDef, body: list[ast.stmt]) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """(owner, field, index, node) of everything below the statements of a function, but not in functions inside it."""
    first = len(function.body) - len(body)
    waiting: list[tuple[ast.AST, str, int | None, ast.AST]] = [
        (function, "body", first + i, node) for i, node in enumerate(body)
    ]
    while waiting:
        owner, name, place, node = waiting.pop(0)
        yield owner, name, place, node
        if isinstance(node, (ast.FunctionDef, ast.Assert, ast.Raise, ast.JoinedStr)):
            continue
        for inner, value in ast.iter_fields(node):
            if inner in _SKIPPED and not (inner == "args" and isinstance(node, ast.Call)):
                continue
            if isinstance(value, ast.AST):
                waiting.append((node, inner, None, value))
            elif isinstance(value, list):
                waiting += [(node, inner, i, item) for i, item in enumerate(value) if isinstance(item, ast.AST)]


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp):
        yield from _of_operation(node)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        yield _with(node, ops=[_COMPARISONS[type(node.ops[0])]()])
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and node.value is not bool(node.value):
        yield _with(node, value=node.value + 1)
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, (ast.Tuple, ast.List)):
        for i in range(len(node.elts) - 1):
            swapped = [*node.elts[:i], node.elts[i + 1], node.elts[i], *node.elts[i + 2 :]]
            yield _with(node, elts=swapped)
    elif isinstance(node, ast.Slice) and node.upper is not None and node.lower is None:
        yield _with(node, lower=node.upper, upper=None)
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()


def _of_operation(node: ast.BinOp) -> Iterator[ast.AST]:
    """Another operator, and either side alone: a dropped bias, residual, gate or scale."""
    if type(node.op) in _OPERATORS:
        yield _with(node, op=_OPERATORS[type(node.op)]())
    yield node.left
    yield node.right


def _of_call(node: ast.Call) -> Iterator[ast.AST]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in _REMOVABLE:
        method = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") not in ("torch", "tl", "F")
        if method:
            assert isinstance(node.func, ast.Attribute)
            yield node.func.value
        elif node.args:
            yield node.args[0]
    if name == "where" and len(node.args) == 3:
        yield node.args[1]
        yield node.args[2]
    for keyword in node.keywords:
        if keyword.arg == "mask":
            yield _with(node, keywords=[other for other in node.keywords if other.arg not in ("mask", "other")])


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
