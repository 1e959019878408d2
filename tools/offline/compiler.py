"""Triton without a GPU: a driver that compiles each launch for some target and hands it on instead of running it.

    with offline("sm_90") as launches:
        relational_memory(..., backend="triton")    # CPU tensors, through the code that a GPU user runs

The results are not computed unless a `run` does so. Shared memory is checked against the target's, as a launch does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver

from rmc_kernels.backends.triton.tiles import SHARED_MEMORY
from tools.offline.assembly import Usage, amd, nvidia

TARGETS = tuple(SHARED_MEMORY)


@dataclass(frozen=True)
class Launch:
    """One launch of a compiled kernel.

    Attributes:
        name: of the kernel.
        target: for which it was compiled.
        grid: programs.
        metadata: Triton's; `.shared` is bytes of shared memory, `.num_warps` warps of a program.
        constants: compile-time arguments by name.
        arguments: run-time arguments, in order.
    """

    name: str
    target: str
    grid: tuple[int, int, int]
    metadata: Any
    constants: dict[str, Any]
    arguments: tuple[Any, ...]

    def file(self, kind: str) -> Path:
        """What the compiler made: "ptx", "cubin", "amdgcn", "ttgir", ..."""
        return Path(str(get_cache_manager(self.metadata.hash).get_file(f"{self.metadata.name}.{kind}")))

    def usage(self) -> Usage:
        """Registers, spills and the like of the compiled code."""
        if self.target.startswith("gfx"):
            return amd(self.file("amdgcn").read_text(), self.metadata.shared)
        return nvidia(self.file("cubin").read_bytes(), self.metadata.shared)


Run = Callable[[Launch], None]


@contextmanager
def offline(target: str, run: Run = lambda launch: None) -> Iterator[list[Launch]]:
    """Make `target`, one of `TARGETS`, the active device of Triton, with CPU tensors; yields the launches made."""
    launches: list[Launch] = []
    active = driver._active
    driver.set_active(_Driver(target, launches, run))
    try:
        yield launches
    finally:
        driver._active = active


class _Utils:
    """What Triton asks of a loaded module and of the device."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self._target], "multiprocessor_count": 108, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads."""
        return 0, 0, 0, 0, 1024

    def unload_module(self, *module: object) -> None:
        """There is none."""


class _Driver:
    """Triton's driver protocol. Each target is a device of its own: Triton keeps what it compiled by device."""

    def __init__(self, target: str, launches: list[Launch], run: Run) -> None:
        self._target, self._launches, self._run = target, launches, run
        self.utils = _Utils(target)

    def get_current_target(self) -> Any:
        if self._target.startswith("gfx"):
            return GPUTarget("hip", self._target, 64)
        return GPUTarget("cuda", int(self._target.removeprefix("sm_")), 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return TARGETS.index(self._target)

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        names = source.fn.arg_names
        constant = [source.signature[name] == "constexpr" for name in names]

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            arguments = rest[-len(names) :]
            pairs = list(zip(names, arguments, constant, strict=True))
            constants = {name: value for name, value, fixed in pairs if fixed}
            given = tuple(value for _, value, fixed in pairs if not fixed)
            active: Any = driver.active
            launch = Launch(source.fn.__name__, active._target, (x, y, z), metadata, constants, given)
            active._launches.append(launch)
            active._run(launch)

        return launch
