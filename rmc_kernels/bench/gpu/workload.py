"""How much each stage does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rmc_kernels import backends, verify
from rmc_kernels.bench.cases import MODES, Case, Group
from rmc_kernels.spec import CellSpec
from rmc_kernels.verify.cases import DTYPES

#: Who stands beside the cell; `graph` is the eager loop in CUDA graphs, `lstm` cuDNN's.
RIVALS = ("eager", "graph", "compile", "lstm")
#: (B, T, slots, D), the most telling first: the speed table's, one element, a large batch, small, one wide slot. There
#: is time for so many, at half a minute each once compiled; those of float32 are the first of them.
SIZES = ((16, 64, 8, 256), (1, 64, 4, 128), (1024, 64, 8, 128), (256, 64, 4, 64), (64, 64, 1, 512))
IN_FLOAT32 = 3
#: Seconds of rounds of one benchmark case.
ROUNDS = 4.0
REPEATS = 100


@dataclass(frozen=True)
class Workload:
    """What the stages do.

    Attributes:
        verified: cases of the backend that is looked at.
        reference: cases of the reference, which serves what that one refuses.
        subjects: cases that are looked at while running.
        repeats: how often each of them is run.
        timed: groups of one benchmark case each, of both modes.
    """

    verified: Sequence[verify.Case]
    reference: Sequence[verify.Case]
    subjects: Sequence[verify.Case]
    repeats: int
    timed: Sequence[Group]


def full() -> Workload:
    """What `make gpu` does."""
    sonnet = CellSpec.sonnet(16, 4, 16, 2)
    small = (
        sonnet,
        replace(sonnet, gate_style="memory", num_blocks=2, attention_mlp_layers=3),
        CellSpec.sonnet(16, 3, 16, 2, input_rows=3),
        CellSpec.textbook(16, 4, 16, 2),
        CellSpec.r2gen(3, 32, 4),
    )
    # Of many programs, with tiles of 64 rows where the batch is large.
    large = (
        verify.Case(CellSpec.sonnet(64, 8, 64, 4), "bfloat16", 1088, 8, lengths=True, resets=True),
        verify.Case(CellSpec.sonnet(64, 8, 32, 4), "float32", 528, 8, lengths=True, resets=True),
        verify.Case(CellSpec.sonnet(64, 8, 32, 4), "float16", 17, 64, lengths=True, resets=True, recompute="none"),
    )
    subjects = [_subject(spec, dtype) for dtype in DTYPES for spec in small]
    return Workload(
        verified=[replace(case, dtype=dtype) for case in verify.covering() for dtype in DTYPES],
        reference=[replace(case, dtype=dtype) for case in verify.quick_cover() for dtype in DTYPES],
        subjects=[*large, *subjects],
        repeats=REPEATS,
        timed=[
            Group((Case(*size, dtype=dtype, mode=mode),), RIVALS, ROUNDS, memory=True)
            for dtype, sizes in (("bfloat16", SIZES), ("float32", SIZES[:IN_FLOAT32]))
            for size in sizes
            for mode in MODES
        ],
    )


def tiny(against: Sequence[str]) -> Workload:
    """As little as goes through every line, all with one cell: for a simulator, where compiling takes longest.

    Args:
        against: of `contestants.RIVALS`, those that can run there.
    """
    size = Case(2, 2, 2, 8, 2, 4)
    case = verify.Case(size.spec, size.dtype, 4, 2)
    return Workload(
        verified=[case],
        reference=[],
        subjects=[case],
        repeats=2,
        timed=[
            Group((replace(size, mode=mode),), tuple(against), 1e-3, fewest_rounds=1, memory=True) for mode in MODES
        ],
    )


def _subject(spec: CellSpec, dtype: str) -> verify.Case:
    return verify.Case(spec, dtype, 17, 5, lengths=True, resets=True, dropout_mask=spec.dropout > 0)


def backends_of(workload: Workload, backend: str) -> list[tuple[verify.Case, str]]:
    """Every case that is verified, with its backend; those with most to compile first."""
    cases = [(case, backend) for case in sorted(workload.verified, key=lambda case: -case.spec.num_blocks)]
    return [*cases, *((case, backends.REFERENCE.name) for case in workload.reference)]
