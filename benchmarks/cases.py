"""What is measured: `Case`, one size and mode as data, and the suites, which are lists of cases."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from rmc_kernels.spec import CellSpec

Mode = Literal["forward", "forward+backward"]
MODES: tuple[Mode, ...] = ("forward", "forward+backward")
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
    """

    batch_size: int
    steps: int
    mem_slots: int
    mem_size: int
    num_heads: int = 4
    input_size: int = 64
    dtype: str = "float32"
    threads: int = 1
    mode: Mode = "forward"

    @property
    def spec(self) -> CellSpec:
        """The cell."""
        return CellSpec.sonnet(self.input_size, self.mem_slots, self.mem_size // self.num_heads, self.num_heads)

    @property
    def size(self) -> str:
        """The sizes in one short text, alike for every mode and number of threads."""
        size = f"B={self.batch_size} T={self.steps} N={self.mem_slots} D={self.mem_size} H={self.num_heads}"
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
class Suite:
    """A list of cases with how they are run.

    Attributes:
        cases: what is timed.
        against: the rivals, of `contestants.RIVALS`; the eager yardstick always takes part.
        seconds: that the rounds of one case may take.
        both_modes: whether fused backends also run with saved activations (`recompute="none"`).
    """

    cases: tuple[Case, ...]
    against: tuple[str, ...]
    seconds: float
    both_modes: bool = False


#: (B, T, slots, D) of the project's speed table; one element is timed on one thread only.
LARGE = ((16, 16, 8, 256), (64, 16, 8, 256), (64, 16, 4, 128))
SINGLE = ((1, 32, 8, 256), (1, 32, 4, 128))
SPEED_TABLE = tuple(
    Case(batch, steps, slots, width, threads=threads, mode=mode)
    for threads, mode in product((1, 2), MODES)
    for batch, steps, slots, width in (*LARGE, *(SINGLE if threads == 1 else ()))
)

#: One size at a time is varied around B=16, T=16, 8 slots, D=256.
SCALING = tuple(
    dict.fromkeys(
        [Case(batch, 16, 8, 256) for batch in (1, 2, 4, 8, 16, 32, 64, 128)]
        + [Case(16, steps, 8, 256) for steps in (4, 16, 64, 256)]
        + [Case(16, 16, slots, 256) for slots in (1, 2, 4, 8, 16)]
        + [Case(16, 16, 8, width) for width in (64, 128, 256, 512)]
    )
)

#: The smallest and the middle size of the table, on one thread.
DEMO = tuple(
    case
    for case in SPEED_TABLE
    if case.threads == 1 and (case.batch_size == 16 or (case.mem_size == 128 and case.batch_size == 1))
)

SUITES = {
    "demo": Suite(DEMO, ("lstm",), 6),
    "quick": Suite(SPEED_TABLE, ("lstm",), 7),
    "full": Suite(SPEED_TABLE, ("compile", "lstm", "gru"), 25, both_modes=True),
    "scaling": Suite(SCALING, ("lstm",), 6),
}
