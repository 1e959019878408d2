"""The C++ extension: torch-free, absent where the package was installed without a compiler."""

def cpu_features() -> dict[str, bool]:
    """Returns the instruction set extensions that this process may execute.

    An extension counts when the CPU has it and the operating system saves its registers; for AMX, Linux is asked for
    permission on the first call.
    """

def isas() -> list[str]:
    """Returns the kernels' instruction sets usable here, the plainest first: of "generic", "avx2", "avx512", "amx"."""

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
