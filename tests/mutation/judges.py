"""What a mutant has to survive: a small part of what the tests check, so that whatever dies here dies there."""

from __future__ import annotations

from dataclasses import replace

import torch

from rmc_kernels import CellSpec, backends
from rmc_kernels.backends.reference import unroll
from tests import golden
from tests.cases import SPECS, Case, draw

#: Largest error in units of the largest value; honest float32 is within a hundredth of it.
TOLERANCE = 1e-5
#: Cells whose sizes need several blocks of every loop, and many layers.
_WIDE = {
    "wide-heads": CellSpec.sonnet(9, 2, 70, 1),
    "wide-keys": CellSpec.sonnet(3, 3, 12, 2, key_size=75),
    "five-layers": replace(SPECS["sonnet"], attention_mlp_layers=5),
}


class Killed(Exception):
    """The mutant was found out; the message says by what."""


def reference() -> None:
    """The reference: vectors of the original implementations, the C++ kernels, chunks in half types.

    Raises:
        Killed: it differs.
    """
    for path in golden.files():
        vector = golden.load(path)
        if vector.outputs is not None:
            output, _ = vector.layer(vector.inputs, vector.memory)
            _compare(
                output, vector.outputs, golden.tolerances(vector)[0] / TOLERANCE, f"the original's vectors, {path.stem}"
            )
    for name, spec in SPECS.items():
        for options in ((), ("lengths", "resets")):
            case = _with_padding(draw(spec, options, dtype=torch.float32))
            exact, weights = unroll(spec, case.to(torch.float64).call())
            found = backends.BACKENDS["cpu"].forward(spec, case.call(), False)[0]
            _compare(found, exact, 1.0, f"the C++ kernels, {name}")
            _compare(weights.sum(-1), _running(case)[:, :, None, None, None].expand_as(weights[..., 0]), 1.0, "weights")
        half = draw(spec, ("lengths", "resets"), dtype=torch.bfloat16)
        memories = unroll(spec, half.call())[0]
        if memories.dtype != torch.float32:
            raise Killed(f"memories of half types in {memories.dtype}, {name}")
        empty, weights = unroll(spec, draw(spec, batch=2, steps=0).call())
        if (*empty.shape, *weights.shape) != (2, 0, *memories.shape[2:], 2, 0, *_weights_shape(spec)):
            raise Killed(f"no steps, {name}")
        exact = unroll(spec, half.to(torch.float64).call())[0]
        _compare(memories, exact, 0.1 / TOLERANCE, f"bfloat16, {name}")


def triton() -> None:
    """The Triton kernels in the strict interpreter: right, and no hazard.

    Raises:
        Killed: it differs, or nothing orders two accesses.
    """
    from tests.strict import strict

    for name, case in triton_cases().items():
        with strict() as report:
            memories = backends.BACKENDS["triton"].forward(case.spec, case.call(), False)[0]
        if report.hazards:
            raise Killed(f"{next(iter(report.hazards)).kind}, {name}")
        exact = unroll(case.spec, case.to(torch.float64).call())[0]
        _compare(memories, exact, 1.0, name)


def triton_cases() -> dict[str, Case]:
    """Small cells that reach every line of the device functions; those that reach most come first."""
    options = ("lengths", "resets")
    found = {}
    for name in (
        "sonnet",
        "blocks",
        "r2gen",
        "textbook",
        "memory-gate",
        "no-gate",
        "matrix",
        "one-mlp-layer",
        "key-size",
    ):
        case = draw(SPECS[name], options, batch=5, steps=3, dtype=torch.float32)
        case.options["lengths"] = torch.tensor([3, 2, 0, 3, 1])
        found[name] = _with_padding(case)
    return found | {name: draw(spec, batch=2, steps=2, dtype=torch.float32) for name, spec in _WIDE.items()}


def _running(case: Case) -> torch.Tensor:
    """[B, T], 1 where the step is within the element's length."""
    steps = torch.arange(case.x.shape[1])
    lengths = case.options.get("lengths", torch.full(case.x.shape[:1], len(steps)))
    return (steps < lengths[:, None]).double()


def _with_padding(case: Case) -> Case:
    """The same with NaN past the lengths."""
    case.x[_running(case) == 0] = torch.nan
    return case


def _weights_shape(spec: CellSpec) -> tuple[int, ...]:
    return spec.num_blocks, spec.num_heads, spec.mem_slots, spec.total_rows


def _compare(found: torch.Tensor, exact: torch.Tensor, times: float, what: str) -> None:
    if found.shape != exact.shape:
        raise Killed(f"a shape: {what}")
    error = float((found.double() - exact.double()).abs().max() / exact.abs().max().clamp(min=1.0))
    if not error <= times * TOLERANCE:
        raise Killed(f"an error of {error:.1e}: {what}")
