"""Outcomes of mutants: a file of all outcomes in build/, from which a run goes on, and the committed summary."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from tools.mutation.jobs import ROOT, Job
from tools.mutation.mutant import SURVIVED

#: What was found in each file, a row of numbers of mutants. `mutation.md` is made from it.
RESULTS = Path(__file__).parent / "results.csv"
#: Part -> `Reasons`.
SURVIVORS = Path(__file__).parent / "survivors.json"
#: Kinds of outcomes of mutants that were not killed.
LEFT = (SURVIVED, "doubled", "spare")


class Summary(TypedDict):
    """Of one part.

    Attributes:
        made: mutants that the rules make, by file.
        outcomes: how many of them were killed, raised, ..., by file.
    """

    made: dict[str, int]
    outcomes: dict[str, dict[str, int]]


#: Why mutants survive, in words ("" where it is not known yet): "file: name" of each.
Reasons = dict[str, list[str]]


class Found:
    """The outcomes of a part so far, kept in `build/`; those of a file that has changed are forgotten."""

    def __init__(self, part: str) -> None:
        self._path = ROOT / "build/mutation" / f"{part}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._files = json.loads(self._path.read_text()) if self._path.exists() else {}

    def outcome(self, job: Job) -> str | None:
        """What is known of a mutant."""
        kept = self._files.get(job.file, {})
        return kept.get("outcomes", {}).get(job.key) if kept.get("digest") == job.digest else None

    def record(self, job: Job, outcome: str) -> None:
        """Keep what became of a mutant."""
        kept = self._files.get(job.file, {})
        if kept.get("digest") != job.digest:
            kept = self._files[job.file] = {"digest": job.digest, "outcomes": {}}
        kept["outcomes"][job.key] = outcome
        written = self._path.with_suffix(".new")
        written.write_text(json.dumps(self._files, indent=1) + "\n")
        written.replace(self._path)

    def summary(self, jobs: Sequence[Job]) -> Summary:
        """Of all that is known of the mutants of the present sources."""
        found: Summary = {"made": {}, "outcomes": {}}
        for job in jobs:
            if not job.file:
                continue
            found["made"][job.file] = found["made"].get(job.file, 0) + 1
            outcome = self.outcome(job)
            if outcome is None:
                continue
            counts = found["outcomes"].setdefault(job.file, {})
            name = outcome.split(":")[0]
            counts[name] = counts.get(name, 0) + 1
        return found

    def survivors(self, jobs: Sequence[Job]) -> list[str]:
        """ "file: name" of each mutant of the present sources that survived."""
        return [f"{job.file}: {job.key}" for job in jobs if job.file and self.outcome(job) == SURVIVED]


def read() -> dict[str, Summary]:
    """The summary of each part."""
    found: dict[str, Summary] = {}
    if not RESULTS.exists():
        return found
    with RESULTS.open(newline="") as lines:
        for row in csv.DictReader(lines):
            summary = found.setdefault(row.pop("part"), {"made": {}, "outcomes": {}})
            file, made = row.pop("file"), row.pop("made")
            summary["made"][file] = int(made)
            summary["outcomes"][file] = {outcome: int(number) for outcome, number in row.items() if number}
    return found


def _write(summaries: Mapping[str, Summary]) -> None:
    rows = [
        {"part": part, "file": file, "made": made, **summary["outcomes"].get(file, {})}
        for part, summary in summaries.items()
        for file, made in summary["made"].items()
    ]
    columns = dict.fromkeys(("part", "file", "made", *(name for row in rows for name in row)))
    with RESULTS.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def reasons() -> dict[str, Reasons]:
    """Why mutants of each part survive."""
    found: dict[str, Reasons] = json.loads(SURVIVORS.read_text()) if SURVIVORS.exists() else {}
    return found


def keep(part: str, summary: Summary, survivors: Sequence[str]) -> None:
    """Put the summary and the survivors of a part in their place, each survivor under the reason that it had."""
    why = {mutant: reason for reason, mutants in reasons().get(part, {}).items() for mutant in mutants}
    found: Reasons = {}
    for mutant in survivors:
        found.setdefault(why.get(mutant, ""), []).append(mutant)
    _write(read() | {part: summary})
    SURVIVORS.write_text(json.dumps(reasons() | {part: found}, indent=1) + "\n")


def totals(summary: Summary) -> Counter[str]:
    """How many were killed, raised, ..., in all files."""
    found: Counter[str] = Counter()
    for counts in summary["outcomes"].values():
        found.update(counts)
    return found
