"""No number on red parity: what a contestant computes, held to float64 by the criterion of `rmc verify`.

The very callable that is then timed is checked, at the same sizes but for long sequences, of which a part is enough:
its output and, with backward, every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from rmc_kernels.bench.cases import Case, Mode
from rmc_kernels.bench.contestants import Prepared, bind_reference, timed
from rmc_kernels.bench.problem import Problem, draw
from rmc_kernels.verify import Comparison, Errors

#: Fewest sequences that errors are pooled over: those within one sequence depend on one another. With 4 sequences of 64
#: steps a gradient was seen at 2.01 times the eager error, with 16 at 0.9 times: one error over one error is a lottery.
FEWEST_SEQUENCES = 16
#: Steps of a longer sequence that are checked: float64 on all of them would take longer than all rounds.
MOST_STEPS = 32


@dataclass(frozen=True)
class Verdict:
    """Whether a contestant is right.

    Attributes:
        ok: whether every tensor is within the criterion.
        severity: share of the limit that the worst tensor uses; 1 is the limit.
        worst: that tensor and its errors.
    """

    ok: bool
    severity: float
    worst: str


def check(bind: Callable[[Problem], Prepared], case: Case, device: str = "cpu") -> Verdict:
    """Hold every tensor that a contestant computes for `case` to the criterion.

    Args:
        bind: the contestant, as in `Contestant.bind`.
        case: the sizes and the mode.
        device: where to run.
    """
    case = replace(case, steps=min(case.steps, MOST_STEPS))
    found: list[dict[str, Errors]] = []
    eager: list[dict[str, Errors]] = []
    for seed in range(math.ceil(FEWEST_SEQUENCES / case.batch_size)):
        exact, by_eager = _yardstick(replace(case, threads=1), seed, device)
        found.append(_errors(_results(bind, draw(case, seed, device), case.mode), exact))
        eager.append(by_eager)
    comparisons = {name: Comparison(_pool(found, name), _pool(eager, name)) for name in eager[0]}
    worst = max(comparisons, key=lambda name: comparisons[name].severity)
    ok = all(comparison.ok for comparison in comparisons.values())
    return Verdict(ok, comparisons[worst].severity, f"{worst}: {comparisons[worst]}")


@lru_cache(maxsize=FEWEST_SEQUENCES)  # every contestant of a case is held to the same draws
def _yardstick(case: Case, seed: int, device: str) -> tuple[dict[str, Tensor], dict[str, Errors]]:
    """The float64 results of a draw, and the errors of the definition in the case's dtype."""
    problem = draw(case, seed, device)
    exact = _results(bind_reference, problem.double(), case.mode)
    return exact, _errors(_results(bind_reference, problem, case.mode), exact)


def _results(bind: Callable[[Problem], Prepared], problem: Problem, mode: Mode) -> dict[str, Tensor]:
    prepared = bind(problem)
    names = ("memories", *(f"gradient of {name}" for name in prepared.leaves))
    tensors = (tensor.detach() for tensor in timed(prepared, mode)())
    return dict(zip(names, tensors, strict=False))  # forward alone gives the memories alone


def _errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Errors]:
    return {name: Errors.of(results[name], exact[name]) for name in exact}


def _pool(parts: list[dict[str, Errors]], name: str) -> Errors:
    return Errors.pool(part[name] for part in parts)
