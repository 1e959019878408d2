"""The C++ extension: torch-free, absent where the package was installed without a compiler."""

from collections.abc import Callable
from typing import Any

def cpu_features() -> dict[str, bool]:
    """Returns the instruction set extensions that this process may execute.

    An extension counts when the CPU has it and the operating system saves its registers; for AMX, Linux is asked for
    permission on the first call.
    """

def isas() -> list[str]:
    """Returns the kernels' instruction sets usable here, the plainest first.

    They are of "generic", "avx2", "avx512", "avx512bf16" (which is avx512 in float32) and "amx".
    """

def peak_fma(seconds: float = 0.2, isa: str = "") -> float:
    """Measures the float32 multiply-add rate of one thread working from registers alone.

    Args:
        seconds: CPU time to spend; the best of ten windows counts.
        isa: One of `isas()`; by default the last.

    Returns:
        GFLOP/s.
    """

def peak_amx(seconds: float = 0.2) -> float:
    """Measures the bf16 tile product rate of one thread working from tile registers alone.

    Args:
        seconds: CPU time to spend; the best of ten windows counts.

    Returns:
        GFLOP/s, 0 where there is no AMX.
    """

def bandwidth(bytes: int, seconds: float = 0.2) -> float:
    """Measures how fast one thread reads a buffer over and over.

    Args:
        bytes: Size of the buffer, at least 4096. It decides which cache, or memory, is measured.
        seconds: CPU time to spend; the best of ten windows counts.

    Returns:
        GB/s.
    """

class PackedWeights:
    """Parameters in the layout of the kernels. Made by `Cell.pack`."""

class Cell:
    """One cell, planned for an instruction set. `rmc_kernels.backends.cpu` is its only caller.

    Tensors are passed as addresses (`data_ptr()`, 0 for none) of contiguous memory; shapes are not checked.
    """

    def __init__(self, spec: dict[str, object], precision: str, isa: str) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def activation_bytes(self) -> tuple[int, int]:
        """`(a, b)`: saved activations take `steps * (batch * a + b)` bytes."""
    def pack(self, params: list[int], backward: bool) -> PackedWeights: ...
    def forward(
        self,
        sizes: tuple[int, int, int],
        inputs: tuple[int, ...],
        params: tuple[int, ...],
        packed: PackedWeights | None,
        memories: int,
        activations: int,
        activation_bytes: int,
    ) -> None:
        """`sizes` is batch, steps, threads; `inputs` x, memory, lengths, resets, reset_memory, dropout_mask."""
    def backward(
        self,
        sizes: tuple[int, int, int],
        inputs: tuple[int, ...],
        params: tuple[int, ...],
        packed: PackedWeights | None,
        memories: int,
        activations: int,
        activation_bytes: int,
        grads: tuple[int, int, int, int],
        param_grads: tuple[int, ...],
    ) -> None:
        """`grads` is the given gradient of the memories, then where those of x, memory, reset_memory go."""

def frozen_step(config: dict[str, object]) -> Callable[[object, object, object], Any]:
    """The step of a cell whose weights are packed once. `rmc_kernels.backends.cpu` is its only caller.

    Returns:
        `step(x, memory, resets)`: output and memory; whatever it does not know it leaves to `config["ordinary"]`.
    """

def parallel_regions() -> int:
    """Returns how many parallel regions this process has entered."""

def profile_enable(on: bool, /) -> None:
    """Turns the clocks of `profile` on or off."""

def time_calls(on: bool, /) -> None:
    """Turns the clock of `call_nanoseconds` on or off."""

def call_nanoseconds() -> int:
    """Returns the wall time of all forward and backward calls since it was last asked, packing included."""

def profile() -> dict[str, int]:
    """Returns nanoseconds of CPU time per phase of the cell since the last call, over all threads."""

def vector_math(isa: str, function: int, x: int, y: int, count: int, /) -> None:
    """Writes exp (0), sigmoid (1) or tanh (2) of float32 numbers at address `x` to address `y`; for tests."""

def time_gemm(isa: str, rows: int, inputs: int, outputs: int, repeats: int, /) -> float:
    """Returns the least CPU seconds of one float32 product [rows, inputs] x [inputs, outputs] of the cell's GEMM."""
