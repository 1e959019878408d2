"""The command of `tests.mutation`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
FILES = {
    "reference": ["rmc_kernels/reference.py"],
    # Those that the forward pass runs; mutants of the backward pass need a judge of gradients.
    "triton": [
        f"rmc_kernels/backends/triton/device/{name}.py"
        for name in ("attention", "forward", "operands", "phases", "project", "step", "tile")
    ],
}
#: Seconds after which a mutant counts as killed: an endless loop.
PATIENCE = 120


def main() -> int:
    """Run the mutants; 1 where the unchanged source does not pass, or nothing was run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=[*FILES, "barriers", "all"], default="all")
    parser.add_argument("--every", type=int, default=1, help="only every n-th mutant")
    parser.add_argument("--json", type=Path, help="file to write every result to")
    arguments = parser.parse_args()
    chosen = [*FILES, "barriers"] if arguments.what == "all" else [arguments.what]
    results: dict[str, dict[str, str]] = {}
    for what in chosen:
        results[what] = dict(_barriers(arguments.every) if what == "barriers" else _sources(what, arguments.every))
        outcomes = Counter(result.split(":")[0] for result in results[what].values())
        print(f"{what}: {len(results[what])} mutants, {dict(outcomes)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(results.values()) else 1


def _sources(what: str, every: int) -> Iterator[tuple[str, str]]:
    """(mutant, outcome) of the files of a backend."""
    from tests.mutation.mutants import mutants

    if what == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
        importlib.import_module("triton")
    importlib.import_module("torch").set_num_threads(1)
    with TemporaryDirectory() as folder:
        for part in ("rmc_kernels", "tests"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        Path(folder, "benchmarks").symlink_to(ROOT / "benchmarks")
        outcome = _in_a_fork(lambda: _judge(what, folder))
        if outcome != "survived":
            raise SystemExit(f"{what}, unchanged: {outcome}")
        number = 0
        for file in FILES[what]:
            source = (ROOT / file).read_text()
            for mutant in mutants(file, source):
                number += 1
                if number % every:
                    continue
                Path(folder, file).write_text(mutant.source)
                outcome = _in_a_fork(lambda: _judge(what, folder))
                if outcome == "survived":
                    print(f"survived: {mutant}", flush=True)
                yield str(mutant), outcome
            Path(folder, file).write_text(source)


def _judge(what: str, folder: str) -> str:
    """In a process of its own: import the copy, and judge it."""
    sys.dont_write_bytecode = True
    os.chdir(folder)
    for name in [name for name in sys.modules if name.split(".")[0] in ("rmc_kernels", "tests")]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    judges = importlib.import_module("tests.mutation.judges")
    try:
        getattr(judges, what)()
    except judges.Killed as found:
        return f"killed: {found}"
    except Exception as error:
        return f"raised: {type(error).__name__}: {error}"
    return "survived"


def _in_a_fork(judge: Callable[[], str]) -> str:
    """What `judge` returns in a child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        signal.alarm(PATIENCE)
        os.write(writing, judge().encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        outcome = pipe.read()
    _, status = os.waitpid(child, 0)
    return outcome or f"timed out: signal {os.WTERMSIG(status)}"


def _barriers(every: int) -> Iterator[tuple[str, str]]:
    """(barrier, outcome) of compiled kernels."""
    os.environ.pop("TRITON_INTERPRET", None)
    from tests.mutation.barriers import outcomes

    for number, (barrier, outcome) in enumerate(outcomes()):
        if number % every == 0:
            if outcome == "survived":
                print(f"survived: {barrier}", flush=True)
            yield barrier, outcome


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s")
    raise SystemExit(code)
