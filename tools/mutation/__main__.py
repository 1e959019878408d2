"""The command of `tools.mutation`."""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.mutation import jobs, page, results
from tools.mutation.jobs import ROOT, Job
from tools.mutation.mutant import SURVIVED

PARTS = (*jobs.PYTHON_FILES, "cpp", "barriers")


def main() -> int:
    """Run mutants and write results.csv and mutation.md; 1 where the unchanged source does not pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "page"])
    parser.add_argument("--every", type=int, default=1, help="only every n-th mutant")
    parser.add_argument("--minutes", type=float, default=1e9, help="when to stop")
    parser.add_argument("--survivors", action="store_true", help="only those that survived before, again")
    parser.add_argument("--only", help="mutants whose name has this; nothing is kept")
    given = parser.parse_args()
    if given.part == "page":
        page.write()
        return 0
    with TemporaryDirectory() as folder:
        made = _jobs(given.part, Path(folder))
        if given.only:
            for job in made:
                if given.only in job.key:
                    print(f"{job.run()} | {job.key}", flush=True)
            return 0
        return _run(given.part, made, given.every, time.monotonic() + 60 * given.minutes, given.survivors)


def _jobs(part: str, folder: Path) -> list[Job]:
    if part == "cpp":
        return jobs.cpp(ROOT / "build/mutation")
    if part == "barriers":
        os.environ.pop("TRITON_INTERPRET", None)
        from tools.mutation import barriers

        return barriers.jobs()
    return jobs.python(part, folder)


def _run(part: str, made: list[Job], every: int, deadline: float, again: bool) -> int:
    found = results.Found(part)
    chosen = [job for number, job in enumerate(made) if not job.file or number % every == 0]
    wanted = SURVIVED if again else None
    todo = [job for job in chosen if job.file and found.outcome(job) == wanted]
    random.Random(0).shuffle(todo)
    todo = [*(job for job in chosen if not job.file), *jobs.in_turns(todo, [job for job in made if found.outcome(job)])]
    for number, job in enumerate(todo):
        if time.monotonic() > deadline:
            print(f"stopped; {len(todo) - number} are left", flush=True)
            break
        try:
            outcome = job.run()
        except KeyboardInterrupt:
            break
        if not job.file:
            if outcome != SURVIVED:
                print(f"{part}, unchanged: {outcome}")
                return 1
            continue
        found.record(job, outcome)
        print(f"{number}/{len(todo)} {outcome[:100]} | {job.key}", flush=True)
    summary = found.summary(made)
    results.keep(part, summary, found.survivors(made))
    page.write()
    print(f"{part}: {sum(summary['made'].values())} mutants, {dict(results.totals(summary))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
