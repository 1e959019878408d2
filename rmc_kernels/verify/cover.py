"""Which cases are verified: a covering set of the options (every pair of values meets), edges, and random draws."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from rmc_kernels.spec import GATE_STYLES, VARIANTS, CellSpec
from rmc_kernels.verify.cases import GRADIENTS, RECOMPUTE, Case

#: Every option and the values it takes in the covering set. `cell` is (slots, head size, heads, input size).
AXES: Mapping[str, tuple[Any, ...]] = {
    "variant": VARIANTS,
    "gate_style": GATE_STYLES,
    "num_blocks": (1, 2),
    "mlp_layers": (1, 2, 3),
    "key_size": (None, 2, 9),
    "input_rows": (None, 3),
    "cell": ((4, 8, 2, 10), (1, 3, 3, 5), (5, 9, 1, 9), (2, 17, 1, 1), (8, 16, 2, 32)),
    "sequence": ((4, 3), (1, 3), (9, 1)),  # batch size, steps
    "lengths": (False, True),
    "resets": (False, True),
    "dropout_mask": (False, True),
    "strided": (False, True),
    "gradients": GRADIENTS,
    "recompute": RECOMPUTE,
    "biases": ((1.0, 0.0), (-0.5, 0.75)),  # forget, input
    "magnitude": (1.0, 0.1, 2.0),
}

#: Largest batch size and number of steps of a random case: usual, many elements (kernels for large batches), long.
SEQUENCES = ((9, 6), (9, 6), (9, 6), (32, 2), (2, 24))

Choice = Mapping[str, Any]
Pair = frozenset[tuple[str, Any]]

EDGES: tuple[Case, ...] = (
    Case(CellSpec.sonnet(5, 3, 4, 2, forget_bias=math.inf, input_bias=-math.inf)),  # the memory never changes
    Case(CellSpec.sonnet(5, 1, 1), batch_size=1, steps=1),  # one of everything
    Case(CellSpec.l0sg(1, 3, 4), batch_size=1, steps=1),
    Case(CellSpec.sonnet(6, 4, 8, 2), batch_size=2, steps=16, resets=True),  # long
    Case(CellSpec.sonnet(16, 4, 32, 4), batch_size=2, steps=2, recompute="none"),  # wide
    Case(CellSpec.sonnet(5, 40, 6, 3), batch_size=2, steps=2, resets=True),  # many slots
)


@lru_cache(maxsize=1)
def covering() -> tuple[Case, ...]:
    """Cases in which every pair of values of two options occurs that can occur together, then the edges; float32."""
    return (*_cover(_pairs()), *EDGES)


@lru_cache(maxsize=1)
def quick_cover() -> tuple[Case, ...]:
    """A few cases in which every value of every option occurs, then the edges; float32."""
    return (*_cover({frozenset({(axis, value)}) for axis, values in AXES.items() for value in values}), *EDGES)


def random_case(rng: random.Random, dtype: str, variant: str | None = None) -> Case:
    """A case with every option, size and magnitude drawn at random."""
    choice: dict[str, Any] = {} if variant is None else {"variant": variant}
    for axis in (axis for axis in AXES if axis not in choice):
        choice[axis] = rng.choice([value for value in AXES[axis] if _possible({**choice, axis: value})])
    choice["cell"] = tuple(rng.randint(1, top) for top in (9, 20, 4, 24))
    batch_size, steps = rng.choice(SEQUENCES)
    choice["sequence"] = (rng.randint(1, batch_size), rng.randint(1, steps))
    choice["magnitude"] = 10 ** rng.uniform(-2, 0.3)
    choice["biases"] = (rng.uniform(-2, 2), rng.uniform(-2, 2))
    if choice["key_size"] is not None:
        choice["key_size"] = rng.randint(1, 20)
    if choice["input_rows"] is not None:
        choice["input_rows"] = rng.randint(1, 6)
    return replace(_case(choice), dtype=dtype)


def _case(choice: Choice) -> Case:
    slots, head_size, heads, input_size = choice["cell"]
    variant = choice["variant"]
    spec = CellSpec(
        variant,
        heads * head_size if variant == "r2gen" else input_size,
        slots,
        head_size,
        heads,
        choice["num_blocks"],
        forget_bias=choice["biases"][0],
        input_bias=choice["biases"][1],
        gate_style=choice["gate_style"],
        attention_mlp_layers=choice["mlp_layers"],
        key_size=choice["key_size"],
        input_rows=choice["input_rows"],
    )
    batch_size, steps = choice["sequence"]
    own = ("lengths", "resets", "dropout_mask", "strided", "gradients", "recompute", "magnitude")
    return Case(spec, batch_size=batch_size, steps=steps, **{name: choice[name] for name in own})


def _possible(choice: Choice) -> bool:
    """Whether the values chosen so far can occur together."""
    variant = choice.get("variant")
    if variant in ("textbook", "r2gen") and (choice.get("num_blocks", 1) > 1 or choice.get("key_size") is not None):
        return False
    if variant == "textbook" and choice.get("gate_style") is not None:
        return False
    if variant not in (None, "sonnet") and choice.get("input_rows") is not None:
        return False
    input_rows_live = choice.get("num_blocks", 1) > 1 or variant == "l0sg"
    return not (input_rows_live and choice.get("dropout_mask", False))


def _pairs() -> set[Pair]:
    values = [[(axis, value) for value in AXES[axis]] for axis in AXES]
    pairs = (pair for one, two in itertools.combinations(values, 2) for pair in itertools.product(one, two))
    return {frozenset(pair) for pair in pairs if _possible(dict(pair))}


def _cover(wanted: set[Pair]) -> list[Case]:
    """Few cases that contain every wanted combination: greedily, the best of some random completions each time."""
    rng = random.Random(0)
    order = sorted(wanted, key=lambda pair: sorted(map(repr, pair)))
    cases = []
    while order:
        tries = [_complete(dict(order[0]), order, rng) for _ in range(8)]
        best = max(tries, key=lambda choice: sum(pair <= choice.items() for pair in order))
        order = [pair for pair in order if not pair <= best.items()]
        cases.append(_case(best))
    return cases


def _complete(choice: dict[str, Any], wanted: list[Pair], rng: random.Random) -> dict[str, Any]:
    """`choice` with every other option set, in random order, to the value that adds most wanted combinations."""
    for axis in rng.sample(list(AXES), len(AXES)):
        if axis not in choice:
            values = [value for value in AXES[axis] if _possible({**choice, axis: value})]
            gains = {value: _gain(choice, axis, value, wanted) + rng.random() for value in values}
            choice[axis] = max(gains, key=gains.__getitem__)
    return choice


def _gain(choice: Choice, axis: str, value: Any, wanted: list[Pair]) -> int:
    items = {*choice.items(), (axis, value)}
    return sum((axis, value) in pair and pair <= items for pair in wanted)
