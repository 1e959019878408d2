"""What a backend is compared with, for one draw: the truth in float64, and the yardstick, the eager run's errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rmc_kernels.verify import relu
from rmc_kernels.verify.cases import Case
from rmc_kernels.verify.draws import Draw, by_eager, draw, evaluate
from rmc_kernels.verify.limits import Errors
from rmc_kernels.verify.probe import Probe

# How much is pooled before a ratio of errors is judged. Of two implementations of equal quality, the one exceeds twice
# the RMS error of the other with the probability that an F(n, n) variable exceeds 4, n being the number of independent
# errors: 30 % for n = 1, 3 % for 8, 1e-4 for 32, 2e-6 for 48. A default run compares some thousand tensors.
#: Elements of every tensor.
POOLED_ELEMENTS = 48
#: Steps of batch elements: the elements of one tensor share the errors of its step.
POOLED_STEPS = 48
#: Fewest draws of a case; more in half types, where single ReLU inputs that cross 0 make up much of the error.
FEWEST_DRAWS = {"float32": 16, "bfloat16": 24, "float16": 24}
#: Draws that have to count in a tensor before it is a miss. Elements and steps may share one error after all: a memory
#: that grows without a norm turns every error into one direction, and the resets of a short case are in few draws. One
#: such case of 16 draws was missed by the CPU kernels with 7 of 40 seeds, whose errors over 150 draws are eager's.
COUNTING_DRAWS = 48
#: At most this many times the usual draws.
MOST_DRAWS = 16
#: A draw is passed over where rounding does this many times more to a tensor than in the median draw: a flat row under
#: a LayerNorm, or a ReLU input next to 0, would outweigh the rest of the pool: one error against one error again.
OUTLIER = 3.0


class Noise(NamedTuple):
    """Runs of float64 with noise of the size of rounding on every operator's result, to see what rounding does.

    Attributes:
        runs: how many.
        backwards: whether the backward pass is rounded, too.
    """

    runs: int
    backwards: bool


#: One run alone would overlook a draw in thirty that is a hundred times worse than the median.
USUAL_NOISE = Noise(2, backwards=False)
#: Before a case is a miss. In 60 runs noise moved one draw of an l0sg cell by 0.5 to 2.7e-6, in the first two by 1.0e-6
#: at most: the eager error was among the small ones, the backend's among the large ones, while over 80 neighbours of
#: that draw both erred by the same.
THOROUGH_NOISE = Noise(16, backwards=True)
#: How the reason of a case begins that was not verified for want of something to hold it to.
NO_YARDSTICK = "no yardstick"


@dataclass(frozen=True)
class Baseline:
    """One draw and what does not depend on a backend.

    Attributes:
        drawn: the tensors.
        exact: the float64 results, by name.
        eager: the errors of the eager run, by name.
        weights: what errors are multiplied by, by name; empty for 1.
        noisy: the RMS error of each noisy run, least first, by name; empty before there are any.
    """

    drawn: Draw
    exact: Mapping[str, Tensor]
    eager: Mapping[str, Errors]
    weights: Mapping[str, float] = field(default_factory=dict)
    noisy: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether the truth and the eager run are finite."""
        return all(math.isfinite(errors.sum_squares) for errors in self.eager.values())

    @cached_property
    def rounding(self) -> dict[str, float]:
        """What rounding does to each tensor, by name: the RMS error of the worst noisy run."""
        return {name: errors[-1] for name, errors in self.noisy.items()}

    @cached_property
    def candidates(self) -> list[relu.Flip]:
        """ReLU inputs within rounding of 0."""
        run = by_eager(self.drawn.case.spec)
        with one_thread(), Probe() as exact:
            evaluate(self.drawn.wide(), run)
        with one_thread(), Probe() as eager:
            evaluate(self.drawn, run)
        return relu.candidates(exact.relu_inputs, eager.relu_inputs)

    def errors(self, results: Mapping[str, Tensor], flips: tuple[relu.Flip, ...] = ()) -> dict[str, Errors]:
        """The errors of a backend's results against float64, with some ReLU inputs on the other side of 0.

        Raises:
            KeyError, ValueError: a result is missing, or of another shape.
        """
        exact = _exact(self.drawn, flips) if flips else self.exact
        return self.weighted(errors_of(results, exact))

    def weighted(self, errors: Mapping[str, Errors]) -> dict[str, Errors]:
        """The errors in the measure in which those of several draws are pooled."""
        return {name: found.times(self.weights.get(name, 1.0)) for name, found in errors.items()}


