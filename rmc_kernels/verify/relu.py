"""ReLU inputs within rounding of 0: the one place where an exact backend may differ by more than rounding.

Such an input may fall on the other side of 0, and then a part of a gradient is there or not. That this is what happened
is shown, not assumed: float64 is run again with named inputs on the other side, and the criterion has to hold then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rmc_kernels.spec import CellSpec
from rmc_kernels.verify.limits import LARGEST_FACTOR

#: Inputs that are tried in one draw, the nearest to 0 first, and how many of them may explain it together.
MAX_CANDIDATES = 32
MAX_FLIPS = 4


@dataclass(frozen=True)
class Flip:
    """One ReLU input that is taken to be on the other side of 0.

    Attributes:
        call: number of the ReLU within the unroll.
        element: (batch element, row, unit).
        value: the exact pre-activation, in float64.
        rounding: how far from 0 counts as rounding there: the limit on its error by the criterion.
    """

    call: int
    element: tuple[int, ...]
    value: float
    rounding: float

    def describe(self, spec: CellSpec) -> str:
        """Where it is: step, block, MLP layer, element; and how near to 0."""
        step, within = divmod(self.call, spec.num_blocks * layers(spec))
        block, layer = divmod(within, layers(spec))
        batch, row, unit = self.element
        return (
            f"ReLU input {self.value:+.1e} (rounding {self.rounding:.1e}) at step {step}, block {block}, MLP layer "
            f"{layer}, batch element {batch}, row {row}, unit {unit}"
        )


def layers(spec: CellSpec) -> int:
    """How many of a block's MLP layers are followed by a ReLU."""
    return spec.attention_mlp_layers - (0 if spec.mlp_ends_in_relu else 1)


def candidates(exact: list[Tensor], eager: list[Tensor]) -> list[Flip]:
    """The ReLU inputs within rounding of 0, nearest first, from those that the exact and the eager run recorded.

    Rounding is what the criterion grants: `LARGEST_FACTOR` times the largest error of the eager run in that input.
    """
    found = []
    for call, (value, other) in enumerate(zip(exact, eager, strict=True)):
        rounding = LARGEST_FACTOR * float((other.double() - value).abs().max())
        for place in (value.abs() <= rounding).nonzero().tolist():
            found.append(Flip(call, tuple(place), float(value[tuple(place)]), rounding))
    return sorted(found, key=lambda flip: abs(flip.value) / flip.rounding)[:MAX_CANDIDATES]


def search(
    possible: list[Flip], badness: Callable[[tuple[Flip, ...]], float], done: Callable[[tuple[Flip, ...]], bool]
) -> tuple[Flip, ...] | None:
    """The possible flips, at most `MAX_FLIPS`, that bring a draw nearest to right; None where none brings it nearer.

    Whether that is enough is for the criterion to say, over all draws: by itself an honest draw may be past the limit.

    Args:
        possible: from `candidates`.
        badness: how far the draw is from right under a set of flips.
        done: whether the draw is right under a set of flips.
    """
    taken: tuple[Flip, ...] = ()
    best = badness(taken)
    while not done(taken) and len(taken) < MAX_FLIPS:
        tries = [(*taken, flip) for flip in possible if flip not in taken]
        scores = [badness(flips) for flips in tries]
        if not tries or not min(scores) < best:
            break
        best = min(scores)
        taken = tries[scores.index(best)]
    return taken or None
