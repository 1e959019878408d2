"""Compares each kernel with the reference on this machine before `backend="auto"` first uses it.

`rmc_kernels.verify.kernel` does so in a process of its own, under a time limit: a fault or a hang of a kernel takes its
CUDA context along. The result is a file beside Triton's cache, one for each kernel, device and version.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
import triton

from rmc_kernels._version import __version__
from rmc_kernels.backends.triton import launch

#: Whether `auto` compares at all: not where the environment has RMC_KERNELS_CHECK=0 at import.
enabled = os.environ.get("RMC_KERNELS_CHECK") != "0"
#: What compares; it is given a `Kernel` as JSON, and prints its fault, "" for none, as the last line of JSON.
COMMAND = (sys.executable, "-m", "rmc_kernels.verify.kernel")
#: Seconds that a comparison may take, nearly all of which is compilation: some 15 a kernel.
LIMIT = 300.0

#: The faults that are known in this process, "" for none.
_known: dict[Kernel, str] = {}
_lock = Lock()


class Kernel(NamedTuple):
    """What is compared as one.

    Attributes:
        spec: of the cell, as JSON.
        dtype: of x.
        gradients: "" for the forward pass alone; otherwise `recompute` of the forward and the backward pass.
        device: where.
        precision: of float32 products.
    """

    spec: str
    dtype: torch.dtype
    gradients: str
    device: torch.device
    precision: str

    def as_text(self) -> dict[str, str]:
        """The fields, ready for JSON."""
        return {name: str(value).removeprefix("torch.") for name, value in self._asdict().items()}

    @property
    def record(self) -> Path:
        """The file with the result of the comparison."""
        known_by = {**self.as_text(), "device": _device_name(self.device), **_versions()}
        digest = hashlib.sha256(json.dumps(known_by, sort_keys=True).encode()).hexdigest()
        return Path(triton.knobs.cache.dir) / "rmc_kernels" / f"{digest}.json"

    def __str__(self) -> str:
        passes = f'forward and backward, recompute="{self.gradients}"' if self.gradients else "forward"
        return f"the Triton kernel ({passes}) of {self.spec} in {self.dtype} on {self.device}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # Dynamo calls it while it traces
def fault(
    spec: str, dtype: torch.dtype, gradients: str, device: torch.device, check: bool, compiling: bool
) -> str | None:
    """Why `auto` must not use a kernel, or None.

    `spec`, `dtype`, `gradients` and `device` are those of a `Kernel`. `check` tells whether to compare a kernel without
    a result; otherwise it counts as right. `compiling` tells whether a compiler traces, which is no time to compare.

    Raises:
        RuntimeError: the kernel has no result yet, and a CUDA graph is being captured.

    Warns:
        RuntimeWarning: once a kernel, where it has a fault or could not be compared.
    """
    kernel = Kernel(spec, dtype, gradients, device, launch.precision(dtype))
    found = _result(kernel)
    if found is None:
        if not check:
            return None
        if compiling:
            return _warned(kernel, "it has not been compared with the reference yet; make a call before it is compiled")
        found = _first_use(kernel)
    return _warned(kernel, found) if found else None


def _result(kernel: Kernel) -> str | None:
    """The fault that this process knows or a file tells; None where nothing has been compared."""
    found = _known.get(kernel)
    if found is None:
        found = _read(kernel)
        if found is not None:
            _known[kernel] = found
    return found


def _first_use(kernel: Kernel) -> str:
    """The result of the comparison, by one thread while others wait."""
    if kernel.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel} must be compared with the reference before its first use, which cannot be done while a CUDA "
            "graph is captured: make a warm-up call before the capture"
        )
    with _lock:
        if kernel not in _known:
            _known[kernel] = _compare(kernel)
        return _known[kernel]


def checked(spec: str, dtype: torch.dtype, device: torch.device) -> str:
    """Which kernels of a cell have been compared on this machine, in a clause."""
    if not enabled:
        return "not compared with the reference, since RMC_KERNELS_CHECK is 0"
    precision = launch.precision(dtype)
    kernels = [Kernel(spec, dtype, gradients, device, precision) for gradients in ("", "full", "none")]
    found = [kernel.gradients for kernel in kernels if _result(kernel) == ""]
    passes = ["forward" if not each else f'recompute="{each}"' for each in found]
    return f"compared with the reference on this machine: {', '.join(passes) or 'nothing yet'}"


def _compare(kernel: Kernel) -> str:
    """The fault of a kernel by a comparison in another process, remembered unless the process could not compare."""
    try:
        done = subprocess.run(
            [*COMMAND, json.dumps(kernel.as_text())], timeout=LIMIT, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return _remembered(kernel, f"the comparison had not ended after {LIMIT:g} s")
    except OSError as error:
        return f"the comparison did not start: {error}"
    if done.returncode < 0:
        return _remembered(kernel, f"the comparison ended by signal {-done.returncode}")
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return _remembered(kernel, str(answer["fault"]))
    except (IndexError, KeyError, TypeError, ValueError):
        said = done.stderr.strip().splitlines()
        return f"the comparison failed with exit code {done.returncode}" + (f": {said[-1]}" if said else "")


def _remembered(kernel: Kernel, found: str) -> str:
    """`found`, once its file is written; whole or not at all, since processes may write it at once."""
    path = kernel.record
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name
            whole.write_text(json.dumps({"fault": found, **kernel.as_text(), **_versions()}))
            os.replace(whole, path)
    except OSError:  # a folder that cannot be written to: the next process compares again
        pass
    return found


def _read(kernel: Kernel) -> str | None:
    """The fault that a file tells; None without one, or with a damaged one."""
    try:
        return str(json.loads(kernel.record.read_text())["fault"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


@cache
def _warned(kernel: Kernel, found: str) -> str:
    """`found`, after a warning the first time."""
    again = f"; delete {kernel.record} to compare it again" if kernel in _known else ""
    warnings.warn(
        f'backend="auto" leaves out {kernel}: {found}{again}. backend="triton" runs it all the same',
        RuntimeWarning,
        stacklevel=2,
    )
    return found


@cache
def _device_name(device: torch.device) -> str:
    """What tells kinds of devices apart."""
    if device.type != "cuda":
        return str(device)
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {getattr(about, 'gcnArchName', '')}, {about.major}.{about.minor}"


@cache
def _versions() -> dict[str, str]:
    """Of all that a kernel's code comes from."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        sources.update(path.read_bytes())
    return {
        "rmc_kernels": __version__, "torch": torch.__version__, "triton": triton.__version__,
        "sources": sources.hexdigest(),
    }  # fmt: skip
