"""Many cases on many backends: `run`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from rmc_kernels import errors
from rmc_kernels.backends import BACKENDS, REFERENCE
from rmc_kernels.spec import VARIANTS
from rmc_kernels.verify.cases import DTYPES, Case
from rmc_kernels.verify.check import CaseResult, check_case, refusal
from rmc_kernels.verify.cover import covering, quick_cover, random_case
from rmc_kernels.verify.report import Report

#: Called after each case with its result and the share of the work that is done, from 0 to 1.
Progress = Callable[[CaseResult, float], None]


class Job(NamedTuple):
    """One case on one backend."""

    case: Case
    backend: str
    device: str
    seed: int


def known_backends() -> tuple[str, ...]:
    """Every backend there may be, those that this machine lacks included."""
    return tuple(BACKENDS)


def known_devices() -> tuple[str, ...]:
    """The devices of this machine that a backend may run on."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def run(
    *,
    backends: Sequence[str] = (),
    variants: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    devices: Sequence[str] = (),
    quick: bool = False,
    cases: Sequence[Case] | None = None,
    time_budget: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Verify backends against float64: outputs and every gradient, each within the criterion.

    A fused backend runs the covering set of cases in each dtype. The reference, which is the definition and has only
    the machinery around it to prove, runs the quick set. With a time budget every backend runs the quick set, in random
    order, and then random cases for as long as there is time.

    Args:
        backends: names; empty takes all. One that this machine lacks is reported as not served.
        variants: names; empty takes all.
        dtypes: of "float32", "bfloat16", "float16"; empty takes all.
        devices: "cpu" or "cuda"; empty takes all there are.
        quick: the quick set for every backend.
        cases: these instead of the built-in ones; `variants` and `dtypes` do not apply to them.
        time_budget: seconds, counted from the start, after which no case is begun; the built-in cases may take half of
            it. 0 for those alone.
        seed: of the draws and of the random cases.
        progress: see `Progress`.

    Returns:
        The report; `.ok` is the verdict.

    Raises:
        ValueError: an argument names something unknown; the message says what it takes.
    """
    names = _chosen("backends", backends, known_backends())
    places = _chosen("devices", devices, known_devices())
    variants_chosen = _chosen("variants", variants, VARIANTS)
    types = _chosen("dtypes", dtypes, DTYPES)
    if cases is None:
        plan = _built_in(names, variants_chosen, types, quick or time_budget > 0)
    else:
        plan = [(case, name) for case in cases for name in names]
    jobs = [Job(case, name, place, seed) for place in places for case, name in plan]

    start = time.monotonic()
    results: list[CaseResult] = []

    def verify(job: Job, share: float) -> None:
        results.append(check_case(job.case, job.backend, seed=job.seed, device=job.device))
        if progress is not None:
            progress(results[-1], min(share, 1.0))

    def elapsed() -> float:
        return time.monotonic() - start

    rng = random.Random(seed)
    if time_budget and cases is None:
        # The time may be over before all are done: no dtype comes first. Backends share the draws of a case.
        order = {case: rng.random() for case, _ in plan}
        jobs.sort(key=lambda job: order[job.case])
    left_out = 0
    for number, job in enumerate(jobs, start=1):
        if time_budget and cases is None and elapsed() >= time_budget / 2:
            left_out = len(jobs) - number + 1
            break
        verify(job, number / len(jobs) if not time_budget else elapsed() / time_budget)
    endless = _random_jobs(rng, names, variants_chosen, types, places)
    while elapsed() < time_budget and (extra := next(endless, None)) is not None:
        verify(extra, elapsed() / time_budget)
    return Report(results, elapsed(), left_out=left_out)


def _built_in(
    names: Sequence[str], variants: Sequence[str], dtypes: Sequence[str], quick: bool
) -> list[tuple[Case, str]]:
    few = quick_cover()
    return [
        (replace(case, dtype=dtype), name)
        for dtype in dtypes
        for full in (False, True)
        for case in (covering() if full else few)
        for name in names
        if case.spec.variant in variants and full == (not quick and name != REFERENCE.name)
    ]


def _random_jobs(
    rng: random.Random, names: Sequence[str], variants: Sequence[str], dtypes: Sequence[str], devices: Sequence[str]
) -> Iterator[Job]:
    """Random cases without end, each on a backend that serves it; the reference only where it stands alone."""
    names = [name for name in names if name != REFERENCE.name] or names
    places = [(name, place, dtype) for name in names for place in devices for dtype in dtypes]
    probe = {variant: random_case(random.Random(0), "float32", variant) for variant in variants}
    serving = [
        (variant, name, place, dtype)
        for variant, case in probe.items()
        for name, place, dtype in places
        if refusal(replace(case, dtype=dtype), name, place) is None
    ]
    while serving:
        variant, name, place, dtype = rng.choice(serving)
        yield Job(random_case(rng, dtype, variant), name, place, rng.randrange(2**31))


def _chosen(name: str, given: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    for value in given:
        errors.one_of(name, value, known)
    return given or known
