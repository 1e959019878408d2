"""What a mutant of the Triton kernels has to survive, in the strict interpreter; see `judges.py`."""

from __future__ import annotations

from itertools import cycle, product
from unittest.mock import patch

import torch

from rmc_kernels import CellSpec
from rmc_kernels.backends import BACKENDS
from tests.cases import SPECS, DrawnCall, draw
from tools.mutation.judges import TOLERANCE, TOLERANCE_HALF, WIDE, Killed, compare, expected, outcome, with_padding

#: For the Triton kernels, whose loops and masks depend on what the widths are multiples of; variants with an output
#: projection, and input rows in the tile, that are wide.
_WIDTHS = {
    "whole blocks": CellSpec.sonnet(4, 3, 16, 2),
    "one more": CellSpec.sonnet(3, 2, 17, 1),
    "whole blocks of parts of heads": CellSpec.sonnet(3, 2, 12, 4),
    "wide textbook": CellSpec.textbook(5, 4, 20, 2),
    "wide matrix": CellSpec.sonnet(3, 2, 20, 2, num_blocks=3, input_rows=2),
}
#: Small cells that reach every line of the device functions; those that reach most come first.
_SMALL = (
    "sonnet", "matrix-blocks", "r2gen", "textbook", "memory-gate", "no-gate", "matrix", "blocks", "one-mlp-layer",
    "key-size",
)  # fmt: skip
#: Whose backward pass goes in chunks of one step.
_STEP_BY_STEP = ("matrix-blocks", "memory-gate", "wide matrix")
#: Which options they have, by turns: a kernel is another one without each of them.
_TURNS = (("lengths", "resets"), ("resets",), ("lengths",))


def triton() -> None:
    """The forward pass of the Triton kernels in the strict interpreter: right, and no hazard.

    Raises:
        Killed: it differs, or nothing orders two accesses.
    """
    for name, case in triton_cases().items():
        _interpreted(name, case, False)
    from tests.triton import test_triton_interpreted as tests

    for name, value in product(("sonnet", "matrix-blocks"), (torch.nan, torch.inf)):
        tests.test_what_is_not_finite_stays_in_its_batch_element(name, value)
    for name in ("sonnet", "matrix-blocks"):
        tests.test_what_rounds_to_infinity_stays_in_its_batch_element(name)
        tests.test_a_norm_that_is_not_finite_is_seen(name.replace("-blocks", ""), "bias")
    for name in ("sonnet", "textbook", "r2gen"):
        tests.test_a_value_that_overflows_stays_in_its_batch_element(name, torch.float32, 1e25, 1e15)
        tests.test_a_value_that_overflows_stays_in_its_batch_element(name, torch.float16, 1e4, 1e2)
    tests.test_tanh_and_sigmoid(1e-30, 0.3499, 0.75)
    tests.test_tanh_and_sigmoid(0.5, 100.0, 2.5)
    tests.test_tanh_and_sigmoid_at_the_edges()
    for name in ("sonnet", "r2gen"):  # what these functions keep for the backward pass
        _interpreted(name, triton_cases()[name], True, True)


def triton_backward() -> None:
    """Their gradients too, from activations that are computed again and from those that were kept.

    Raises:
        Killed: one differs, or nothing orders two accesses.
    """
    for number, (name, case) in enumerate(triton_cases().items()):
        for kept in (False, True) if number < 3 else (number % 2 > 0,):
            _interpreted(name, case, True, kept)
    from tests.triton import test_triton_backward as tests

    for name in ("sonnet", "textbook"):
        tests.test_what_is_not_finite_stays_in_its_batch_element(name)


def _interpreted(name: str, case: DrawnCall, gradients: bool, kept: bool = False) -> None:
    from rmc_kernels.backends.triton import gradients as back
    from rmc_kernels.backends.triton import launch, tiles
    from tools.strict import strict

    several = case.x.shape[0] > 2
    processors = 10**6 if several else 1  # many: the tile of fewest rows, of which there are several then
    projection = tiles.Tile(16, 16, 16, 0, 4, 2) if several else tiles.PROJECTION
    with (
        strict() as report,
        patch.object(launch, "_processors", lambda: processors),
        patch.object(tiles, "PROJECTION", projection),
        patch.object(back, "WORKSPACE_BYTES", 1 if name in _STEP_BY_STEP else back.WORKSPACE_BYTES),
    ):
        if gradients:
            found = outcome("triton", case, kept)
        else:
            found = {"memories": BACKENDS["triton"].forward(case.spec, case.call(), False)[0]}
    if report.hazards:
        raise Killed(f"{next(iter(report.hazards)).kind}, {name}")
    exact = expected(case.to(torch.float64))
    tolerance = TOLERANCE if case.x.dtype is torch.float32 else TOLERANCE_HALF
    for key, value in found.items():
        compare(value, exact[key], tolerance, f"{key}, {name}")


def triton_cases() -> dict[str, DrawnCall]:
    """Small cells that reach every line of the device functions; those that reach most come first."""
    lengths = torch.tensor([3, 0, 2, 1, 3])
    # Those of the second and third element are past the end.
    resets = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]])
    found = {}
    for name, options in zip(_SMALL, cycle(_TURNS), strict=False):
        batch = 3 if name.startswith("matrix") else 5  # one more than fits the smallest tile
        case = draw(SPECS[name], options, batch=batch, steps=3, dtype=torch.float32)
        drawn = {"lengths": lengths[:batch], "resets": resets[:batch].bool()}
        case.options |= {option: drawn[option] for option in options}
        found[name] = with_padding(case)
    found |= {f"{name} bfloat16": found[name].to(torch.bfloat16) for name in ("sonnet", "matrix-blocks", "r2gen")}
    wide = _WIDTHS | WIDE
    return found | {name: draw(spec, batch=2, steps=2, dtype=torch.float32) for name, spec in wide.items()}
