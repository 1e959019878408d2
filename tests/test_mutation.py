"""The generator of mutants: what it makes of a small function, and that it makes nothing else."""

from __future__ import annotations

import ast

from tests.mutation.mutants import mutants

SOURCE = '''"""A module."""


def gate(x: int, bias: float = 1.0) -> float:
    """Docstring with 1 + 2."""
    assert x < 3, f"{x + 1}"
    i, f = split(x, 2)
    if x <= 4:
        i += bias
    return sigmoid(i) * f
'''


def test_every_rule_leaves_its_mutant() -> None:
    changes = {mutant.change for mutant in mutants("m.py", SOURCE)}
    assert changes == {
        "`(i, f)` -> `(f, i)`",
        "`2` -> `3`",
        "`x <= 4` -> `x < 4`",
        "`4` -> `5`",
        "`if x <= 4: i += bias` -> `if not x <= 4: i += bias`",
        "`i += bias` -> `pass`",
        "`sigmoid(i) * f` -> `sigmoid(i) / f`",
        "`sigmoid(i) * f` -> `sigmoid(i)`",
        "`sigmoid(i) * f` -> `f`",
        "`sigmoid(i)` -> `i`",
    }


def test_each_is_the_source_with_one_change() -> None:
    original = ast.unparse(ast.parse(SOURCE)) + "\n"
    found = list(mutants("m.py", SOURCE))
    assert len({mutant.source for mutant in found}) == len(found)
    for mutant in found:
        assert mutant.source != original
        assert mutant.function == "gate"
        pairs = zip(original.splitlines(), mutant.source.splitlines(), strict=True)
        assert sum(a != b for a, b in pairs) == 1, mutant
        assert SOURCE.splitlines()[mutant.line - 1].strip()
