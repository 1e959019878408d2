"""What is measured, as data: `Case`, one size and mode; `Group`, cases that are run alike; `SUITES`, the one list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from rmc_kernels.spec import CellSpec

Mode = Literal["forward", "forward+backward"]
MODES: tuple[Mode, ...] = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16", "float16")
INPUT_SIZE = 64
#: Symbol of each size in the name of a case -> field of `Case`.
SYMBOLS = {
    "B": "batch_size",
    "T": "steps",
    "N": "mem_slots",
    "D": "mem_size",
    "H": "num_heads",
    "I": "input_size",
}
#: Parameters that are used once a sequence, not once a step: they are hoisted out of the recurrence.
HOISTED = ("input_projection.", "input_gate.")


@dataclass(frozen=True)
class Case:
    """One configuration to time: the sonnet cell with one block, two MLP layers and unit gates.

    Attributes:
        batch_size, steps: `B` and `T`.
        mem_slots, mem_size, num_heads: `N`, `D` and `H`.
        input_size: `I`.
        dtype: name of the torch dtype.
        threads: that the machine may use; 1 or 2 here.
        mode: "forward", or "forward+backward" with gradients of x and every parameter.

    Raises:
        ValueError: the heads do not divide `mem_size`.
    """

    batch_size: int
    steps: int
    mem_slots: int
    mem_size: int
    num_heads: int = 4
    input_size: int = INPUT_SIZE
    dtype: str = "float32"
    threads: int = 1
    mode: Mode = "forward"

    def __post_init__(self) -> None:
        if self.mem_size % self.num_heads:
            raise ValueError(f"mem_size takes a multiple of num_heads ({self.num_heads}), got {self.mem_size}")

    @classmethod
    def from_text(cls, text: str) -> Case:
        """The case that `name` describes; what is left out, but for B, T, N and D, is at its default.

        Raises:
            ValueError: naming the word that is none of a case's, or the size that is missing.
        """
        found: dict[str, Any] = {}
        for word in re.sub(r"(\d+) threads?", r"threads=\1", text).replace(",", " ").split():
            size = re.fullmatch(r"(\w+)=([1-9]\d*)", word)
            if size and size[1] in (*SYMBOLS, "threads"):
                found[SYMBOLS.get(size[1], size[1])] = int(size[2])
            elif word in MODES:
                found["mode"] = word
            elif word in DTYPES:
                found["dtype"] = word
            else:
                raise ValueError(f"case takes words such as B=16, bfloat16, {MODES[1]} or 2 threads; got {word!r}")
        missing = [symbol for symbol in "BTND" if SYMBOLS[symbol] not in found]
        if missing:
            raise ValueError(f"case takes B, T, N and D; {', '.join(missing)} missing in {text!r}")
        return cls(**found)

    @property
    def spec(self) -> CellSpec:
        """The cell."""
        return CellSpec.sonnet(self.input_size, self.mem_slots, self.mem_size // self.num_heads, self.num_heads)

    @property
    def size(self) -> str:
        """The sizes in one short text, alike for every mode and number of threads."""
        size = f"B={self.batch_size} T={self.steps} N={self.mem_slots} D={self.mem_size} H={self.num_heads}"
        size += f" I={self.input_size}" if self.input_size != INPUT_SIZE else ""
        return size if self.dtype == "float32" else f"{size} {self.dtype}"

    @property
    def name(self) -> str:
        """The case in one line of text."""
        return f"{self.size}, {self.mode}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the forward pass of one call."""
        return self.steps * self.spec.flops_per_step(self.batch_size)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that every step has to read, in float32."""
        spec = self.spec
        sizes = {name: shape for name, shape in spec.parameter_shapes.items() if not name.startswith(HOISTED)}
        return 4 * sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in sizes.values())


@dataclass(frozen=True)
class Group:
    """Cases that are run alike.

    Attributes:
        cases: what is timed.
        against: who takes part besides this package's backends, of `contestants.RIVALS`.
        seconds: that the rounds of one case may take.
        fewest_rounds: that are run even where they take longer.
        saved: whether fused backends also train with saved activations (`recompute="none"`).
        at_width: whether other models also run at the cell's width, besides with as many parameters.
        memory: whether the peak memory of a call is measured.
    """

    cases: tuple[Case, ...]
    against: tuple[str, ...]
    seconds: float
    fewest_rounds: int = 3
    saved: bool = False
    at_width: bool = False
    memory: bool = False


@dataclass(frozen=True)
class Suite:
    """Groups of cases that are run one after the other.

    Attributes:
        groups: of cases.
        limit: seconds after which the suite should be done; on a slow machine the rounds of each case shrink for it.
        passes: times that all cases are gone through, each time for that part of their seconds.
    """

    groups: tuple[Group, ...]
    limit: float
    passes: int = 1

    @property
    def cases(self) -> tuple[Case, ...]:
        """The cases of every group."""
        return tuple(case for group in self.groups for case in group.cases)


def around(base: Case, **values: Sequence[object]) -> tuple[Case, ...]:
    """Cases that differ from `base` in one field at a time: `around(base, steps=(4, 16), num_heads=(1, 2))`."""
    varied = [replace(base, **{name: value}) for name, several in values.items() for value in several]  # type: ignore[arg-type]
    return tuple(dict.fromkeys(varied))


#: (B, T, slots, D) of the project's speed table; one element is timed on one thread only.
LARGE = ((16, 16, 8, 256), (64, 16, 8, 256), (64, 16, 4, 128))
SINGLE = ((1, 32, 8, 256), (1, 32, 4, 128))
SPEED_TABLE = tuple(
    Case(batch, steps, slots, width, threads=threads, mode=mode)
    for threads, mode in product((1, 2), MODES)
    for batch, steps, slots, width in (*LARGE, *(SINGLE if threads == 1 else ()))
)

#: What sizes are varied around. Small, so that long sequences and many slots cost seconds and show their growth.
BASE = Case(4, 16, 4, 64)
TRAINING = replace(BASE, mode="forward+backward")
LENGTHS = (32, 128, 512, 2048)
SIZES = {"batch_size": (1, 4, 16, 64), "mem_slots": (1, 4, 16, 64, 256), "mem_size": (32, 64, 128, 256)}
MORE_SIZES = {
    "batch_size": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "mem_slots": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    "mem_size": (32, 64, 128, 256, 512),
    "num_heads": (1, 2, 4, 8, 16),
}

#: The smallest and the middle size of the table, on one thread.
DEMO = tuple(
    case
    for case in SPEED_TABLE
    if case.threads == 1 and (case.batch_size == 16 or (case.mem_size == 128 and case.batch_size == 1))
)

MODELS = ("lstm", "gru", "transformer")
SUITES = {
    "demo": Suite((Group(DEMO, ("eager", "lstm"), 6),), 60),
    "quick": Suite(
        (
            Group(SPEED_TABLE, ("eager", "lstm"), 5, memory=True),
            Group(around(TRAINING, steps=LENGTHS), MODELS, 1.5, saved=True, at_width=True, memory=True),
            Group(around(BASE, **SIZES), ("eager", *MODELS), 1, memory=True),
        ),
        200,
    ),
    # Neighbours on a shared host slow caches down for up to a minute: 8 s in one go gave 42 % of the peak, then 78 %.
    "targets": Suite(
        tuple(
            Group(tuple(case for case in SPEED_TABLE if case.threads == threads), (), seconds, fewest_rounds=2)
            for threads, seconds in ((1, 16), (2, 40))
        ),
        limit=500,
        passes=8,
    ),
    "full": Suite(
        (
            Group(SPEED_TABLE, ("eager", "compile", "lstm", "gru"), 20, saved=True, memory=True),
            *(
                Group(around(base, steps=(*LENGTHS, 8192)), MODELS, 8, saved=True, at_width=True, memory=True)
                for base in (BASE, TRAINING)
            ),
            *(Group(around(base, **MORE_SIZES), ("eager", *MODELS), 4, memory=True) for base in (BASE, TRAINING)),
            Group(around(Case(16, 16, 8, 256), dtype=DTYPES[1:]), ("lstm",), 8),
        ),
        2400,
    ),
}
