"""mutation.md: its tables, from the results that are kept and the reasons that were found for survivors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tools.mutation import results
from tools.mutation.mutant import SURVIVED
from tools.mutation.results import Reasons

PAGE = Path(__file__).with_name("mutation.md")
_BLOCK = re.compile(r"(<!-- mutation (\w+) -->\n).*?(<!-- /mutation -->)", re.S)
#: Outcomes in the order of the columns. The first two are the merit of the tests.
_OUTCOMES = {
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


def render(text: str, found: Mapping[str, results.Summary], why: Mapping[str, Reasons]) -> str:
    """The page with every block written anew.

    Raises:
        ValueError: the page has no block for a part that has results.
    """
    missing = set(found) - {block[2] for block in _BLOCK.finditer(text)}
    if missing:
        raise ValueError(f"the page takes a block `<!-- mutation PART -->` for {', '.join(sorted(missing))}")

    def block(place: re.Match[str]) -> str:
        content = _block(found[place[2]], why.get(place[2], {})) if place[2] in found else "Not run.\n"
        return f"{place[1]}{content}{place[3]}"

    return _BLOCK.sub(block, text)


def write() -> None:
    """Write the page."""
    PAGE.write_text(render(PAGE.read_text(), results.read(), results.reasons()))


def _block(summary: results.Summary, why: Reasons) -> str:
    return f"{_rates(summary)}\n\n{_table(summary)}\n\n{_survivors(why)}"


def _rates(summary: results.Summary) -> str:
    counts, made = results.totals(summary), sum(summary["made"].values())
    run = sum(counts.values())
    counted = run - counts["does not compile"] - counts["same code"]
    dead = counted - sum(counts[outcome] for outcome in results.LEFT)
    stopped = counts["raised"] + counts["crashed"]
    words = f"{made} mutants, {'all' if run == made else run} run. Killed: {_share(dead, counted)}"
    if stopped:
        words += f"; without those that raise or crash {_share(dead - stopped, counted - stopped)}"
    return words + "."


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "none"


def _table(summary: results.Summary) -> str:
    outcomes = [outcome for outcome in _OUTCOMES if results.totals(summary)[outcome]]
    rows = [["", "made", *(_OUTCOMES[outcome] for outcome in outcomes)], ["---", *["--:"] * (1 + len(outcomes))]]
    for file, made in summary["made"].items():
        counts = summary["outcomes"].get(file, {})
        rows.append([f"`{file}`", str(made), *(str(counts.get(outcome, 0)) for outcome in outcomes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _survivors(why: Reasons) -> str:
    lines = []
    for reason, mutants in why.items():
        lines.append(f"* {reason or '**Not explained**'} ({len(mutants)})")
        if not reason:
            lines += [f"  * {name}" for name in mutants]
    return "\n".join(lines or ["No survivor."]) + "\n"