def baselines(
    case: Case, seed: int, device: str, *, pooled: bool = True, draws: int | None = None, noise: Noise = USUAL_NOISE
) -> list[Baseline] | str:
    """The draws of a case that a backend is held to, or why there is no yardstick.

    Without pooling, two draws as they come: enough for what shares every rounding error with the eager run.

    Which draws are taken depends on float64 alone, so that neither the yardstick nor a backend gains by it.

    Args:
        case: what is drawn.
        seed: of the draws.
        device: where they are.
        pooled: whether errors are pooled over draws.
        draws: how many are pooled; None for `draws_needed`.
        noise: what shows what rounding does to a draw.
    """
    wanted = (draws or draws_needed(case)) if pooled else 2
    as_they_come = [_baseline(case, 1000 * seed + number, device) for number in range(wanted)]
    if not all(base.finite for base in as_they_come):
        return f"{NO_YARDSTICK}: eager PyTorch is not finite in {case.dtype}"
    if not pooled:
        return as_they_come

    def baseline(number: int) -> Baseline:
        place = case, 1000 * seed + number, device
        return replace(_baseline(*place), noisy=_noisy(*place, noise))

    first = [baseline(number) for number in range(wanted)]
    typical = {name: _median([base.rounding[name] for base in first]) for name in first[0].exact}
    found: list[Baseline] = []
    for number in range(4 * wanted):
        base = first[number] if number < wanted else baseline(number)
        if base.finite and all(base.rounding[name] <= OUTLIER * usual for name, usual in typical.items()):
            found.append(_weighted(base, typical))
        if len(found) == wanted:
            return found
    return f"{NO_YARDSTICK}: rounding does too different things to different draws"


def _weighted(base: Baseline, typical: Mapping[str, float]) -> Baseline:
    """A draw whose errors count as if rounding did no more to it than to the typical one.

    Without weights the worst-conditioned draw would be most of a pool, and its largest error all of it. Draws on which
    rounding does little are not raised: how little, a scalar's two noisy runs cannot tell.
    """
    weights = {name: min(1.0, typical[name] / size) for name, size in base.rounding.items() if size > 0}
    weighted = replace(base, weights=weights)
    return replace(weighted, eager=weighted.weighted(base.eager))


def draws_needed(case: Case) -> int:
    """How many draws pool enough elements and steps."""
    steps = case.batch_size * case.steps
    few = FEWEST_DRAWS[case.dtype]
    return max(few, math.ceil(POOLED_ELEMENTS / case.smallest_tensor), math.ceil(POOLED_STEPS / steps))


def draws_to_be_sure(bases: Sequence[Baseline], names: Iterable[str]) -> int:
    """How many draws it takes until `COUNTING_DRAWS` count in every named tensor, judged by these draws.

    What rounding does to the tensor in each draw says how much its error counts: draws with squared errors `e` count as
    `sum(e)**2 / sum(e**2)` equal ones, that is as one where one of them has all the error.
    """
    counting = float(len(bases))
    for name in names:
        sizes = [base.rounding[name] * base.weights.get(name, 1.0) for base in bases]
        if any(sizes):
            squares = [(size / max(sizes)) ** 2 for size in sizes]
            counting = min(counting, sum(squares) ** 2 / sum(square**2 for square in squares))
    wanted = math.ceil(COUNTING_DRAWS * len(bases) / counting)
    return min(max(wanted, len(bases)), MOST_DRAWS * len(bases))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run plain PyTorch on one thread.

    Cases are small, and beside other processes every operator that waits for a second thread can take milliseconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=512)  # every backend is held to the same draws
def _baseline(case: Case, seed: int, device: str) -> Baseline:
    drawn = draw(case, seed, device)
    run = by_eager(case.spec)
    with one_thread():
        exact = evaluate(drawn.wide(), run)
        eager = errors_of(evaluate(drawn, run), exact)
    return Baseline(drawn, exact, eager)


@lru_cache(maxsize=2048)
def _noisy(case: Case, seed: int, device: str, noise: Noise) -> dict[str, list[float]]:
    base, size, run = _baseline(case, seed, device), torch.finfo(case.torch_dtype).eps / 2, by_eager(case.spec)
    runs: list[dict[str, Errors]] = []
    for number in range(noise.runs):
        with one_thread(), Probe(noise=size, seed=number, backwards=noise.backwards):
            runs.append(errors_of(evaluate(base.drawn.wide(), run), base.exact))
    return {name: sorted(errors[name].rms for errors in runs) for name in base.exact}


def _exact(drawn: Draw, flips: tuple[relu.Flip, ...]) -> dict[str, Tensor]:
    with one_thread(), Probe((flip.call, flip.element) for flip in flips):
        return evaluate(drawn.wide(), by_eager(drawn.case.spec))


def errors_of(results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Errors]:
    """The errors of results against float64, by name; a missing or misshapen result raises."""
    return {name: Errors.of(results[name], exact[name]) for name in exact}


def _median(values: list[float]) -> float:
    """The median of those that are not 0; without any there is no limit."""
    positive = [value for value in values if value > 0]
    return statistics.median(positive) if positive else math.inf
