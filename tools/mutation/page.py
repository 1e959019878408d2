"""mutation.md: its tables, from the results that are kept and the reasons that were found for survivors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from tools.mutation import results
from tools.mutation.mutant import SURVIVED

PAGE = Path(__file__).with_name("mutation.md")
#: Why each survivor is one.
REASONS = Path(__file__).parent / "survivors.json"
_BLOCK = re.compile(r"(<!-- mutation (\w+) -->\n).*?(<!-- /mutation -->)", re.S)
#: Outcomes in the order of the columns. The first two are the merit of the tests.
_KINDS = {
    "killed": "a difference or a hazard",
    "race": "a race",
    "error": "another error",
    "wrong": "wrong numbers alone",
    "crashed": "a crash",
    "timed out": "no end",
    "raised": "raises",
    "does not compile": "does not compile",
    "same code": "same code",
    "doubled": "doubled",
    "spare": "spare",
    SURVIVED: "survived",
}


class Reason(TypedDict):
    """Why some mutants survive.

    Attributes:
        why: in words.
        mutants: "file: name" of each.
    """

    why: str
    mutants: list[str]


def reasons() -> list[Reason]:
    """Those that are kept."""
    found: list[Reason] = json.loads(REASONS.read_text())
    return found


def survivors(summary: results.Summary) -> list[str]:
    """ "file: name" of each survivor of a part that no run explains."""
    return [f"{file}: {key}" for file, keys in summary["survivors"].items() for key in keys]


def render(text: str, found: Mapping[str, results.Summary], why: Sequence[Reason]) -> str:
    """The page with every block written anew.

    Raises:
        ValueError: the page has no block for a part that has results.
    """
    missing = set(found) - {block[2] for block in _BLOCK.finditer(text)}
    if missing:
        raise ValueError(f"the page takes a block `<!-- mutation PART -->` for {', '.join(sorted(missing))}")

    def block(place: re.Match[str]) -> str:
        content = _block(found[place[2]], why) if place[2] in found else "Not run.\n"
        return f"{place[1]}{content}{place[3]}"

    return _BLOCK.sub(block, text)


def write() -> None:
    """Write the page."""
    PAGE.write_text(render(PAGE.read_text(), results.read(), reasons()))


def _block(summary: results.Summary, why: Sequence[Reason]) -> str:
    return f"{_rates(summary)}\n\n{_table(summary)}\n\n{_survivors(summary, why)}"


def _rates(summary: results.Summary) -> str:
    counts, made = results.totals(summary), sum(summary["made"].values())
    run = sum(counts.values())
    counted = run - counts["does not compile"] - counts["same code"]
    dead = counted - sum(counts[kind] for kind in results.LEFT)
    stopped = counts["raised"] + counts["crashed"]
    words = f"{made} mutants, {'all' if run == made else run} run. Killed: {_share(dead, counted)}"
    if stopped:
        words += f"; without those that raise or crash {_share(dead - stopped, counted - stopped)}"
    return words + "."


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "none"


def _table(summary: results.Summary) -> str:
    kinds = [kind for kind in _KINDS if results.totals(summary)[kind]]
    rows = [["", "made", *(_KINDS[kind] for kind in kinds)], ["---", *["--:"] * (1 + len(kinds))]]
    for file, made in summary["made"].items():
        counts = summary["outcomes"].get(file, {})
        rows.append([f"`{file}`", str(made), *(str(counts.get(kind, 0)) for kind in kinds)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _survivors(summary: results.Summary, why: Sequence[Reason]) -> str:
    left = survivors(summary)
    lines = []
    for reason in why:
        here = [name for name in reason["mutants"] if name in left]
        if here:
            lines.append(f"* {reason['why']} ({len(here)})")
            left = [name for name in left if name not in here]
    if left:
        lines += [f"* **Not explained** ({len(left)})", *(f"  * {name}" for name in left)]
    return "\n".join(lines or ["No unexplained survivor."]) + "\n"
