"""Each `bar.sync` of compiled kernels left out, one at a time, under the simulator."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rmc_kernels import backends
from tests.cases import SPECS, draw
from tests.mutation.judges import TOLERANCE
from tests.offline import Launch, offline
from tests.ptxsim import Program, SimulationError, launch

#: Cells and dtypes whose kernels are taken, compiled for sm_80.
KERNELS = (("blocks", "float32"), ("sonnet", "bfloat16"), ("textbook", "float16"))


def outcomes() -> Iterator[tuple[str, str]]:
    """(barrier, outcome): a race or another error was reported, only the numbers are wrong, or neither."""
    for name, dtype in KERNELS:
        case = draw(SPECS[name], ("lengths", "resets"), batch=9, steps=2, dtype=getattr(torch, dtype))
        launches: list[Launch] = []
        with offline("sm_80", launches.append):
            memories = backends.BACKENDS["triton"].forward(case.spec, case.call(), False)[0]
        yield from _of_launches(f"{name} {dtype}", launches, memories)


def _of_launches(kernel: str, launches: list[Launch], memories: torch.Tensor) -> Iterator[tuple[str, str]]:
    for found in launches:
        program = Program(found.file("ptx").read_text())
        if found.name != "forward":
            _run(found, program, None)
            continue
        assert _run(found, program, None) == []
        right = memories.clone()
        for number, barrier in enumerate(program.barriers):
            memories.fill_(torch.nan)
            try:
                races = _run(found, program, number)
            except SimulationError as error:
                outcome = f"raised: {type(error).__name__}"
            else:
                wrong = not torch.allclose(memories, right, rtol=0, atol=TOLERANCE, equal_nan=False)
                outcome = f"race: {races[0]}" if races else "wrong: no race was reported" if wrong else "survived"
            yield f"{kernel}, bar.sync {number} ({barrier.location})", outcome


def _run(found: Launch, program: Program, without_barrier: int | None) -> list[str]:
    return launch(
        program, found.grid, found.arguments,
        warps=found.metadata.num_warps, shared=found.metadata.shared, without_barrier=without_barrier,
    ).races  # fmt: skip
