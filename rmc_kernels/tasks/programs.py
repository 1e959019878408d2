"""Small programs and digits, and what they evaluate to (after Zaremba and Sutskever 2014, arXiv:1410.4615)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple


class Problem(NamedTuple):
    """A source text and the answer that it asks for."""

    source: str
    answer: str


class Value(NamedTuple):
    """An expression and what it evaluates to once the lines before it have run."""

    code: str
    value: int


class _Writer:
    """Writes one program: lines, and names that are not yet taken."""

    def __init__(self, digits: int, random: Random) -> None:
        self.digits, self.random, self.lines = digits, random, list[str]()
        self.names = random.sample("abcdefgh", 8)

    def number(self) -> Value:
        value = self.random.randrange(10**self.digits)
        return Value(str(value), value)

    def sum(self, left: Value) -> Value:
        right = self.number()
        if self.random.random() < 0.5:
            return Value(f"({left.code}+{right.code})", left.value + right.value)
        return Value(f"({left.code}-{right.code})", left.value - right.value)

    def multiple(self, left: Value) -> Value:
        factor = self.random.randint(2, 9)
        return Value(f"({factor}*{left.code})", factor * left.value)

    def variable(self, left: Value) -> Value:
        name = self.names.pop()
        self.lines.append(f"{name}={left.code}")
        return self.sum(Value(name, left.value))

    def condition(self, left: Value) -> Value:
        low, other = self.number(), self.number()
        bigger = self.random.random() < 0.5
        chosen = (left.value > low.value) == bigger
        test = f"{left.code}{'>' if bigger else '<='}{low.code}"
        return Value(f"({left.code} if {test} else {other.code})", left.value if chosen else other.value)

    def loop(self, left: Value) -> Value:
        name, times, added = self.names.pop(), self.random.randint(2, 5), self.number()
        sign, signed = ("+", 1) if self.random.random() < 0.5 else ("-", -1)
        self.lines += [f"{name}={left.code}", f"for x in range({times}):{name}{sign}={added.code}"]
        return Value(name, left.value + signed * times * added.value)

    def program(self, operations: Sequence[Callable[[Value], Value]], nesting: int) -> Problem:
        found = self.number()
        for _ in range(nesting):
            found = self.random.choice(operations)(found)
        return Problem("\n".join([*self.lines, f"print({found.code})"]), str(found.value))


def addition(digits: int, nesting: int, random: Random) -> Problem:
    """`print(37+512)`: two numbers of as many digits at most."""
    left, right = (random.randrange(10**digits) for _ in range(2))
    return Problem(f"print({left}+{right})", str(left + right))


def control(digits: int, nesting: int, random: Random) -> Problem:
    """`nesting` variables, conditions and loops."""
    writer = _Writer(digits, random)
    return writer.program([writer.variable, writer.condition, writer.loop], nesting)


def program(digits: int, nesting: int, random: Random) -> Problem:
    """`nesting` operations of every kind: sums, small multiples, variables, conditions and loops."""
    writer = _Writer(digits, random)
    operations = [writer.sum, writer.multiple, writer.variable, writer.condition, writer.loop]
    return writer.program(operations, nesting)


def _digits(count: int, random: Random) -> str:
    return "".join(random.choices("0123456789", k=count))


def copy(digits: int, nesting: int, random: Random) -> Problem:
    """The digits once more."""
    text = _digits(digits, random)
    return Problem(f"c{text}", text)


def reverse(digits: int, nesting: int, random: Random) -> Problem:
    """The digits from the last to the first."""
    text = _digits(digits, random)
    return Problem(f"r{text}", text[::-1])


def double(digits: int, nesting: int, random: Random) -> Problem:
    """The digits twice."""
    text = _digits(digits, random)
    return Problem(f"d{text}", text * 2)


#: What makes a problem of each kind, from the digits of its numbers (or of its text) and the nesting.
KINDS: dict[str, Callable[[int, int, Random], Problem]] = {
    make.__name__: make for make in (addition, control, program, copy, reverse, double)
}
