"""What a mutant is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

#: The outcome of a mutant that nothing found.
SURVIVED = "survived"


@dataclass(frozen=True)
class Mutant:
    """A source with one place changed.

    Attributes:
        file: which file, relative to the repository.
        line: of the change in the original.
        function: in which it is.
        before, after: the text of the place.
        source: the whole file, changed.
        number: counts those of a function that are otherwise named the same, from 1.
    """

    file: str
    line: int
    function: str
    before: str
    after: str
    source: str
    number: int = 1

    @property
    def key(self) -> str:
        """Its name among those of its file, free of line numbers."""
        again = f" ({self.number})" if self.number > 1 else ""
        return f"{self.function}: `{_short(self.before)}` -> `{_short(self.after)}`{again}"


def numbered(mutants: Iterable[Mutant]) -> Iterator[Mutant]:
    """The same with their numbers, so that keys are unique."""
    seen: Counter[str] = Counter()
    for mutant in mutants:
        seen[mutant.key] += 1
        yield replace(mutant, number=seen[mutant.key])


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 90 else f"{text[:60]} ... {text[-25:]}"
