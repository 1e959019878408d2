"""How contestants look in every plot: a colour and a marker each. The colours are Okabe and Ito's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Look(NamedTuple):
    """How one contestant is drawn; what is `at D` is drawn as its namesake, dashed."""

    colour: str
    marker: str
    line: str


#: Ours in blue and sky blue, wherever they stand; no two that often meet differ by colour alone.
LOOKS = {
    "eager": Look("#E69F00", "s", "-"),
    "compile": Look("#F0E442", "D", "-"),
    "lstm": Look("#009E73", "^", "-"),
    "gru": Look("#CC79A7", "v", "-"),
    "transformer": Look("#D55E00", "P", "-"),
    "rmc cpu": Look("#0072B2", "o", "-"),
    "rmc cpu, saved": Look("#56B4E9", "o", "-"),
    "rmc triton": Look("#000000", "X", "-"),
}
OTHERS = (Look("#999999", "*", "-"), Look("#666666", "h", "-"), Look("#333333", "p", "-"))


def looks(contestants: Iterable[str]) -> dict[str, Look]:
    """A look for each name; alike in every plot for those of `LOOKS`."""
    found: dict[str, Look] = {}
    others = 0
    for name in contestants:
        base = name.removesuffix(" at D")
        if base in LOOKS:
            found[name] = LOOKS[base] if base == name else LOOKS[base]._replace(line="--")
        elif name not in found:
            found[name] = OTHERS[others % len(OTHERS)]
            others += 1
    return found
