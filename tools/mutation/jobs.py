"""The mutants of each part as jobs: what to change, and how to find out what becomes of it.

A mutant is judged in a forked process on a copy of the package, so that none sees another.
"""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from operator import itemgetter
from pathlib import Path

from tools.mutation import python_mutants
from tools.mutation.mutant import SURVIVED, Mutant

ROOT = Path(__file__).parents[2]
_DEVICE = "rmc_kernels/backends/triton/device"
#: CPU seconds after which a mutant counts as killed, an endless loop, by part. And seconds in all: a deadlock.
_PATIENCE = {"reference": 60, "triton": 300, "triton_backward": 600, "cpp": 10}
_MOST = 3000
#: Files by the judge of their mutants.
PYTHON_FILES = {
    "reference": ["rmc_kernels/reference.py"],
    "triton": [f"{_DEVICE}/{name}.py" for name in ("phases", "attention", "forward", "operands", "project", "tile")],
    "triton_backward": [
        f"{_DEVICE}/{name}.py"
        for name in ("back_phases", "back_attention", "backward", "step", "recompute", "forward_kept")
    ],
}  # fmt: skip
#: Those that the generic build instantiates; the other instruction sets have no mutants.
CPP_FILES = [
    *(f"csrc/cell/{name}.h" for name in (
        "gates", "step", "step_back", "norm", "attention", "forward", "backward", "run", "input_rows", "gradients",
        "activations", "tile", "weights",
    )),
    "csrc/cell/plan.cpp",
    *(f"csrc/gemm/{name}.h" for name in ("gemm", "pack", "panels", "weight_gradient")),
    *(f"csrc/simd/{name}.h" for name in ("generic", "math")),
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A mutant to be judged.

    Attributes:
        file: of what it is a mutant; "" for the unchanged source, which has to survive.
        digest: of that, unchanged.
        key: its name in results.
        run: judges it; what became of it.
        function: in which it is, where there are any.
    """

    file: str
    digest: str
    key: str
    run: Callable[[], str]
    function: str = ""


def in_turns(todo: Sequence[Job], known: Sequence[Job]) -> list[Job]:
    """The same, of the functions of which fewest are known first: a run that is stopped has been in each of them."""
    ran = Counter((job.file, job.function) for job in known)
    turns = []
    for job in todo:
        turns.append(ran[job.file, job.function])
        ran[job.file, job.function] += 1
    return [job for _, job in sorted(zip(turns, todo, strict=True), key=itemgetter(0))]


def python(part: str, folder: Path) -> list[Job]:
    """The mutants of the Python files of a part, judged on a copy of the package in `folder`."""
    if part.startswith("triton"):
        os.environ["TRITON_INTERPRET"] = "1"
        importlib.import_module("triton")
        importlib.import_module("torch._inductor.config")  # by deterministic algorithms: 1.2 s of 1.7 of each fork
    importlib.import_module("torch").set_num_threads(1)
    for name in ("rmc_kernels", "tests", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def judge(file: str, source: str) -> str:
        before = (ROOT / file).read_text()
        (folder / file).write_text(source)
        outcome = _in_a_fork(part, lambda: _judge_python(part, folder))
        (folder / file).write_text(before)
        return outcome

    return _jobs(PYTHON_FILES[part], python_mutants.mutants, judge)


def _judge_python(part: str, folder: Path) -> str:
    """In a process of its own: import the copy, and judge it."""
    sys.dont_write_bytecode = True
    os.chdir(folder)
    for name in [name for name in sys.modules if name.split(".")[0] in ("rmc_kernels", "tests", "tools")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    judges = importlib.import_module("tools.mutation.judges")
    of_part = importlib.import_module("tools.mutation.triton_judges") if part.startswith("triton") else judges
    return str(judges.verdict(getattr(of_part, part)))


def cpp(folder: Path) -> list[Job]:
    """The mutants of the C++ kernels, built in `folder`."""
    sys.modules["rmc_kernels._C"] = None  # type: ignore[assignment]  # each process loads that of its mutant
    import torch

    from tools.mutation import cpp_judges, cpp_mutants
    from tools.mutation.cpp_build import Build, DoesNotCompile
    from tools.mutation.judges import verdict

    torch.set_num_threads(1)

    @cache
    def prepared(dtype: str) -> tuple[Build, list[cpp_judges.Vector]]:
        return Build(folder, dtype), cpp_judges.cpp_vectors(dtype)

    def judged(dtype: str, file: str, source: str) -> str:
        build, vectors = prepared(dtype)
        try:
            module = build.module(file, source)
        except DoesNotCompile as error:
            return f"does not compile: {error}"
        outcome = _in_a_fork("cpp", lambda: verdict(lambda: cpp_judges.cpp(build.backend(module), vectors)))
        if outcome == SURVIVED and source != (ROOT / file).read_text() and build.same_code(file, source):
            return "same code"
        return outcome

    def judge(file: str, source: str) -> str:
        # Other vectors, and other functions of them: those of float64 are the C library's.
        first, second = ("float32", "float64") if "/simd/" in file else ("float64", "float32")
        outcome = judged(first, file, source)
        if outcome not in (SURVIVED, "same code"):
            return outcome
        other = judged(second, file, source)
        return outcome if other == "same code" else other

    return _jobs(CPP_FILES, cpp_mutants.mutants, judge)


def _jobs(
    files: list[str], mutants: Callable[[str, str], Iterable[Mutant]], judge: Callable[[str, str], str]
) -> list[Job]:
    sources = {file: (ROOT / file).read_text() for file in files}
    return [
        Job("", "", "unchanged", partial(judge, *next(iter(sources.items())))),
        *(
            Job(file, digest(source), mutant.key, partial(judge, file, mutant.source), mutant.function)
            for file, source in sources.items()
            for mutant in mutants(file, source)
        ),
    ]


def digest(text: str) -> str:
    """Of a source."""
    return sha256(text.encode()).hexdigest()[:16]


def _in_a_fork(part: str, judge: Callable[[], str]) -> str:
    """What `judge` returns in a child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (_PATIENCE[part], _PATIENCE[part]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(_MOST)
        try:
            os.write(writing, judge().encode()[:4000])
        finally:
            os._exit(1)  # whatever happens, this is not the process to go on
    os.close(writing)
    with os.fdopen(reading) as pipe:
        outcome = pipe.read()
    _, status = os.waitpid(child, 0)
    if outcome:
        return outcome
    if not os.WIFSIGNALED(status):
        raise RuntimeError(f"{part}: the judge itself failed")
    number = os.WTERMSIG(status)
    slow = number in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM)
    return "timed out" if slow else f"crashed: signal {number}"
