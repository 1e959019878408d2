"""Mutants of C++ source: one place of one function changed, by rules that know nothing of what it computes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import tree_sitter_cpp
from tree_sitter import Language, Node, Parser

from tools.mutation.mutant import Mutant, numbered

#: Functions whose call is replaced by each of its arguments: a missing tanh, sigmoid, ReLU, ...
_REMOVABLE = {
    "abs", "clamp", "exp", "max", "min", "reciprocal", "round", "sigmoid", "sqrt", "sum", "tanh", "with_sign_of",
    "zero_if_less", "zero_unless_positive",
}  # fmt: skip
#: a * b + c and c - a * b: either part alone, or the other one.
_FUSED = {"fma": "fnma", "fnma": "fma"}
_OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "&&": "||", "||": "&&", "%": "/"}
_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
#: What computes nothing: types, messages, and statements that only measure or hint.
_SKIPPED = {"template_argument_list", "throw_statement", "static_assert_declaration", "comment", "preproc_call"}
_SILENT = re.compile(r"clock|prefetch\(|PhaseClock")


@cache
def _parser() -> Parser:
    return Parser(Language(tree_sitter_cpp.language()))


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of the functions of a file, each change once.

    Raises:
        ValueError: the file cannot be parsed.
    """
    return numbered(_mutants(file, source.encode()))


def _mutants(file: str, source: bytes) -> Iterator[Mutant]:
    root = _parser().parse(source).root_node
    if root.has_error:
        raise ValueError(f"{file}: not understood as C++")
    for function, node in _places(root, ""):
        before = _text(node)
        for after in dict.fromkeys(_replacements(node)):
            if after != before:
                changed = source[: node.start_byte] + after.encode() + source[node.end_byte :]
                yield Mutant(file, node.start_point[0] + 1, function, before, after, changed.decode())


def _text(node: Node) -> str:
    assert node.text is not None
    return node.text.decode()


def _field(node: Node, name: str) -> Node:
    found = node.child_by_field_name(name)
    assert found is not None, (node.type, name)
    return found


def _places(node: Node, function: str) -> Iterator[tuple[str, Node]]:
    """(function, node) of everything inside the bodies and initialisers of functions."""
    if node.type in _SKIPPED or (node.type in ("expression_statement", "declaration") and _SILENT.search(_text(node))):
        return
    if node.type == "function_definition":
        name = re.split(r"[\s*&]", _text(_field(node, "declarator")).split("(")[0])[-1]
        function = f"{function}::{name}" if function else name
        for child in node.children:
            if child.type in ("compound_statement", "field_initializer_list"):
                yield from _inside(child, function)
        return
    if node.type in ("class_specifier", "struct_specifier") and node.child_by_field_name("name"):
        function = _text(_field(node, "name"))
    for child in node.children:
        yield from _places(child, function)


def _inside(node: Node, function: str) -> Iterator[tuple[str, Node]]:
    if node.type in _SKIPPED or (node.type in ("expression_statement", "declaration") and _SILENT.search(_text(node))):
        return
    yield function, node
    for child in node.children:
        yield from _inside(child, function)


def _replacements(node: Node) -> Iterator[str]:
    if node.type == "binary_expression":
        yield from _of_operation(node)
    elif node.type == "unary_expression" and _text(_field(node, "operator")) in "-!~":
        yield _text(_field(node, "argument"))
    elif node.type == "number_literal":
        yield _one_more(_text(node))
    elif node.type in ("true", "false"):
        yield {"true": "false", "false": "true"}[node.type]
    elif node.type == "call_expression":
        yield from _of_call(node)
    elif node.type == "conditional_expression":
        yield from (_text(_field(node, side)) for side in ("consequence", "alternative"))
    elif node.type == "condition_clause":
        yield f"(!{_text(node)})"
    elif node.type in ("initializer_list", "argument_list"):
        yield from _swapped(node)
    elif (node.type == "expression_statement" and node.named_children[0].type in (
        "assignment_expression", "call_expression", "comma_expression",
    )) or node.type in ("continue_statement", "break_statement"):  # fmt: skip
        yield ";"


def _of_operation(node: Node) -> Iterator[str]:
    """Another operator, and either side alone: a dropped bias, residual, gate or scale."""
    left, operator, right = (_text(_field(node, name)) for name in ("left", "operator", "right"))
    if operator in _COMPARISONS:
        yield f"{left} {_COMPARISONS[operator]} {right}"
    elif operator in _OPERATORS:
        yield f"{left} {_OPERATORS[operator]} {right}"
        yield left
        yield right


def _of_call(node: Node) -> Iterator[str]:
    name = re.split(r"::|\.|->", _text(_field(node, "function")).split("<")[0])[-1]
    arguments = [_text(argument) for argument in _field(node, "arguments").named_children]
    if name in _REMOVABLE:
        yield from (f"({argument})" for argument in arguments)
    elif name in _FUSED and len(arguments) == 3:
        yield arguments[2]
        yield f"({arguments[0]}) * ({arguments[1]})"
        yield f"{_FUSED[name]}({', '.join(arguments)})"


def _swapped(node: Node) -> Iterator[str]:
    """Each pair of neighbours the other way round; what has other types does not compile."""
    start, text = node.start_byte, _text(node).encode()
    for one, two in pairwise(node.named_children):
        a, b, c, d = (byte - start for byte in (one.start_byte, one.end_byte, two.start_byte, two.end_byte))
        yield (text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]).decode()


def _one_more(number: str) -> str:
    found = re.fullmatch(r"(\d+)((?:\.\d*)?(?:e[-+]?\d+)?)(\w*)", number)
    if found is None:  # hexadecimal
        return f"({number} + 1)"
    whole, rest, suffix = found.groups()
    return f"{int(whole) + 1}{rest}{suffix}"
